"""The self-test of the sparse gradient on slots: what `orpo-kernels selftest` runs on a GPU."""

import pytest
import torch

from orpo_kernels.engine.sparse import scan_loop
from orpo_kernels.kernels import has_slots
from orpo_kernels.selftest import schedule, sparse
from orpo_kernels.selftest.figures import Setting
from tests.kernels.interpreted.engine import as_on_a_gpu


def failures(dtype):
    setting = Setting(torch.device("cpu"), dtype)
    assert has_slots(setting.device, dtype)
    checks, _ = schedule.run(list(sparse.cases(setting)), setting.device, 1, None)
    return {check.op for check in checks if not check.passed}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_check_passes_on_slots(dtype, monkeypatch):
    as_on_a_gpu(monkeypatch, widens=True)
    assert failures(dtype) == set()


def test_they_tell_slots_from_entries_kept_by_row(monkeypatch):
    as_on_a_gpu(monkeypatch, widens=True)
    definition = sparse._definition
    monkeypatch.setattr(
        sparse, "_definition", lambda *given, in_slots: definition(*given, in_slots=False)
    )
    assert failures(torch.float32) == {"sparse_linear_logps"}


def test_they_find_a_tail_that_a_frozen_head_loses(monkeypatch):
    as_on_a_gpu(monkeypatch, widens=True)
    right = scan_loop.tail_product
    monkeypatch.setattr(scan_loop, "tail_product", lambda *given: torch.zeros_like(right(*given)))
    setting = Setting(torch.device("cpu"), torch.float32)
    cases = [case for case in sparse.cases(setting) if case.name.startswith("frozen")]
    checks, _ = schedule.run(cases, setting.device, 1, None)
    assert {check.case for check in checks if not check.passed} == {"frozen head, peaked"}
