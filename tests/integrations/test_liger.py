"""Liger's interface, against the released Liger where it is right and float64 where it is not."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss as Theirs
from torch import Tensor

from orpo_kernels import reference
from orpo_kernels.integrations.liger import LigerFusedLinearORPOLoss as Ours

AUXILIARIES = (
    "chosen_logps", "rejected_logps", "chosen_logits_mean", "rejected_logits_mean", "nll_loss",
    "chosen_rewards", "rejected_rewards", "log_odds_ratio", "log_odds_chosen",
)  # fmt: skip
# Pairs, T, H, V: Liger's own test shapes, small and odd (H 31, V 123: no block size divides them).
SHAPES = {"small": (1, 2, 8, 8), "odd": (3, 47, 31, 123), "wide": (2, 16, 64, 512)}


def batch(shape: str, dtype: torch.dtype, ignore_index: int, bias: bool) -> dict[str, Any]:
    P, T, H, V = SHAPES[shape]
    target, nll_target = (torch.randint(0, V, (2 * P, T)) for _ in range(2))
    for each in (target, nll_target):
        each[torch.rand(each.shape) < 0.3] = ignore_index
        each[:, 0] = (ignore_index + 1) % V  # no answer is empty
    return {
        "lin_weight": torch.randn(V, H).to(dtype).requires_grad_(),
        "_input": torch.randn(2 * P, T, H).to(dtype).requires_grad_(),
        "target": target,
        "bias": torch.randn(V).to(dtype).requires_grad_() if bias else None,
        "nll_target": nll_target,
    }


def results(loss: Any, arguments: dict[str, Any], dtype: torch.dtype) -> list[Tensor]:
    """Loss, nine auxiliaries and gradients, of a copy of the arguments."""
    given = {
        name: each if each is None or not each.is_floating_point()
        else each.detach().to(dtype).requires_grad_()
        for name, each in arguments.items()
    }  # fmt: skip
    value, auxiliaries = loss(**given)
    assert len(auxiliaries) == len(AUXILIARIES)
    leaves = [each for each in given.values() if each is not None and each.requires_grad]
    return [value.detach(), *auxiliaries, *torch.autograd.grad(3.0 * value, leaves)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
# 7 lies inside every vocabulary: a label that Liger may be told to ignore.
@pytest.mark.parametrize(("ignore_index", "beta"), [(-100, 0.1), (7, 0.2)])
@pytest.mark.parametrize("nll", ["same", "other", "none"])
def test_equals_liger(shape: str, bias: bool, ignore_index: int, beta: float, nll: str) -> None:
    arguments = batch(shape, torch.float32, ignore_index, bias)
    if nll != "other":
        arguments["nll_target"] = None
    options = {"ignore_index": ignore_index, "beta": beta, "compute_nll_loss": nll != "none"}
    ours = results(Ours(**options), arguments, torch.float32)
    theirs = results(Theirs(compiled=False, **options), arguments, torch.float32)
    for one, other in zip(ours, theirs, strict=True):
        # Liger's float32 against float64: 4e-6.
        torch.testing.assert_close(one, other.to(one), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(dtype: torch.dtype) -> None:
    # Against float64 on the same rounded operands: at most Liger's own error, which is 16-bit.
    arguments = batch("odd", dtype, -100, True)
    ours, theirs = (results(loss, arguments, dtype) for loss in (Ours(), Theirs(compiled=False)))
    truth = results(Ours(), arguments, torch.float64)
    for one, other, true in zip(ours, theirs, truth, strict=True):
        error, allowed = ((each.double() - true).abs().max() for each in (one, other))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * true.abs().max()


def test_signatures_and_names_are_ligers() -> None:
    for method in ("__init__", "forward"):
        ours, theirs = (inspect.signature(getattr(each, method)) for each in (Ours, Theirs))
        added = set(ours.parameters) - set(theirs.parameters)
        assert list(ours.parameters)[: len(theirs.parameters)] == list(theirs.parameters)
        assert added == ({"workspace_bytes"} if method == "__init__" else set())
        for name, parameter in theirs.parameters.items():
            assert ours.parameters[name].default == parameter.default
    names = inspect.signature(Ours().forward).parameters
    assert list(names) == ["lin_weight", "_input", "target", "bias", "nll_target"]


def certain(side: int) -> dict[str, Tensor]:
    """One pair whose chosen or rejected answer has probability 1 in float32."""
    hidden = torch.zeros(2, 1, 2)
    hidden[:, 0, 1] = 1.0
    hidden[side, 0] = torch.tensor([17.0, 0.0])
    return {"lin_weight": torch.eye(2), "_input": hidden, "target": torch.zeros(2, 1).long()}


@pytest.mark.parametrize("side", [0, 1], ids=["chosen", "rejected"])
def test_certain_answers(side: int) -> None:
    arguments = certain(side)
    ours = results(Ours(), arguments, torch.float32)
    theirs = results(Theirs(compiled=False), arguments, torch.float32)
    assert not all(torch.isfinite(each).all() for each in theirs)  # why this test is here
    exact = [arguments[name].double().requires_grad_() for name in ("lin_weight", "_input")]
    true = reference.orpo_loss(exact[1], exact[0], arguments["target"])
    torch.testing.assert_close(ours[0].double(), true.loss.detach(), rtol=1e-5, atol=0)
    for one, other in zip(ours[-2:], torch.autograd.grad(3.0 * true.loss, exact), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-12)


def test_an_empty_answer_counts_for_nothing() -> None:
    arguments = batch("odd", torch.float32, -100, False) | {"nll_target": None}
    arguments["target"][4] = -100  # the rejected answer of the second pair
    assert torch.isnan(results(Theirs(compiled=False), arguments, torch.float32)[0])
    ours = results(Ours(), arguments, torch.float32)
    rest = dict(arguments)
    rows = [0, 2, 3, 5]
    for name in ("_input", "target"):
        rest[name] = arguments[name].detach()[rows]
    rest["_input"].requires_grad_()
    alone = results(Theirs(compiled=False), rest, torch.float32)
    for index in (0, 5, 8, 9):  # loss, NLL, and the means over pairs
        torch.testing.assert_close(ours[index], alone[index], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[-2], alone[-2], rtol=1e-5, atol=1e-5)
    assert not ours[-1][[1, 4]].any()


def test_refusals() -> None:
    arguments = certain(0)
    three = {name: arguments[name][[0, 1, 1]] for name in ("_input", "target")}
    with pytest.raises(ValueError, match="got 3 sequences"):
        Ours()(arguments["lin_weight"], **three)
    with pytest.raises(ValueError, match="chunk_size must be at least 1, got 0"):
        Ours(chunk_size=0)
