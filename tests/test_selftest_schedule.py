"""How the self-test runs its checks: in processes side by side, and in a limited time."""

import pytest
import torch

from orpo_kernels import selftest
from orpo_kernels.selftest import schedule, worker
from tests.test_selftest import CPU


def cases_of(*ops: str) -> list[selftest.Case]:
    return [case for case in selftest.all_cases(CPU, 1, with_model=True) if case.op in ops]


def test_side_by_side_gives_the_same_figures() -> None:
    # As on a GPU, where checks wait for a compiler; in an order of their own.
    cases = cases_of("odds_ratio", "orpo_loss", "fuse_head")
    expected, _ = schedule.run(cases, CPU, 1, None)
    state = torch.get_rng_state()
    checks, left_out = schedule.run(cases, CPU, 2, None)
    assert torch.equal(torch.get_rng_state(), state)
    assert left_out == []
    assert checks == expected


def test_every_case_has_a_name_of_its_own() -> None:
    cases = list(selftest.all_cases(CPU, 1, with_model=True))
    assert len({schedule.labels_of(case) for case in cases}) == len(cases) > 100


def test_a_check_that_kills_its_process_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # A worker that dies of every check of an odds ratio, as of an illegal address.
    source = (
        f"import os, sys; from {worker.__name__} import *; import {worker.__name__} as w\n"
        "right = w.checked\n"
        "def checked(case):\n"
        "    if case.op == 'odds_ratio':\n"
        "        print('illegal address', file=sys.stderr, flush=True); os._exit(7)\n"
        "    return right(case)\n"
        "w.checked = checked; w.main()\n"
    )
    real = schedule.subprocess.Popen

    def start(command: list[str], **options: object) -> object:
        return real([command[0], "-c", source, *command[3:]], **options)

    monkeypatch.setattr(schedule.subprocess, "Popen", start)
    checks, _ = schedule.run(cases_of("odds_ratio", "column_sums"), CPU, 2, None)
    for check in checks:
        assert check.passed == (check.op == "column_sums")
        if not check.passed:
            assert check.message == "its process ended with exit status 7: illegal address"


@pytest.mark.parametrize("workers", [1, 2])
def test_says_what_no_time_was_left_for(
    workers: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(schedule, "workers_of", lambda device: workers)
    report = selftest.self_test("cpu", seconds=1e-9)
    assert report.checks == ()
    assert not report.passed  # nothing was found out
    assert "column_sums in bfloat16, " in report.skipped[-1]
    assert "linear_lse in float16 (2)" in report.skipped[-1]
    written = capsys.readouterr().out
    assert written.startswith("orpo_kernels ")
    assert "no time was left after 1e-09 s for" in written


def test_processes_are_as_many_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert schedule.workers_of(CPU) == 1
    monkeypatch.setattr(schedule, "runs_triton", lambda device, dtype: True)
    monkeypatch.setattr(schedule.os, "cpu_count", lambda: 8)
    for free_gib, expected in ((100, 8), (5.5, 5), (0.2, 1)):
        free = int(free_gib * 2**30)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2**40))
        assert schedule.workers_of(torch.device("cuda")) == expected
