"""How the self-test runs its checks: side by side, and in a limited time."""

import pytest
import torch

from orpo_kernels import selftest
from orpo_kernels.selftest import schedule
from tests.test_selftest import CPU


def test_side_by_side_gives_the_same_figures() -> None:
    # As on a GPU, where checks wait for a compiler; in an order of their own.
    cases = list(selftest._cases(CPU, 1, with_model=True))
    cases = [case for case in cases if case.op in ("odds_ratio", "orpo_loss", "fuse_head")]
    expected, _ = schedule.run(cases, CPU, 1, None)
    state = torch.get_rng_state()
    checks, left_out = schedule.run(cases, CPU, 4, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert left_out == []
    assert checks == expected


def test_says_what_no_time_was_left_for(capsys: pytest.CaptureFixture[str]) -> None:
    report = selftest.self_test("cpu", seconds=1e-9)
    assert report.checks == ()
    assert not report.passed  # nothing was found out
    assert "column_sums in bfloat16, " in report.skipped[-1]
    assert "linear_lse in float16 (2)" in report.skipped[-1]
    written = capsys.readouterr().out
    assert written.startswith("orpo_kernels ")
    assert "no time was left after 1e-09 s for" in written
