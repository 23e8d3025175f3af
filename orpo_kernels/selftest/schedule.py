"""Runs the checks: one after another, or side by side where each first compiles its kernels.

Python's lock lets one thread work at a time, so that more of them than take turns gain nothing, and
wait for it. With workers that compile (`compilers.py`) many checks are begun, of which all but a
few wait for a kernel. Results do not depend on how many there are: a check draws from generators
of its own.
"""

import itertools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotDoneError
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from threading import get_ident
from time import perf_counter
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from orpo_kernels.kernels import runs_triton
from orpo_kernels.selftest import model
from orpo_kernels.selftest.compilers import MOST_WORKERS, asking, processors
from orpo_kernels.selftest.figures import Case
from orpo_kernels.selftest.forks import COMPILED, KNOWN
from orpo_kernels.selftest.report import Check, dtype_name

# On an H200 whose host has 16 processors: 4 threads took 12.7 s, 16 took 14.8 s, all compiled.
AT_WORK = 4
MOST_THREADS = 8  # where they compile themselves
# The command ends in, where kernels are compiled, and where every one was before.
COLD_S, WARM_S = 20.0, 5.0
# Importing transformers takes so many times as long as importing Triton and the kernels: 5 to 9;
# and so many times as long as that beside all other checks, whose Python is 2.0 s for its 1.4.
_TRANSFORMERS, _BESIDE_OTHERS = 8, 2.5
# As long takes the report; and, at most, ending 16 processes that compile: a few in a third of it.
_REPORTING, _CLOSING = 1 / 9, 1.0
# In bfloat16 before all others: what a training step launches, and an evaluation.
_FIRST = (
    ("orpo_loss", "token mean, padded, an empty side"),
    ("linear_logps", "trainable head, whole rows"),
    ("linear_logps", "frozen head"),
)
# By what their kernels take to be compiled, the longest last.
_SLOW = ("orpo_loss", "linear_logps", "slot_gradient", "linear_lse", "sparse_token_logps")


