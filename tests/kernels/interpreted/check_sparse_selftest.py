"""The self-test of the sparse gradient on slots: what `orpo-kernels selftest` runs on a GPU."""

import pytest
import torch

from orpo_kernels.engine.sparse import scan_loop
from orpo_kernels.kernels import has_slots
from orpo_kernels.selftest import logps, schedule, sparse
from orpo_kernels.selftest.figures import Setting
from tests.kernels.interpreted.engine import as_on_a_gpu
from tests.kernels.interpreted.plugin import launches

PEAKED = {"frozen head, peaked", "trainable head, peaked"}
# On the way of slots, and on the exact one that flat logits take.
SLOTS = {"gather_slots", "dropped_rows", "tail_product", "given_back", "keep_slots"}
EXACT = {"softmax_block", "weight_probs"}


@pytest.fixture
def small(monkeypatch):
    """A quarter of the vocabulary: V = 509, a prime, since a program per entry is what takes long.

    With four times eps slots keep a fifth of the columns and drop a tenth of the mass, as with all
    of it a sixth and 6 %; with the same eps all would be left to the exact loop.
    """
    as_on_a_gpu(monkeypatch, widens=True)
    monkeypatch.setattr(logps, "VOCABULARY", 509)
    variants = [
        (v._replace(vocabulary=v.vocabulary and 512), 4 * eps if v.name in PEAKED else eps)
        for v, eps in sparse.VARIANTS
    ]
    monkeypatch.setattr(sparse, "VARIANTS", variants)


def failures(dtype, op=""):
    """Of the checks of `op`, or of all: op and case of those that fail."""
    setting = Setting(torch.device("cpu"), dtype)
    assert has_slots(setting.device, dtype)
    cases = [case for case in sparse.cases(setting) if op in case.op]
    checks, _ = schedule.run(cases, setting.device)
    assert len(checks) == len(cases) > 0
    return {(check.op, check.case) for check in checks if not check.passed}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_check_passes_on_slots(dtype, small):
    before = len(launches)
    assert failures(dtype) == set()
    assert set(launches[before:]) >= SLOTS | EXACT


def test_they_tell_slots_from_entries_kept_by_row(small, monkeypatch):
    definition = sparse._definition
    monkeypatch.setattr(
        sparse, "_definition", lambda *given, in_slots: definition(*given, in_slots=False)
    )
    op = "sparse_token_logps"
    assert failures(torch.float32, op) == {(op, variant.name) for variant, _ in sparse.VARIANTS}


def test_they_find_a_tail_that_is_lost(small, monkeypatch):
    right = scan_loop.tail_product
    monkeypatch.setattr(scan_loop, "tail_product", lambda *given: torch.zeros_like(right(*given)))
    op = "sparse_token_logps"
    assert failures(torch.float32, op) == {(op, case) for case in PEAKED}
