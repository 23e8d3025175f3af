"""The command on a GPU ends in time on any host: simulated, with a clock of its own."""

import threading
from collections import Counter
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from orpo_kernels import selftest
from orpo_kernels.selftest import schedule
from orpo_kernels.selftest.figures import Case, Figure, Setting
from orpo_kernels.selftest.forks import COMPILED, KNOWN
from orpo_kernels.selftest.schedule import COLD_S, WARM_S, EndsInTime, Limit, Plan, Turns
from tests.test_selftest import CPU, MonkeyPatch

CASES = 120
SETTING = Setting(CPU, torch.bfloat16)
CASE = Case("column_sums", "", SETTING, lambda setting: iter(()))


class Kernel(Future[None]):
    """One that is there after so many seconds, in which nothing else happens."""

    def __init__(self, host: "Host", answer: str) -> None:
        super().__init__()
        self._host, self._answer = host, answer

    def result(self, timeout: float | None = None) -> None:
        seconds = self._host.factor * (0.35 if self._answer == COMPILED else 0.01)
        self._host.now += seconds if timeout is None else min(seconds, timeout)
        if timeout is not None and timeout < seconds:
            raise schedule.NotDoneError
        self._host.answers[self._answer] += 1


class Host:
    """One that takes `factor` times as long for all as two cores of an AVX-512 server."""

    def __init__(self, factor: float, monkeypatch: MonkeyPatch) -> None:
        self.factor, self.now, self.answers = factor, 0.0, Counter[str]()
        monkeypatch.setattr(schedule, "perf_counter", lambda: self.now)
        turns = Turns(1)
        self.limit, self.plan = EndsInTime(turns, self.now), Plan(1, turns, 1)
        self.limit.loading_seconds, self.limit.answers = 0.18 * factor, self.answers
        self.now += 0.2 * factor  # before the first check

    def check(self, setting: Setting, work: float, answer: str) -> Any:
        """Two kernels, and Python around them."""
        for seconds in (work / 2, work / 2):
            self.now += seconds * self.factor
            self.limit.wait(Kernel(self, answer))
        yield Figure("", 0.0, 1.0)

    def run(self, *answers: str) -> int:
        """How many checks are made, of which each asks for kernels that are answered so."""
        # Checks take 0.03 to 0.06 s, none more than twice the longest before it.
        works = [0.03 + 0.01 * (i % 4) for i in range(len(answers))]
        cases = [
            Case(f"op {i}", "", SETTING, self.check, (work, answer))
            for i, (work, answer) in enumerate(zip(works, answers, strict=True))
        ]
        checks, left_out = schedule.run(cases, CPU, self.plan, self.limit)
        assert all(check.passed for check in checks)
        named = " ".join(selftest._left_out(left_out, self.limit))
        made = {check.op for check in checks}
        assert {case.op for case in left_out} == {case.op for case in cases} - made
        assert all(f"{case.op} in bfloat16" in named for case in left_out)
        self.now += 0.06 * self.factor  # until the processes that compile are gone
        return len(checks)


@pytest.mark.parametrize("factor", [1, 3, 5, 10])
def test_ends_in_time(factor: float, monkeypatch: MonkeyPatch) -> None:
    warm = Host(factor, monkeypatch)
    made = warm.run(*[KNOWN] * CASES)
    assert 1 <= made < CASES
    assert warm.now <= WARM_S
    assert made == pytest.approx((WARM_S / factor - 0.2) / 0.065, abs=5)  # as many as may be
    cold = Host(factor, monkeypatch)
    assert 1 <= cold.run(*[COMPILED] * CASES) < CASES
    assert cold.now <= COLD_S


def test_has_the_time_to_compile_once_it_does(monkeypatch: MonkeyPatch) -> None:
    host = Host(3, monkeypatch)
    assert host.run(*[KNOWN] * 5, *[COMPILED] * CASES) > 5
    assert WARM_S < host.now <= COLD_S


def test_the_first_check_is_made_on_any_host(monkeypatch: MonkeyPatch) -> None:
    for answer in (KNOWN, COMPILED):
        assert Host(1000, monkeypatch).run(*[answer] * CASES) == 1


def test_threads_that_compile_have_the_time_to() -> None:
    limit = EndsInTime(Turns(1), 0.0)
    assert limit.compiles
    assert limit.seconds == COLD_S
    limit.answers = {}  # of workers: nothing is known yet
    assert not limit.compiles
    assert limit.seconds == COLD_S