class Turns:
    """Threads that take turns: so many are at work at a time."""

    def __init__(self, count: int) -> None:
        """`count` of them."""
        self._changed, self._free, self._resuming = threading.Condition(), count, 0
        self._since = dict[int, float]()  # of each thread at work
        self._longest = 0.0

    def longest(self) -> float:
        """Seconds that one was, or has been, at work without waiting."""
        with self._changed:
            now = perf_counter()
            return max([self._longest, *(now - since for since in self._since.values())])

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within, this thread is at work."""
        with self._changed:
            self._changed.wait_for(lambda: self._free > 0 and self._resuming == 0)
            self._take()
        try:
            yield
        finally:
            self._give_back()

    @contextmanager
    def waiting(self, *, lends: bool = True) -> Iterator[None]:
        """Within, this thread waits, and afterwards it is before those that begin.

        Args:
            lends: whether another is at work meanwhile.
        """
        if get_ident() not in self._since:  # none of ours
            yield
            return
        self._give_back(lends)
        try:
            yield
        finally:
            with self._changed:
                self._resuming += lends
                self._changed.wait_for(lambda: self._free >= lends)
                self._resuming -= lends
                self._take(lends)
                self._changed.notify_all()

    def _take(self, turns: int = 1) -> None:
        self._free -= turns
        self._since[get_ident()] = perf_counter()

    def _give_back(self, turns: int = 1) -> None:
        with self._changed:
            worked = perf_counter() - self._since.pop(get_ident())
            self._longest = max(self._longest, worked)
            self._free += turns
            self._changed.notify_all()


class Plan(NamedTuple):
    """How the checks of a run share the machine.

    Attributes:
        threads: checks that are begun at a time.
        turns: of them, which are at work; None: one after another.
        workers: processes that compile beside them.
    """

    threads: int = 1
    turns: Turns | None = None
    workers: int = 0


ONE_BY_ONE = Plan()


def plan_of(device: torch.device, *, forks: bool) -> Plan:
    """One check after another, but where Triton compiles.

    Args:
        device: where the checks compute.
        forks: whether workers can be had.
    """
    if not runs_triton(device, torch.float32):
        return ONE_BY_ONE
    if not forks:
        threads = min(MOST_THREADS, processors())
        return Plan(threads, Turns(threads))
    workers = min(MOST_WORKERS, processors())
    return Plan(workers + AT_WORK, Turns(AT_WORK), workers)


class OutOfTimeError(Exception):
    """What a check is left out with whose kernel is not compiled in time."""


class Limit:
    """When no check is begun any more."""

    loading_seconds = 0.0  # that importing Triton and the kernels took in this process
    # How many of each the workers have given so far; where there are none, the threads compile.
    answers: Mapping[str, int] = MappingProxyType({COMPILED: 0})
    end_workers: Callable[[], None] | None = None

    def __init__(
        self, seconds: float | None, turns: Turns | None, start: float | None = None
    ) -> None:
        """None is begun after so many seconds.

        Args:
            seconds: None: all are begun.
            turns: of the threads that check.
            start: when they begin to count; None: now.
        """
        self._seconds, self._turns = seconds, turns
        self._start = perf_counter() if start is None else start

    @property
    def seconds(self) -> float | None:
        """None: there is no limit."""
        return self._seconds

    @property
    def compiles(self) -> bool:
        """Whether kernels are compiled; also where nothing is known of them."""
        return True

    @property
    def import_seconds(self) -> float:
        """How long transformers takes to be imported, about; 0 where that is not known."""
        return _TRANSFORMERS * self.loading_seconds

    def begins(self, case: Case) -> bool:
        """Whether there is time for this one."""
        return self.seconds is None or self._spent() <= self.seconds

    def waits(self, case: Case) -> bool:
        """Whether it imports transformers first."""
        return case.op == "fuse_head" and "transformers.modeling_utils" not in sys.modules

    def comes_last(self, case: Case) -> bool:
        """Whether all others are begun before it, whatever their order."""
        return False

    def pause(self, *, lends: bool = True) -> AbstractContextManager[None]:
        """Within, this thread waits, and lends its turn to another."""
        return nullcontext() if self._turns is None else self._turns.waiting(lends=lends)

    def wait(self, done: Future[Any]) -> None:
        """For a kernel."""
        if not done.done():
            with self.pause():
                done.result()

    def _spent(self) -> float:
        return perf_counter() - self._start


class EndsInTime(Limit):
    """None is begun that may end after `WARM_S`, or `COLD_S` where kernels are compiled.

    How long one works is judged by what was seen in this run, on this host: at most as long as the
    longest so far without waiting; and half as long as importing Triton and the kernels took, which
    takes three times as long as the longest check. One that waits for a kernel when its time has
    come is left out. The first of the quick checks is made in any case.
    """

    def __init__(self, turns: Turns, start: float) -> None:
        """Counts from `start`."""
        super().__init__(COLD_S, turns, start)
        self._longest = turns.longest
        self._first: int | None = None  # thread, while it is at that

    @property
    def seconds(self) -> float:
        """It ends in."""
        return WARM_S if set(self.answers) == {KNOWN} else COLD_S

    @property
    def compiles(self) -> bool:
        """Whether any was."""
        return bool(set(self.answers) - {KNOWN})

    def begins(self, case: Case) -> bool:
        """Whether it will end in time."""
        if self._first is None and case.op not in _SLOW:
            self._first = get_ident()
            return True
        if self._first == get_ident():
            self._first = 0  # no thread's: that check has ended
        takes = self.import_seconds if self.waits(case) else 0.0
        if self.compiles:
            takes *= _BESIDE_OTHERS
        return takes < self._left(self.seconds)

    def comes_last(self, case: Case) -> bool:
        """Where kernels are compiled, it is imported meanwhile."""
        return self.waits(case) and not self.compiles

    def wait(self, done: Future[Any]) -> None:
        """For a kernel, as long as there is time.

        Raises:
            OutOfTimeError: there is none.
        """
        first = self._first == get_ident()
        if done.done() and not self.compiles:  # nothing is waited for: it was begun in time
            return
        # Where none is compiled, more checks at a time would only end later, all of them.
        with self.pause(lends=self.compiles):
            try:
                # What is waited for long is being compiled, even where all were there so far.
                done.result(None if first else max(0.0, self._left(COLD_S)))
            except NotDoneError:
                if self._first == 0 and self.end_workers is not None:
                    # Others that wait give up too, which takes seconds beside as many processes
                    # that compile as the host has processors, or more.
                    self.end_workers()
                raise OutOfTimeError from None
        if not first and self._left(self.seconds) < 0:
            raise OutOfTimeError

    def _left(self, seconds: float) -> float:
        """Seconds in which one may still go to work, to end within `seconds`."""
        works = max(self.loading_seconds / 2, self._longest())
        closing = _CLOSING if self.compiles else _REPORTING
        return seconds - self._spent() - works - closing * self.loading_seconds


def run(
    cases: Sequence[Case],
    device: torch.device,
    plan: Plan = ONE_BY_ONE,
    limit: Limit | None = None,
) -> tuple[list[Check], list[Case]]:
    """The checks in the order of the cases, and the cases that no time was left for.

    Args:
        cases: what to check.
        device: where they compute.
        plan: how many at a time.
        limit: when none is begun any more; None: all are.

    Returns:
        The checks, and the cases left out.
    """
    limit = limit or Limit(None, plan.turns)
    waiting, found, choosing = _order(cases, plan), dict[int, Check](), threading.Lock()
    begun = itertools.count()

    def choose() -> int | None:
        """The next that there is time for."""
        with choosing:
            for i in sorted(waiting, key=lambda i: limit.comes_last(cases[i])):
                if limit.begins(cases[i]):
                    waiting.remove(i)
                    asking.rank = next(begun)
                    return i
        return None

    def work() -> None:
        while True:
            # A thread takes a case when it is its turn: the same few do where nothing is waited
            # for, and only they have what cuBLAS keeps for a thread.
            with plan.turns.taken() if plan.turns is not None else nullcontext():
                i = choose()
                if i is None:
                    return
                check = _check(cases[i], device, limit)
                if check is not None:
                    found[i] = check

    if plan.threads == 1:
        work()
    else:
        _side_by_side(work, plan.threads, waiting)
    checks = [found[i] for i in sorted(found)]
    return checks, [case for i, case in enumerate(cases) if i not in found]


def _side_by_side(work: Callable[[], None], threads: int, waiting: list[int]) -> None:
    """In so many threads, with one of torch's each: problems this small gain nothing from more."""
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for each in [pool.submit(work) for _ in range(threads)]:
                each.result()
        finally:
            waiting.clear()  # interrupted: what was begun ends, and nothing more is begun


