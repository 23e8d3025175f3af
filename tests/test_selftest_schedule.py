"""How the self-test runs its checks: side by side, taking turns, and in a limited time."""

import gc
import subprocess
import sys
import threading
import time

import pytest
import torch

from orpo_kernels import selftest
from orpo_kernels.selftest import schedule, startup
from orpo_kernels.selftest.figures import Case, Setting
from orpo_kernels.selftest.schedule import EndsInTime, Limit, Plan, Turns
from tests.test_selftest import CPU, MonkeyPatch, only

TRAINS = Case("fuse_head", "", Setting(CPU, torch.bfloat16), lambda setting: iter(()))
CHECKS = TRAINS._replace(op="orpo_loss")


def test_side_by_side_gives_the_same_figures() -> None:
    # As on a GPU, where checks wait for a compiler; in an order of their own.
    cases = list(selftest._cases(CPU, 1, with_model=True))
    cases = [case for case in cases if case.op in ("odds_ratio", "orpo_loss", "fuse_head")]
    expected, _ = schedule.run(cases, CPU)
    state = torch.get_rng_state()
    checks, left_out = schedule.run(cases, CPU, Plan(6, Turns(2)))
    assert torch.equal(torch.get_rng_state(), state)
    assert left_out == []
    assert checks == expected


def test_a_default_device_of_the_caller_is_not_that_of_a_check() -> None:
    cases = [case for case in selftest._cases(CPU, 1, with_model=False) if case.op == "odds_ratio"]
    with torch.device("meta"):
        checks, _ = schedule.run(cases, CPU)
        assert torch.get_default_device().type == "meta"
    assert len(checks) == 3
    assert all(check.passed for check in checks)


def test_a_backward_waits_for_no_other_check() -> None:
    # On a GPU all backwards would share the one thread that autograd has for it.
    assert torch._C._is_multithreading_enabled()
    with schedule._surroundings(CPU):
        assert not torch._C._is_multithreading_enabled()


def test_who_waits_lets_another_work() -> None:
    turns, worked = Turns(1), threading.Event()

    def work() -> None:
        with turns.taken():
            worked.set()

    other = threading.Thread(target=work)
    with turns.taken():
        other.start()
        assert not worked.wait(0.05)
        with turns.waiting():
            assert worked.wait(10)
    other.join()
    with turns.waiting(), turns.taken():  # of a thread that has no turn: none is given away
        other = threading.Thread(target=work)
        worked.clear()
        other.start()
        assert not worked.wait(0.05)
    other.join()


def test_who_has_waited_is_before_those_who_begin() -> None:
    turns, order, go = Turns(1), list[str](), threading.Event()

    def begin(name: str) -> None:
        with turns.taken():
            order.append(name)
            assert go.wait(10)

    def when_resuming() -> None:
        while not turns._resuming:
            time.sleep(0.001)
        go.set()

    threads = [threading.Thread(target=begin, args=(name,)) for name in ("first", "second")]
    with turns.taken():
        with turns.waiting():
            threads[0].start()
            while not order:
                time.sleep(0.001)
            threads.append(threading.Thread(target=when_resuming))
            for each in threads[1:]:
                each.start()
        order.append("has waited")
    for each in threads:
        each.join()
    assert order == ["first", "has waited", "second"]


def usual(loading_seconds: float = 0.0, **answers: int) -> EndsInTime:
    """The command's limit on a GPU, from now on."""
    limit = EndsInTime(Turns(1), schedule.perf_counter())
    limit.loading_seconds, limit.answers = loading_seconds, answers
    assert limit.begins(TRAINS)  # the first, whatever it takes
    return limit


def test_transformers_is_imported_where_there_is_time(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "perf_counter", lambda: 0.0)
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils", raising=False)
    # 8 s for its import, beside other checks 20; of those there is time for any.
    assert not usual(1.0, known=1).begins(TRAINS)
    assert not usual(1.0, compiled=1).begins(TRAINS)
    assert usual(1.0, known=1).begins(CHECKS)
    # 4 s, beside other checks 10: it comes last where none of them waits for a kernel.
    assert usual(0.5, known=1).begins(TRAINS)
    assert usual(0.5, compiled=1).begins(TRAINS)
    assert usual(known=1).comes_last(TRAINS)
    assert not usual(known=1).comes_last(CHECKS)
    assert not usual(known=1, compiled=1).comes_last(TRAINS)
    monkeypatch.setitem(sys.modules, "transformers.modeling_utils", sys)  # it is there already
    assert usual(1.0, known=1).begins(TRAINS)
    assert not usual(known=1).comes_last(TRAINS)


def test_the_command_says_what_it_did_not_wait_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "transformers.modeling_utils", raising=False)
    monkeypatch.setattr(selftest, "_cases", only("fuse_head"))
    report = selftest._self_test("cpu", False, lambda *_: usual(0.9, known=1))
    expected = "which takes about 7 s, for 2 checks: fuse_head in float32, fuse_head in bfloat16"
    assert expected in report.skipped[-1]
    written = capsys.readouterr().out
    assert expected in written
    assert "all passed" not in written
    assert not report.passed


