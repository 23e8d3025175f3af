"""Compiles kernels in processes beside this one: Triton's compiler is mostly Python, and a lock's.

A launch whose kernel was not compiled before in this process asks Triton's `jit_cache_hook` first.
The hook here hands the specialisation to a worker, which compiles it into Triton's cache on disk,
and lets the launch go on: Triton finds the binary there, under the same key. What several threads
ask for at a time is compiled once. Where Triton also compiles a launcher in C (3.6: one for every
signature), the worker makes that too. A call makes most of its launches ready (`kernels/start.py`)
before it makes the first: their kernels are asked for then, and compiled side by side.

A worker is a fork, made before this process has a context on a device, and never touches one.
Where none can be made, and for a kernel that a worker fails at, Triton compiles in the thread that
asks, as ever: what is wrong with a kernel is then raised there.
"""

import contextlib
import gc
import importlib
import multiprocessing
import os
import pkgutil
import queue
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import Connection
from time import perf_counter
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from orpo_kernels import kernels

MOST_WORKERS = 16
_MOST_SECONDS = 30.0  # of one kernel, after which the workers are given up
# Parameters of kernels that are floats; numbers of other names are integers.
FLOATS = {
    "eps", "heavy", "largest_slope", "limit", "log2_scale", "logit_scale", "most_lost", "ratio",
    "rounding", "scale", "softcap", "threshold",
}  # fmt: skip
COMPILED, KNOWN, FAILED = "compiled", "known", "failed"  # what workers answer


class Specialisation(NamedTuple):
    """What a worker is told of a kernel: where it stands, Triton's JSON of it, the target."""

    module: str
    name: str
    data: str
    target: Any


class _Worker(NamedTuple):
    process: Any
    connection: Connection


class Workers:
    """Processes that compile."""

    def __init__(self, count: int, wait: Callable[[Future[Any]], Any] = Future.result) -> None:
        """Forks them.

        Args:
            count: how many.
            wait: for one of them, in the thread that launches.
        """
        self.answers: Counter[str] = Counter()
        self._asked: dict[Specialisation, Future[None]] = {}
        self._lock, self._wait, self._here = threading.Lock(), wait, threading.local()
        self._idle: queue.LifoQueue[_Worker] = queue.LifoQueue()
        self._all: list[_Worker] = []
        with contextlib.suppress(OSError):  # no more processes may be had: as many as there are
            for _ in range(count):
                self._all.append(_forked([each.connection for each in self._all]))
        for each in reversed(self._all):
            self._idle.put(each)  # the first is taken first, and those that are at home in Triton
        self._threads = ThreadPoolExecutor(count)  # each waits for a worker; not before the forks
        # Beside what is done until the first kernel is launched; it needs no lock.
        self._hashed = self._threads.submit(_hash_triton)

    def __call__(self, *, fn: Any, compile: dict[str, Any], **_rest: Any) -> bool:
        """Triton's hook: returns once the kernel is in Triton's cache, or cannot be put there.

        Returns:
            Whether Triton is not to compile it, nor to launch it: of what is only announced.
        """
        from triton.runtime import driver

        target = driver.active.get_current_target()
        kernel = Specialisation(fn.module, fn.name, compile["specialization_data"], target)
        with self._lock:
            if kernel not in self._asked:
                self._asked[kernel] = self._threads.submit(self._compile, kernel)
        if getattr(self._here, "announces", False):
            return True
        self._wait(self._asked[kernel])
        self._wait(self._hashed)
        return False

    def announce(self, start: Any) -> None:
        """Has the kernel of a `Start` compiled before it is launched.

        The numbers are not known yet, but which of them are integers: all, but for a few names. A
        wrong guess would compile a kernel that nobody launches.
        """
        from orpo_kernels.kernels import tuning

        if start.constants.get("RAGGED") is False:  # hardly a call of the checks launches both
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

    def _compile(self, kernel: Specialisation) -> None:
        worker = self._take()
        if worker is None:
            self.answers[FAILED] += 1
            return
        try:
            worker.connection.send(kernel)
            if not worker.connection.poll(_MOST_SECONDS):
                raise TimeoutError
            self.answers[worker.connection.recv()] += 1
        except Exception as error:  # the thread compiles
            self.answers[FAILED] += 1
            # What one is stuck in, a lock that was held while it was forked, all are.
            for each in self._all if isinstance(error, TimeoutError) else [worker]:
                each.process.kill()
            return
        self._idle.put(worker)

    def _take(self) -> _Worker | None:
        """The next that is idle, or None where none is alive."""
        while any(each.process.is_alive() for each in self._all):
            with contextlib.suppress(queue.Empty):
                return self._idle.get(timeout=1.0)
        return None

    def close(self) -> None:
        """Ends them, at once: what they are at was announced, and nobody has waited for it."""
        # None asks for the next when its worker ends, and none that lives is in the others' way.
        self._threads.shutdown(wait=False, cancel_futures=True)
        for each in self._all:
            each.process.kill()
        for each in self._all:
            each.process.join()
        self._threads.shutdown()
        for each in self._all:
            each.connection.close()