def _order(cases: Sequence[Case], plan: Plan) -> list[int]:
    """So that what a limit leaves out is what is missed least.

    bfloat16, which most train in, before the others; of it what a training step launches; of each
    dtype, every op once before any is checked in other ways, and the quick ones first; last what
    imports much.
    """
    kinds = [(case.op, case.setting.dtype) for case in cases]

    def urgency(i: int) -> tuple[bool, int, bool, bool, int]:
        (op, dtype), case = kinds[i], (cases[i].op, cases[i].name)
        first = _FIRST.index(case) if case in _FIRST and dtype == torch.bfloat16 else len(_FIRST)
        slow = _SLOW.index(op) + 1 if op in _SLOW else 0
        return dtype != torch.bfloat16, first, op == "fuse_head", kinds[i] in kinds[:i], slow

    order = range(len(cases))
    return sorted(order, key=urgency) if plan.threads > 1 else list(order)


def _check(case: Case, device: torch.device, limit: Limit) -> Check | None:
    """None where it is left out."""
    with _surroundings(device):
        if limit.waits(case):
            with limit.pause():
                model.load()
        return _checked(case)


@contextmanager
def _surroundings(device: torch.device) -> Iterator[None]:
    """What a check finds, whatever its caller has set: these belong to each thread."""
    with ExitStack() as stack:
        # Inputs and truths are made on the CPU, whatever the caller's default device. While one is
        # set, every call of torch takes microseconds more.
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        # Else the backwards of all checks share one thread of autograd's for each GPU, in which
        # every kernel that one of them compiles is waited for by the others.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield


def _checked(case: Case) -> Check | None:
    labels = (case.op, case.name, dtype_name(case.setting.dtype))
    try:
        figures = case.run()
    except OutOfTimeError:
        return None
    except Exception as error:  # whatever a broken kernel raises is a finding; the rest still runs
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Check(*labels, False, "", float("nan"), 0.0, f"raised {reason}")
    worst = max(figures, key=lambda figure: figure.used)
    wrong = [
        f"{each.what} is off by {each.error:.1e}, at most {each.limit:.1e} is right"
        for each in figures
        if not each.passed
    ]
    return Check(*labels, not wrong, worst.what, worst.error, worst.limit, "; ".join(wrong))
