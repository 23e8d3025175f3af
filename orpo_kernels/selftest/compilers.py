"""Has kernels compiled in processes beside this one: Triton's compiler is Python, and a lock's.

A launch whose kernel was not compiled before in this process asks Triton's `jit_cache_hook` first.
The hook here looks whether it is in Triton's cache on disk. If not, it hands the specialisation to
a worker, which compiles it into that cache, and lets the launch go on: Triton finds the binary
there, under the same key. What several threads ask for at a time is compiled once. Where Triton
also compiles a launcher in C (3.6: one for every signature), the worker makes that too. A call
makes most of its launches ready (`kernels/start.py`) before it makes the first: their kernels are
asked for then, and compiled side by side.

Workers (`forks.py`) are there from the first kernel on that is not in the cache. What was asked for
by the check that was begun first is compiled first. Where none can be made, and for a kernel that a
worker fails at, Triton compiles in the thread that asks, as ever: what is wrong with a kernel is
then raised there.
"""

import contextlib
import heapq
import os
import queue
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from orpo_kernels import kernels
from orpo_kernels.selftest import forks
from orpo_kernels.selftest.forks import FAILED, KNOWN, Specialisation

MOST_WORKERS = 16
_SHARE = Path("/sys/fs/cgroup/cpu.max")  # microseconds of processors, and of the clock
_MOST_SECONDS = 30.0  # of one kernel, after which the workers are given up
# Parameters of kernels that are floats; numbers of other names are integers.
FLOATS = {
    "eps", "heavy", "largest_slope", "limit", "log2_scale", "logit_scale", "most_lost", "ratio",
    "rounding", "scale", "softcap", "threshold",
}  # fmt: skip

asking = threading.local()  # `rank`: of what this thread checks, in the order they were begun


