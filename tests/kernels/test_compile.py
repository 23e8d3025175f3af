"""A subset of the compile report: the heaviest and the plainest launches, the cards most used."""

import sys
from importlib import metadata

import pytest
import torch

pytest.importorskip("triton")

from orpo_kernels.kernels import tuning
from tests.kernels import compile_cases, compile_report
from tests.kernels.dryrun import SHARED_LIMIT, Resources, spilled

PRODUCTS = ("gather_", "dense_", "slot_products")
CHOSEN = [
    case
    for case in compile_cases.cases()
    if case.dtype != torch.float16 and ("all options" in case.label or "tile" not in case.label)
    if case.dtype == torch.bfloat16 or not case.kernel.startswith(PRODUCTS)
]


# The oldest that is supported, the one that PyPI's torch 2.13 brings, and the newest: the versions
# that all kernels of these targets were compiled by.
BUDGETS_OF = ("3.6.0", "3.7.1", "3.9.0")


# A consumer card with 99 KiB, a data-centre card, and AMD's 64-lane warps.
@pytest.mark.slow
@pytest.mark.parametrize("target", [89, 90, "gfx942"])
def test_every_kernel_fits_without_spills(target, monkeypatch):
    if (found := metadata.version("triton")) not in BUDGETS_OF:
        pytest.skip(f"budgets are those of Triton {' and '.join(BUDGETS_OF)}, this is {found}")
    largest = {key: rows[:1] for key, rows in tuning.TABLE.items()}
    monkeypatch.setattr(tuning, "TABLE", largest)
    lines = list(compile_report.report(target, CHOSEN))
    assert len(lines) >= len(CHOSEN)
    assert [(line.case, line.faults) for line in lines if line.faults] == []


def test_a_fault_is_reported():
    row = tuning.Row(256, 8, 32, 4, 128)
    case = CHOSEN[0]._replace(wide_stores=True)
    bad = Resources(registers=255, spills=3, shared_bytes=10**6, wide_loads=0, wide_stores=0)
    assert len(list(compile_report._faults(bad, 89, row, case, streams=True))) == 4
    assert len(list(compile_report._faults(bad, 89, row, case, streams=False))) == 2


def test_a_zero_handed_to_a_call_is_no_spill():
    # As nvdisasm prints them: a register and its return, four of them, and an argument.
    code = """
        /*0940*/                   STL [R1+0x4], R0 ;
        /*76c0*/                   LDL.LU R10, [R1+0x4] ;
        /*0a50*/                   STL.128 [R1+0x10], R12                 &rd=0x1
        /*1ab0*/                   STL.64 [R1], RZ                        &rd=0x1
    """
    assert spilled(code) == 3


def test_a_product_on_no_tensor_cores_or_not_fed_is_reported():
    def faults(target, row, case, units, stores=0):
        figures = Resources(40, spills=0, shared_bytes=0, wide_loads=0, wide_stores=stores)
        figures = figures._replace(units=units)
        return list(compile_report._faults(figures, target, row, case, streams=True))

    tile, row = tuning.Tile(128, 128, 64, 8, 4), tuning.Row(256, 8, 32, 4, 128)
    tiles, gathered, elements = (
        next(case for case in CHOSEN if case.operands == each and case.dtype == torch.bfloat16)
        for each in ("tiles", "gathered", "elements")
    )
    assert faults(90, tile, tiles, {"mma.sync": 2}) == ["no wgmma", "no tma"]
    assert faults(80, tile, tiles, {"mma.sync": 2}) == ["no cp.async"]
    assert faults(80, tile, elements, {}) == faults("gfx942", tile, elements, {})
    assert faults(80, tile, elements, {}) == ["no tensor cores"]
    # The copies of four stages of slots, but of no gathered row: the trap of an odd stride.
    assert len(faults(90, row, gathered, {"cp.async": 4})) == 3
    assert len(faults(90, row, gathered, {"cp.async": 15, "mma.sync": 2}, stores=8)) == 1
    assert faults(90, row, gathered, {"cp.async": 20, "mma.sync": 2}, stores=8) == []
    wide = {case: case._replace(dtype=torch.float32) for case in (tiles, gathered)}
    assert faults("gfx1100", tile, wide[tiles], {}) == []
    assert faults("gfx1100", row, wide[gathered], {}) == ["no tensor cores"]
    assert not any(case.suits(75) for case in (tiles, gathered, elements))


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
        for case in compile_cases.cases() for target in compile_cases.FORMS
    }  # fmt: skip
    assert {(kernel, dtype) for kernel, _, dtype in tuning.TABLE} - reported == set()
