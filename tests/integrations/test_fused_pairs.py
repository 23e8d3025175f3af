"""Batches of pairs (P, 2, T): the stacked batch in another layout, and what both refuse."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
import torch

import orpo_kernels
from orpo_kernels import ORPOLoss, fuse_head
from orpo_kernels.pair_batch import paired, stack_batch, stack_pairs
from tests.integrations.helpers import BETA, assert_same_step, fused_step, make_batch
from tests.tiny_models import build

PAIRS = 3  # neither 2, the length of the other dimension, nor symmetric in it


@pytest.mark.parametrize("scope", [None, "completion"])
def test_pairs_are_the_stacked_batch(scope: str | None) -> None:
    model, stacked = build("llama"), make_batch(PAIRS)
    if scope == "completion":
        del stacked["nll_labels"]
    batch = {name: paired(value) for name, value in stacked.items()}
    assert batch["labels"].shape == (PAIRS, 2, 9)
    for name, value in stack_batch(batch).items():
        assert torch.equal(value, stacked[name])
    with fuse_head(model, loss=ORPOLoss(BETA, nll_scope=scope), mean_logits=True):
        expected, found = fused_step(model, stacked), fused_step(model, batch)
    assert found.token_logps.shape == (PAIRS, 2, 9)
    assert found.mean_logits.shape == (PAIRS, 2)
    changes = {"token_logps": stack_pairs(found.token_logps)}
    changes["mean_logits"] = stack_pairs(found.mean_logits)
    if scope is None:
        changes["nll_token_logps"] = stack_pairs(found.nll_token_logps)
    assert_same_step(found._replace(**changes), expected, tolerance=0.0)


def test_terms_are_of_pairs() -> None:
    batch = make_batch(PAIRS)
    with fuse_head(build("llama"), loss=ORPOLoss(BETA)) as fused:
        stacked = fused.model(**batch).orpo
        orpo = fused.model(**{name: paired(value) for name, value in batch.items()}).orpo
    assert torch.equal(orpo.chosen_logps, stacked.chosen_logps)
    assert torch.equal(orpo.rejected_logps, stacked.rejected_logps)


def test_a_dimension_of_three_is_no_pair() -> None:
    batch = {name: value.view(2, 3, 9) for name, value in make_batch(PAIRS).items()}
    model, message = build("llama"), r"must be \(P, 2, T\), .* got \(2, 3, 9\); something"
    with fuse_head(model, loss=ORPOLoss(BETA)), pytest.raises(ValueError, match=message):
        model(**batch)


@pytest.mark.parametrize("in_pairs", [False, True])
def test_nll_labels_of_rejected_sequences_are_refused(in_pairs: bool) -> None:
    # The chosen half of a batch of 4 pairs, as one of two ranks gets it: all chosen.
    batch = {name: value[:4] for name, value in make_batch(4).items()}
    if in_pairs:
        batch = {name: paired(value) for name, value in batch.items()}
    model, message = build("llama"), "nll_labels must be -100 in the rejected sequences"
    with fuse_head(model, loss=ORPOLoss(BETA)), pytest.raises(ValueError, match=message):
        model(**batch)
    with fuse_head(model):  # without a loss there are no pairs
        assert model(**batch).nll_token_logps.shape == batch["labels"].shape


def test_messages_of_device_assertions_are_as_short_as_torch_wants_them() -> None:
    # Over 254 characters _assert_async raises for its message, whatever the condition: seen on an
    # H200. On a CPU nothing asks for one.
    found = []
    for path in Path(orpo_kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch._assert_async":
                message = ast.unparse(node.args[1])
                module = importlib.import_module(
                    ".".join(path.relative_to(Path(orpo_kernels.__file__).parents[1]).parts)[:-3]
                )
                found.append(eval(message, vars(module)))
    assert len(found) >= 4
    assert max(map(len, found)) <= 254