class Workers:
    """Processes that compile."""

    def __init__(self, count: int, wait: Callable[[Future[Any]], Any] = Future.result) -> None:
        """Forks what forks them, when one is needed.

        Args:
            count: how many.
            wait: for one of them, in the thread that launches.
        """
        self.answers: Counter[str] = Counter()
        self._asked: dict[Specialisation, Future[None]] = {}
        self._waiting: list[tuple[int, int, Specialisation]] = []  # the most urgent first
        self._found: set[Specialisation] = set()  # in Triton's cache, before any was asked for
        self._lock, self._wait, self._here = threading.Lock(), wait, threading.local()
        self._idle: queue.LifoQueue[Connection] = queue.LifoQueue()
        self._parent, self._control, self._all = forks.forked(count)
        self._begun, self._closed, self._lost = False, False, 0
        self._of_triton: Callable[[], str] | None = None
        for each in reversed(self._all):
            self._idle.put(each)  # the first is taken first, and those that are at home in Triton
        self._threads = ThreadPoolExecutor(count)  # each waits for a worker; not before the fork
        self._hashed = self._threads.submit(self._take_hash)

    def _take_hash(self) -> None:
        """Has Triton know its hash of itself, which takes a thread of this process seconds.

        Of each megabyte it would wait for Python's lock, while what is imported holds that.
        """
        told = None
        with contextlib.suppress(EOFError, OSError):
            told = self._control.recv()
        if told is not None:
            self._of_triton = forks.give_hash(lambda: told)
        elif not self._closed:
            forks.hash_triton()

    def __call__(self, *, fn: Any, compile: dict[str, Any], **_rest: Any) -> bool:
        """Triton's hook: returns once the kernel is in Triton's cache, or cannot be put there.

        Returns:
            Whether Triton is not to compile it, nor to launch it: of what is only announced, and
            must be compiled.
        """
        from triton.runtime import driver

        target = driver.active.get_current_target()
        kernel = Specialisation(fn.module, fn.name, compile["specialization_data"], target)
        self._wait(self._hashed)
        known = kernel not in self._asked and forks.is_cached(fn, compile, target)
        with self._lock:
            if known and kernel not in self._asked:
                self.answers[KNOWN] += kernel not in self._found
                self._found.add(kernel)
                return False
            if kernel not in self._asked:
                rank = getattr(asking, "rank", 0)
                heapq.heappush(self._waiting, (rank, len(self._asked), kernel))
                self._asked[kernel] = Future()
                self._threads.submit(self._compile_next)
        if getattr(self._here, "announces", False):
            return True
        self._wait(self._asked[kernel])
        return False

    def announce(self, start: Any) -> None:
        """Has the kernel of a `Start` compiled before it is launched.

        The numbers are not known yet, but which of them are integers: all, but for a few names. A
        wrong guess would compile a kernel that nobody launches.
        """
        from orpo_kernels.kernels import tuning

        if (
            set(self.answers) == {KNOWN} or start.constants.get("RAGGED") is False
        ):  # hardly a call of the checks launches both
            return
        kernel = start.kernel
        names = [each.name for each in kernel.params if not each.is_constexpr]
        numbers = (0.5 if name in FLOATS else 1 for name in names[len(start.tensors) :])
        self._here.announces = True
        try:
            # What is wrong with it is raised when it is launched.
            with tuning.guard(start.device), contextlib.suppress(Exception):
                options = {**start.constants, **start.options}
                kernel.warmup(*start.tensors, *numbers, grid=(1,), **options)
        finally:
            self._here.announces = False

    def _compile_next(self) -> None:
        with self._lock:
            kernel = heapq.heappop(self._waiting)[-1]
        try:
            self._compile(kernel)
        finally:
            self._asked[kernel].set_result(None)

    def _compile(self, kernel: Specialisation) -> None:
        worker = self._take()
        if worker is None:
            self.answers[FAILED] += 1
            return
        try:
            worker.send(kernel)
            if not worker.poll(_MOST_SECONDS):
                raise TimeoutError
            self.answers[worker.recv()] += 1
        except Exception as error:  # the thread compiles
            self.answers[FAILED] += 1
            with self._lock:
                self._lost += 1
            if isinstance(error, TimeoutError):
                # What one is stuck in, a lock that was held while it was forked, all are.
                self._control.close()
            return
        self._idle.put(worker)

    def _take(self) -> Connection | None:
        """The next that is idle, or None where none is alive."""
        with self._lock:
            if not self._begun:
                self._begun = True
                with contextlib.suppress(OSError):  # its other end is gone
                    self._control.send(None)
        while self._lost < len(self._all) and self._parent.is_alive() and not self._control.closed:
            with contextlib.suppress(queue.Empty):
                return self._idle.get(timeout=1.0)
        return None

    def end(self) -> None:
        """Ends them, without waiting for it: whoever asks has to compile by itself."""
        with self._lock:
            if self._begun:
                self._control.close()

    def close(self) -> None:
        """Ends them, at once: what they are at was announced, and nobody has waited for it."""
        # None asks for the next when its worker ends, and none that lives is in the others' way.
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._closed = True
        if self._begun:
            self._control.close()
        else:
            self._parent.kill()
        self._parent.join()
        self._threads.shutdown()
        for each in (self._control, *self._all):
            each.close()
        if self._of_triton is not None:
            forks.give_hash(self._of_triton)


@contextmanager
def compiling_beside(
    count: int, wait: Callable[[Future[Any]], Any] = Future.result
) -> Iterator[Workers | None]:
    """Within, so many workers compile what is launched.

    Yields None where another has the hook, or no process may be had.

    Args:
        count: processes, forked now: `can_fork` says whether they may be.
        wait: for one of them, in the thread that launches.
    """
    before = sys.modules.get("triton.knobs")
    if before is not None and before.runtime.jit_cache_hook is not None:
        yield None
        return
    try:
        workers = Workers(count, wait)
    except OSError:
        yield None
        return
    from triton import knobs

    from orpo_kernels.kernels import start

    knobs.runtime.jit_cache_hook, start.announced = workers, workers.announce
    try:
        yield workers
    finally:
        knobs.runtime.jit_cache_hook = start.announced = None
        workers.close()


def processors() -> int:
    """Those this process may use: of a container, no more than its share of the host's."""
    affine = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if affine else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no Linux, an older one, or no limit ("max")
        quota, period = map(int, _SHARE.read_text().split())
        count = min(count, max(1, round(quota / period)))
    return count


def can_fork(device: torch.device) -> bool:
    """Whether workers can be made: Triton compiles for the device, and nothing has used it yet."""
    if device.type != "cuda" or not kernels.runs_triton(device, torch.float32):
        return False
    available = torch.cuda.is_available() and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return available and sys.platform.startswith("linux")
