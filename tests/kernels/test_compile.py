"""A subset of the compile report: the heaviest and the plainest launches, the cards most used."""

import pytest
import torch

pytest.importorskip("triton")

from orpo_kernels.kernels import tuning
from tests.kernels import compile_report
from tests.kernels.dryrun import Resources

CHOSEN = [
    case
    for case in compile_report.cases()
    if case.dtype != torch.float16 and ("all options" in case.label or "tile" not in case.label)
]


# A consumer card with 99 KiB, a data-centre card, and AMD's 64-lane warps.
@pytest.mark.parametrize("target", [89, 90, "gfx942"])
def test_every_kernel_fits_without_spills(target, monkeypatch):
    largest = {key: rows[:1] for key, rows in tuning.TABLE.items()}
    monkeypatch.setattr(tuning, "TABLE", largest)
    lines = list(compile_report.report(target, CHOSEN))
    assert len(lines) >= len(CHOSEN)
    assert [(line.case, line.faults) for line in lines if line.faults] == []


def test_a_fault_is_reported():
    case = CHOSEN[0]._replace(wide_stores=True)
    bad = Resources(registers=255, spills=3, shared_bytes=10**6, wide_loads=0, wide_stores=0)
    assert len(list(compile_report._faults(bad, 101376, case, streams=True))) == 4
    assert len(list(compile_report._faults(bad, 101376, case, streams=False))) == 2


def test_every_row_of_the_table_is_reported():
    reported = {(case.kernel, case.dtype) for case in compile_report.cases()}
    assert {(kernel, dtype) for kernel, _, dtype in tuning.TABLE} - reported == set()