@contextmanager
def compiling_beside(
    count: int, wait: Callable[[Future[Any]], Any] = Future.result
) -> Iterator[Workers | None]:
    """Within, so many workers compile what is launched; yields None where another has the hook.

    Args:
        count: processes, forked now: `can_fork` says whether they may be.
        wait: for one of them, in the thread that launches.
    """
    from triton import knobs

    from orpo_kernels.kernels import start

    if knobs.runtime.jit_cache_hook is not None:
        yield None
        return
    workers = Workers(count, wait)
    knobs.runtime.jit_cache_hook, start.announced = workers, workers.announce
    try:
        yield workers
    finally:
        knobs.runtime.jit_cache_hook = start.announced = None
        workers.close()


def processors() -> int:
    """Those this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def can_fork(device: torch.device) -> bool:
    """Whether workers can be made: Triton compiles for the device, and nothing has used it yet."""
    if device.type != "cuda" or not kernels.runs_triton(device, torch.float32):
        return False
    available = torch.cuda.is_available() and not torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return available and sys.platform.startswith("linux")


def load_kernels() -> float:
    """Imports Triton and every kernel, once, for the workers too; seconds that it took.

    Triton's key of a kernel depends on which of the functions that it calls were hashed before it
    (3.6 and 3.9: `DependenciesFinder._update_hash` takes over what they use before it hashes them).
    All are hashed here, in one order, so that workers and threads look under the same key.
    """
    start = perf_counter()
    from triton.runtime.jit import JITFunction

    importlib.import_module("triton.compiler.code_generator")
    modules = [
        importlib.import_module(f"{kernels.__name__}.{each.name}")
        for each in pkgutil.iter_modules(kernels.__path__)
    ]
    seconds = perf_counter() - start
    for module in modules:
        for function in list(vars(module).values()):
            if isinstance(function, JITFunction):
                function.cache_key  # noqa: B018 - made when asked for
    return seconds


def _hash_triton() -> None:
    """Triton's hash of itself, part of every key: made once, when asked for, in 0.25 s."""
    with contextlib.suppress(Exception):  # elsewhere in another version: then when asked for
        importlib.import_module("triton.runtime.cache").triton_key()


def _forked(others: list[Connection]) -> _Worker:
    """A new worker; `others` are this process's ends of the pipes of those before it."""
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_serve, args=(theirs, [*others, ours]), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _serve(connection: Connection, others: list[Connection]) -> None:
    """A worker's life: ends when the other end of its pipe is closed."""
    for each in others:  # copies of the others' ends would keep them open
        each.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks is told, and ends the workers
    warnings.simplefilter("ignore")  # Triton's are said by the process that launches
    gc.freeze()
    gc.enable()  # of what this process makes
    _hash_triton()  # before the first kernel is asked for
    while True:
        try:
            kernel = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = COMPILED if compile_into_cache(kernel) else KNOWN
        except Exception:  # it is raised again, where it is asked for
            answer = FAILED
        connection.send(answer)


def compile_into_cache(kernel: Specialisation) -> bool:
    """Compiles a kernel for a target, without a device, into Triton's cache on disk.

    Returns:
        Whether it was not there.
    """
    from triton import knobs
    from triton.runtime import driver

    found: list[bool] = []
    knobs.runtime.jit_cache_hook = None
    knobs.compilation.listener = lambda *, cache_hit, **_rest: found.append(cache_hit)
    target = kernel.target
    # All that is asked of a driver: for what to compile. A device is a key of what is kept of it.
    driver.set_active(
        SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: target)
    )
    function = getattr(importlib.import_module(kernel.module), kernel.name)
    _make_launcher(function.preload(kernel.data), target.backend)
    return found == [False]


def _make_launcher(compiled: Any, backend: str) -> None:
    """The launcher in C of a signature, where this version of Triton compiles one."""
    if backend != "cuda":
        return
    module = importlib.import_module("triton.backends.nvidia.driver")
    if hasattr(module, "make_launcher"):
        # Without the driver's library it is not linked; the thread that launches says so.
        with contextlib.suppress(Exception):
            module.CudaLauncher(compiled.src, compiled.metadata)