def test_who_waits_is_left_out_when_the_time_has_come(monkeypatch: MonkeyPatch) -> None:
    host, ended = Host(1, monkeypatch), list[float]()
    host.limit.end_workers = lambda: ended.append(host.now)
    assert host.limit.begins(CASE)
    assert host.limit.begins(CASE)  # the second: the first has ended
    host.limit.wait(Kernel(host, KNOWN))
    host.now = WARM_S
    with pytest.raises(schedule.OutOfTimeError):
        host.limit.wait(Kernel(host, KNOWN))
    host.answers[COMPILED] += 1
    host.limit.wait(Kernel(host, KNOWN))
    host.now = COLD_S - 0.4
    with pytest.raises(schedule.OutOfTimeError):
        host.limit.wait(Kernel(host, COMPILED))
    assert host.now == pytest.approx(COLD_S - 0.09 - 0.18)  # as long as there was time
    assert ended == [host.now]  # workers: in an 8th of a processor others take 2 s to give up
    assert host.answers == {KNOWN: 3, COMPILED: 1}


def test_workers_are_there_for_the_first_check_on_any_host(monkeypatch: MonkeyPatch) -> None:
    host, first = Host(1, monkeypatch), threading.Thread()
    host.limit.end_workers = lambda: pytest.fail("the first check waits for them")
    first.run = lambda: None if host.limit.begins(CASE) else pytest.fail("not begun")
    first.start()
    first.join()
    host.now = COLD_S
    with pytest.raises(schedule.OutOfTimeError):
        host.limit.wait(Kernel(host, COMPILED))


def test_who_was_begun_in_time_and_waits_for_nothing_is_made(monkeypatch: MonkeyPatch) -> None:
    host, there = Host(1, monkeypatch), Future[None]()
    there.set_result(None)
    host.answers[KNOWN] += 1
    host.now = WARM_S
    host.limit.wait(there)
    with pytest.raises(schedule.OutOfTimeError):
        host.limit.wait(Kernel(host, KNOWN))
    host.answers[COMPILED] += 1
    host.limit.wait(there)
    host.now = COLD_S  # it may have waited before
    with pytest.raises(schedule.OutOfTimeError):
        host.limit.wait(there)


def test_the_first_is_a_quick_check(monkeypatch: MonkeyPatch) -> None:
    host = Host(1000, monkeypatch)
    assert not host.limit.begins(CASE._replace(op="orpo_loss"))  # it may wait for many kernels
    assert host.limit.begins(CASE)
    assert not host.limit.begins(CASE)


def test_says_how_to_check_the_rest(monkeypatch: MonkeyPatch) -> None:
    host = Host(1, monkeypatch)
    host.answers[KNOWN] += 1
    (warm,) = selftest._left_out([CASE], host.limit)
    assert "no time was left within 5 s" in warm
    assert "run this with --seconds 0" in warm  # again, as many would be left out
    host.answers[COMPILED] += 1
    (cold,) = selftest._left_out([CASE], host.limit)
    assert "no time was left within 20 s" in cold
    assert "run this again (what was compiled is remembered)" in cold


@pytest.mark.parametrize("answers", [{}, {KNOWN: 1}, {KNOWN: 1, COMPILED: 1}])
def test_another_check_is_begun_where_one_waits_for_a_compiler(answers: dict[str, int]) -> None:
    turns, begun = Turns(1), threading.Event()
    limit = EndsInTime(turns, schedule.perf_counter())
    limit.answers = answers

    def begin() -> None:
        with turns.taken():
            begun.set()

    class Compiling(Future[None]):
        def result(self, timeout: float | None = None) -> None:
            compiles = COMPILED in answers
            assert begun.wait(10 if compiles else 0.05) == compiles

    other = threading.Thread(target=begin)
    with turns.taken():
        other.start()
        limit.wait(Compiling())
    other.join()


def test_a_turn_is_as_long_as_one_works(monkeypatch: MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(schedule, "perf_counter", lambda: now[0])
    turns = Turns(2)
    with turns.taken():
        now[0] = 2.0
        for lends in (True, False):
            with turns.waiting(lends=lends):
                now[0] += 10.0
        assert turns.longest() == 2.0
        now[0] += 3.0
        assert turns.longest() == 3.0  # so far
    now[0] += 10.0
    assert turns.longest() == 3.0


def test_without_a_limit_a_kernel_is_waited_for(monkeypatch: MonkeyPatch) -> None:
    host = Host(1000, monkeypatch)
    Limit(None, host.plan.turns).wait(Kernel(host, COMPILED))
    assert host.answers == {COMPILED: 1}