def test_says_what_no_time_was_left_for(capsys: pytest.CaptureFixture[str]) -> None:
    report = selftest.self_test("cpu", seconds=1e-9)
    assert report.checks == ()
    assert not report.passed  # nothing was found out
    # Of the model's checks another line says why, where nothing has imported transformers yet.
    left_out = next(line for line in report.skipped if "no time was left within" in line)
    assert "column_sums in bfloat16, " in left_out
    assert "linear_lse in float16 (2)" in left_out
    written = capsys.readouterr().out
    assert written.startswith("orpo_kernels ")
    assert "no time was left within 1e-09 s for" in written


def test_the_command_ends_in_time_on_a_gpu_only() -> None:
    turns = Turns(1)
    assert isinstance(selftest._usual_limit(0.0, Plan(8, turns, 4)), EndsInTime)
    assert isinstance(selftest._usual_limit(0.0, Plan(8, turns)), EndsInTime)  # threads compile
    usual_of_a_cpu = selftest._usual_limit(0.0, schedule.ONE_BY_ONE)
    assert type(usual_of_a_cpu) is Limit
    assert usual_of_a_cpu.seconds == selftest.LIMIT_S


def test_the_first_line_is_there_before_a_device_is_used(
    capsys: pytest.CaptureFixture[str], monkeypatch: MonkeyPatch
) -> None:
    def used(device: torch.device) -> torch.device:
        raise ValueError("used")

    monkeypatch.setattr(selftest, "usable_device", used)
    with pytest.raises(ValueError, match="used"):
        selftest.self_test("cpu")
    assert capsys.readouterr().out.startswith("orpo_kernels ")


def test_on_a_gpu_more_checks_are_begun_than_compilers_work(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "runs_triton", lambda device, dtype: device.type == "cuda")
    monkeypatch.setattr(schedule, "processors", lambda: 6)
    cuda = torch.device("cuda")
    plan = schedule.plan_of(cuda, forks=True)
    assert plan.workers == 6 < plan.threads
    without = schedule.plan_of(cuda, forks=False)
    assert (without.threads, without.workers) == (6, 0)
    assert schedule.plan_of(CPU, forks=False) == schedule.ONE_BY_ONE


def test_the_order_leaves_out_least() -> None:
    cases = list(selftest._cases(CPU, 1, with_model=True))
    order = [cases[i] for i in schedule._order(cases, Plan(6, Turns(4), 2))]
    assert sorted(map(id, order)) == sorted(map(id, cases))
    count = sum(case.setting.dtype == torch.bfloat16 for case in cases)
    early, late = order[:count], order[count:]
    assert {case.setting.dtype for case in early} == {torch.bfloat16}
    assert [(case.op, case.name) for case in early[:3]] == list(schedule._FIRST)
    ops = [case.op for case in early]
    assert ops[-1] == "fuse_head"
    others = [op for op in ops[3:] if op not in ("orpo_loss", "linear_logps")]
    once = others[: len(set(others)) - 1]  # every op, the quick ones first, before any another time
    assert {*once, "fuse_head"} == set(others)
    assert once[-2:] == ["linear_lse", "sparse_token_logps"]
    assert set(ops[: 3 + len(once)]) == {*once, "orpo_loss", "linear_logps"}
    # Nothing of another dtype is begun before every op is.
    assert {case.op for case in late} - set(ops) == {"sequence_mean", "pair_loss"}  # float32 only
    assert schedule._order(cases, schedule.ONE_BY_ONE) == list(range(len(cases)))


def test_a_lean_process_imports_no_compiler_of_torchs() -> None:
    script = """
import sys
import torch
from orpo_kernels import selftest
from orpo_kernels.selftest import schedule, startup
cpu = torch.device("cpu")
ops = {"sequence_mean", "odds_ratio", "pair_loss", "orpo_loss"}
cases = [case for case in selftest._cases(cpu, 1, with_model=False) if case.op in ops]
with startup.lean():
    checks, _ = schedule.run(cases, cpu)
assert {check.op for check in checks if check.passed} == ops
assert not {"torch._dynamo", "sympy"} & set(sys.modules), sys.modules.keys()
schedule.run(cases[:1], cpu)
assert "torch._dynamo" in sys.modules  # as ever
"""
    subprocess.run([sys.executable, "-c", script], check=True)


def test_lean_collects_again_afterwards() -> None:
    assert gc.isenabled()
    with startup.lean():
        assert not gc.isenabled()
    assert gc.isenabled()


def test_nothing_is_collected_before_the_report_is_said(monkeypatch: MonkeyPatch) -> None:
    collects = []

    def findings(report: selftest.SelfTestReport) -> str:
        collects.append(gc.isenabled())
        return ""

    monkeypatch.setattr(selftest, "_cases", lambda *args, **kwargs: ())
    monkeypatch.setattr(selftest.SelfTestReport, "findings", findings)
    selftest.self_test("cpu")
    assert (collects, gc.isenabled()) == ([False], True)


def test_the_command_leaves_what_is_there_to_the_end_of_the_process() -> None:
    script = """
import gc
from orpo_kernels import cli
assert cli.main(["selftest", "--help"]) == 0
assert gc.get_freeze_count() > 100_000  # torch
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
