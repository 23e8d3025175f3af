"""Runs the checks: one after another, or side by side where each first compiles its kernels.

Python's lock lets one thread work at a time, so that more of them than take turns gain nothing, and
wait for it. With workers that compile (`compilers.py`) many checks are begun, of which all but a
few wait for a kernel. Results do not depend on how many there are: a check draws from generators
of its own.
"""

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from time import perf_counter
from typing import NamedTuple

import torch

from orpo_kernels.kernels import runs_triton
from orpo_kernels.selftest.compilers import MOST_WORKERS, processors
from orpo_kernels.selftest.figures import Case
from orpo_kernels.selftest.report import Check, dtype_name

# On an H200 whose host has 16 processors: 4 threads took 12.7 s, 16 took 14.8 s, all compiled.
AT_WORK = 4
MOST_THREADS = 8  # where they compile themselves
WARM_S = 5.0  # a self-test ends in, where every kernel was compiled before
# Importing transformers takes so many times as long as importing Triton and the kernels: 5 to 9.
TRANSFORMERS = 8
# By what their kernels take to be compiled, the longest first.
_SLOW = ("sparse_token_logps", "linear_lse", "slot_gradient", "linear_logps", "orpo_loss")
_MANY = 8  # workers: with fewer, most kernels are waited for whatever comes first


class Turns:
    """Threads that take turns: so many are at work at a time."""

    def __init__(self, count: int) -> None:
        """`count` of them."""
        self._changed, self._here = threading.Condition(), threading.local()
        self._free, self._resuming = count, 0

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Within, this thread is at work."""
        with self._changed:
            self._changed.wait_for(lambda: self._free > 0 and self._resuming == 0)
            self._free -= 1
        self._here.taken = True
        try:
            yield
        finally:
            self._here.taken = False
            self._give_back()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, another is at work meanwhile; afterwards this one is before those that begin."""
        if not getattr(self._here, "taken", False):  # none of ours
            yield
            return
        self._give_back()
        try:
            yield
        finally:
            with self._changed:
                self._resuming += 1
                self._changed.wait_for(lambda: self._free > 0)
                self._resuming -= 1
                self._free -= 1
                self._changed.notify_all()

    def _give_back(self) -> None:
        with self._changed:
            self._free += 1
            self._changed.notify_all()


class Plan(NamedTuple):
    """How the checks of a run share the machine.

    Attributes:
        threads: checks that are begun at a time.
        turns: of them, which are at work.
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
        return Plan(min(MOST_THREADS, processors()))
    workers = min(MOST_WORKERS, processors())
    return Plan(workers + AT_WORK, Turns(AT_WORK), workers)


class Limit:
    """When no check is begun any more."""

    def __init__(
        self,
        seconds: float | None = None,
        *,
        unless: Callable[[], bool] = lambda: True,
        import_seconds: float = 0.0,
    ) -> None:
        """From now on.

        Args:
            seconds: none is begun after so many; None: all are.
            unless: whether kernels had to be compiled. Where none had to, all is checked at once
                but for what waits for transformers: that is imported only if it ends in `WARM_S`.
            import_seconds: how long that takes, about.
        """
        self.seconds, self.import_seconds = seconds, import_seconds
        self._start, self._unless = perf_counter(), unless

    def late(self, case: Case) -> bool:
        """Whether it is too late to begin this one."""
        spent = perf_counter() - self._start
        if self.seconds is None:
            return False
        return spent > self.seconds or (self.waits(case) and not self._can_wait(spent))

    def waits(self, case: Case) -> bool:
        """Whether it imports transformers first."""
        return case.op == "fuse_head" and "transformers.modeling_utils" not in sys.modules

    def _can_wait(self, spent: float) -> bool:
        return self._unless() or spent + self.import_seconds < WARM_S


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
    limit = limit or Limit()
    waiting, found = deque(_order(cases, plan)), dict[int, Check | None]()

    def work() -> None:
        while True:
            # A thread takes a case when it is its turn: the same few do where nothing is waited
            # for, and only they have what cuBLAS keeps for a thread.
            with plan.turns.taken() if plan.turns is not None else nullcontext():
                try:
                    i = waiting.popleft()
                except IndexError:
                    return
                found[i] = _unless_late(cases[i], device, limit)

    if plan.threads == 1:
        work()
    else:
        _side_by_side(work, plan.threads, waiting)
    checks = [each for i in range(len(cases)) if (each := found[i]) is not None]
    return checks, [case for i, case in enumerate(cases) if found[i] is None]


def _side_by_side(work: Callable[[], None], threads: int, waiting: deque[int]) -> None:
    """In so many threads, with one of torch's each: problems this small gain nothing from more."""
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for each in [pool.submit(work) for _ in range(threads)]:
                each.result()
        finally:
            waiting.clear()  # interrupted: what was begun ends, and nothing more is begun


def _order(cases: Sequence[Case], plan: Plan) -> list[int]:
    """bfloat16, which most train in, before the others; of each last what imports much.

    With many workers what takes longest is begun first, so that it is not what is waited for in the
    end. With few it comes last: a limit then leaves out the fewest.
    """

    def urgency(i: int) -> tuple[bool, bool, int]:
        op = cases[i].op
        slow = _SLOW.index(op) if op in _SLOW else len(_SLOW)
        late = slow if plan.workers >= _MANY else -slow
        return cases[i].setting.dtype != torch.bfloat16, op == "fuse_head", late

    order = range(len(cases))
    return sorted(order, key=urgency) if plan.threads > 1 else list(order)


def _unless_late(case: Case, device: torch.device, limit: Limit) -> Check | None:
    if limit.late(case):
        return None
    with _surroundings(device):
        return _checked(case)


@contextmanager
def _surroundings(device: torch.device) -> Iterator[None]:
    """What a check finds, whatever its caller has set: these belong to each thread."""
    with ExitStack() as stack:
        # Inputs and truths are made on the CPU, whatever the caller's default device.
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        # Else the backwards of all checks share one thread of autograd's for each GPU, in which
        # every kernel that one of them compiles is waited for by the others.
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield


def _checked(case: Case) -> Check:
    labels = (case.op, case.name, dtype_name(case.setting.dtype))
    try:
        figures = case.run()
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
