"""A subset of the compile report: the heaviest and the plainest launches, the cards most used."""

import sys

import pytest
import torch

pytest.importorskip("triton")

from orpo_kernels.kernels import tuning
from tests.kernels import compile_report
from tests.kernels.dryrun import SHARED_LIMIT, Resources

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
    assert len(list(compile_report._faults(bad, 89, case, streams=True))) == 4
    assert len(list(compile_report._faults(bad, 89, case, streams=False))) == 2
    gemm = next(case for case in CHOSEN if case.multiplies and "odd" not in case.label)
    fine = bad._replace(spills=0, shared_bytes=0, units=("mma.sync",))
    assert list(compile_report._faults(fine, 90, gemm, streams=True)) == ["no wgmma", "no tma"]
    assert list(compile_report._faults(fine, 80, gemm, streams=True)) == ["no cp.async"]


@pytest.mark.parametrize(("faults", "status"), [((), 0), (("3 spills", "no 16-byte load"), 1)])
def test_the_command_fails_when_a_kernel_does(faults, status, monkeypatch, capsys):
    figures = Resources(registers=40, spills=0, shared_bytes=0, wide_loads=4, wide_stores=4)
    line = compile_report.Line("90", "a case", "a_kernel", tuning.Row(2048, 4), figures, faults)
    monkeypatch.setattr(compile_report, "report", lambda target, cases: iter([line]))
    monkeypatch.setattr(sys, "argv", ["compile_report", "--targets", "90", "gfx942"])
    assert compile_report.main() == status
    printed = capsys.readouterr().out
    assert "; ".join(faults) in printed
    assert f"2 kernels compiled, {2 * status} with a fault" in printed


def test_the_targets_are_those_of_users():
    # Turing to Blackwell, consumer and data centre; MI250, MI300, RDNA 3.
    named = [75, 80, 86, 89, 90, 100, 120, "gfx90a", "gfx942", "gfx1100"]
    assert list(SHARED_LIMIT) == named
    # What is chosen for a consumer card fits 99 KiB, and 64 KiB on sm_75.
    assert {SHARED_LIMIT[each] // 1024 for each in (86, 89, 120)} == {99}
    assert SHARED_LIMIT[75] == 64 * 1024


def test_every_row_of_the_table_is_reported():
    reported = {
        (case.key(target, "")[0], case.dtype)
        for case in compile_report.cases() for target in compile_report.FORMS
    }  # fmt: skip
    assert {(kernel, dtype) for kernel, _, dtype in tuning.TABLE} - reported == set()
