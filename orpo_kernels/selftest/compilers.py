"""Compiles kernels in processes beside this one: Triton's compiler is mostly Python, and a lock's.

A launch whose kernel was not compiled before in this process asks Triton's `jit_cache_hook` first.
The hook here looks whether it is in Triton's cache on disk. If not, it hands the specialisation to
a worker, which compiles it into that cache, and lets the launch go on: Triton finds the binary
there, under the same key. What several threads ask for at a time is compiled once. Where Triton
also compiles a launcher in C (3.6: one for every signature), the worker makes that too. A call
makes most of its launches ready (`kernels/start.py`) before it makes the first: their kernels are
asked for then, and compiled side by side.

Workers are forks of a fork, which is made before this process has threads, or a context on a
device; none ever touches one. They are there from the first kernel on that is not in the cache.
Where none can be made, and for a kernel that a worker fails at, Triton compiles in the thread that
asks, as ever: what is wrong with a kernel is then raised there.
"""

import contextlib
import gc
import hashlib
import importlib
import json
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
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import torch

from orpo_kernels import kernels

MOST_WORKERS = 16
_SHARE = Path("/sys/fs/cgroup/cpu.max")  # microseconds of processors, and of the clock
_BUSY = 2  # processors at first: of the thread that imports, and the one that hashes
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
        self._found: set[Specialisation] = set()  # in Triton's cache, before any was asked for
        self._lock, self._wait, self._here = threading.Lock(), wait, threading.local()
        self._idle: queue.LifoQueue[Connection] = queue.LifoQueue()
        self._parent, self._control, self._all = _forked(count)
        self._begun, self._lost = False, 0
        for each in reversed(self._all):
            self._idle.put(each)  # the first is taken first, and those that are at home in Triton
        self._threads = ThreadPoolExecutor(count)  # each waits for a worker; not before the fork
        # Beside what is done until the first kernel is launched; it does not hold Python's lock.
        self._hashed = self._threads.submit(_hash_triton)

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
        known = kernel not in self._asked and is_cached(fn, compile, target)
        with self._lock:
            if known and kernel not in self._asked:
                self.answers[KNOWN] += kernel not in self._found
                self._found.add(kernel)
                return False
            if kernel not in self._asked:
                self._asked[kernel] = self._threads.submit(self._compile, kernel)
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
                    self._control.send(self._hashed.result())
        while self._lost < len(self._all) and self._parent.is_alive() and not self._control.closed:
            with contextlib.suppress(queue.Empty):
                return self._idle.get(timeout=1.0)
        return None

    def close(self) -> None:
        """Ends them, at once: what they are at was announced, and nobody has waited for it."""
        # None asks for the next when its worker ends, and none that lives is in the others' way.
        self._threads.shutdown(wait=False, cancel_futures=True)
        if not self._begun:
            self._parent.kill()
        self._control.close()
        self._parent.join()
        self._threads.shutdown()
        for each in self._all:
            each.close()


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


def load_kernels() -> float:
    """Imports Triton and every kernel; seconds that it took.

    Triton's key of a kernel depends on which of the functions that it calls were hashed before it
    (3.6 and 3.9: `DependenciesFinder._update_hash` takes over what they use before it hashes them).
    All are hashed here, in one order, so that workers and threads look under the same key.
    """
    start = perf_counter()
    from triton.runtime.jit import JITFunction

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


def _hash_triton() -> str | None:
    """Triton's hash of itself, part of every key: made once, when asked for, in 0.3 s."""
    with contextlib.suppress(Exception):  # elsewhere in another version: then when asked for
        return str(importlib.import_module("triton.runtime.cache").triton_key())
    return None


def _forked(count: int) -> tuple[Any, Connection, list[Connection]]:
    """A process that forks so many workers once told to, our end of its pipe, and of theirs.

    When ours is closed it ends them, and itself.
    """
    fork = multiprocessing.get_context("fork")
    (ours, *all_ours), (its, *theirs) = zip(*(fork.Pipe() for _ in range(count + 1)), strict=True)
    parent = fork.Process(target=_fork_workers, args=(its, theirs, [ours, *all_ours]), daemon=True)
    parent.start()
    for each in (its, *theirs):
        each.close()
    return parent, ours, all_ours


def _fork_workers(
    control: Connection, connections: list[Connection], others: list[Connection]
) -> None:
    """Forks a worker for each connection when told to, and ends them when there is nobody to."""
    for each in others:  # copies of the other ends would keep them open
        each.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks is told, and ends the workers
    warnings.simplefilter("ignore")  # Triton's are said by the process that launches
    workers: list[int] = []
    with contextlib.suppress(EOFError, OSError):
        if len(connections) > _BUSY:
            _load_compiler()
        of_triton = control.recv()
        _load_compiler()
        if of_triton is not None:  # as Triton gives it to processes that compile
            vars(sys.modules["triton.runtime.cache"])["triton_key"] = lambda: of_triton
        gc.freeze()
        gc.enable()  # of what they make
        for connection in connections:
            worker = os.fork()  # no more processes may be had: as many as there are
            if worker == 0:
                _serve(connection, [each for each in (control, *connections) if each != connection])
            workers.append(worker)
    for each in connections:
        each.close()
    with contextlib.suppress(EOFError, OSError):
        control.recv()
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    for worker in workers:
        os.waitpid(worker, 0)


def _load_compiler() -> None:
    load_kernels()
    importlib.import_module("triton.compiler.code_generator")


def _serve(connection: Connection, others: list[Connection]) -> NoReturn:
    """A worker's life: ends when the other end of its pipe is closed."""
    try:
        for each in others:
            each.close()
        while True:
            kernel = connection.recv()
            try:
                answer = COMPILED if compile_into_cache(kernel) else KNOWN
            except Exception:  # it is raised again, where it is asked for
                answer = FAILED
            connection.send(answer)
    finally:
        os._exit(0)


def is_cached(kernel: Any, told: dict[str, Any], target: Any) -> bool:
    """Whether a kernel is in Triton's cache on disk, where Triton will look for it.

    Args:
        kernel: as Triton names it to its hook.
        told: what Triton tells it of the specialisation.
        target: what it is compiled for.

    Returns:
        False also where this version of Triton looks in another way: then a worker finds it.
    """
    from triton import knobs

    compiler = importlib.import_module("triton.compiler.compiler")
    with contextlib.suppress(Exception):
        source = compiler.ASTSource(
            kernel.jit_function, told["signature"], told["constants"], told["configs"][0]
        )
        backend = compiler.make_backend(target)
        given = json.loads(told["specialization_data"])["options"] | source.parse_options()
        options = backend.parse_options(
            {name: tuple(each) if isinstance(each, list) else each for name, each in given.items()}
        )
        key = compiler.get_cache_key(
            source, backend, options, env_vars=compiler.get_cache_invalidating_env_vars()
        )
        cache = compiler.get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
        files = cache.get_group(f"{source.name[:150]}.json")
        return bool(files) and not knobs.compilation.always_compile
    return False


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
