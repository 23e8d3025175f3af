"""The processes that compile, and what they and the one that launches both do of Triton's.

A worker is a fork of a fork, which is made before anything of Triton is imported, and which forks
all of them when the first is needed. None of them touches a device. A kernel is compiled into
Triton's cache on disk, under the key that the process that launches looks for.
"""

import contextlib
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import pkgutil
import signal
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from time import perf_counter
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

from orpo_kernels import kernels

_BUSY = 2  # processors at first: of the process that imports, and the one that hashes
COMPILED, KNOWN, FAILED = "compiled", "known", "failed"  # what workers answer


class Specialisation(NamedTuple):
    """What a worker is told of a kernel: where it stands, Triton's JSON of it, the target."""

    module: str
    name: str
    data: str
    target: Any


def load_kernels() -> float:
    """Imports Triton and every kernel; the time when that was done, of `perf_counter`.

    Triton's key of a kernel depends on which of the functions that it calls were hashed before it
    (3.6 and 3.9: `DependenciesFinder._update_hash` takes over what they use before it hashes them).
    All are hashed here, in one order, so that workers and threads look under the same key.
    """
    from triton.runtime.jit import JITFunction

    modules = [
        importlib.import_module(f"{kernels.__name__}.{each.name}")
        for each in pkgutil.iter_modules(kernels.__path__)
    ]
    imported = perf_counter()
    for module in modules:
        for function in list(vars(module).values()):
            if isinstance(function, JITFunction):
                function.cache_key  # noqa: B018 - made when asked for
    return imported


def hash_triton() -> str | None:
    """Triton's hash of itself, part of every key: made once, when asked for, in 0.3 s."""
    with contextlib.suppress(Exception):  # elsewhere in another version: then when asked for
        return str(importlib.import_module("triton.runtime.cache").triton_key())
    return None


def give_hash(made: Callable[[], str]) -> Callable[[], str]:
    """Has Triton call `made` for its hash of itself, as it does in processes of its own.

    Returns:
        What it called before.
    """
    cache = vars(importlib.import_module("triton.runtime.cache"))
    before: Callable[[], str] = cache["triton_key"]
    cache["triton_key"] = made
    return before


def forked(count: int) -> tuple[Any, Connection, list[Connection]]:
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
    """Says Triton's hash, forks a worker for each connection when told to, and ends them."""
    for each in others:  # copies of the other ends would keep them open
        each.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever asks is told, and ends the workers
    warnings.simplefilter("ignore")  # Triton's are said by the process that launches
    workers: list[int] = []
    with contextlib.suppress(EOFError, OSError):
        control.send(hash_triton())  # once for all, and not in the time of who has the lock there
        if len(connections) > _BUSY:
            _load_compiler()
        control.recv()
        _load_compiler()
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
