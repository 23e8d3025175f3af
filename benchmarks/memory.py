"""Peak memory of one step over its inputs, in a process of its own and untimed.

On a CPU it is resident memory: the child makes the inputs, warms up (imports, compilation, the
libraries' own buffers), hands freed memory back, resets the kernel's high-water mark and runs the
step; peak = high-water mark - resident memory before. On a GPU it is the allocator's statistics
around a second call, in the same process as the timing.

Children come from a fork server that has imported the libraries once, so a figure costs a second or
two. Results and gradients are part of the peak; `gradient_bytes` says how much of it they are.
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import resource
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.heads import Case
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.steps import Step
from benchmarks.workloads import make_workload

PRELOAD = [
    "benchmarks.memory",
    "trl.experimental.orpo",
    "trl.kernels",
    "liger_kernel.chunked_loss",
    "cut_cross_entropy",
]
TIMEOUT_S = 300
STATUS = Path("/proc/self/status")


def peak_in_child(case: Case, implementation: str, *, tiny: bool = False) -> dict[str, Any]:
    """Peak bytes over the inputs of one CPU step, measured in a fresh process.

    Returns:
        `peak_bytes`, `gradient_bytes`, `method`; or `error`, a sentence, when the child failed.
    """
    # glibc raises its mmap threshold as blocks are freed, and then keeps blocks of up to 32 MiB
    # resident; it reads this when the server starts.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "131072")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, case.as_dict(), implementation, tiny))
    child.start()
    theirs.close()
    try:
        if not mine.poll(TIMEOUT_S):
            return {"error": f"no answer within {TIMEOUT_S} s"}
        return dict(mine.recv())
    except EOFError:
        return {"error": f"the child ended with exit code {child.exitcode}"}
    finally:
        if child.is_alive():
            child.join(timeout=5)
        if child.is_alive():
            child.kill()
        child.join()


def _child(connection: Connection, case: dict[str, Any], implementation: str, tiny: bool) -> None:
    try:
        result = measure_peak_cpu(Case.from_dict(case), implementation, tiny=tiny)
    except Exception as error:  # whatever a peer raises is the finding
        result = {"error": f"{type(error).__name__}: {error}"[:300]}
    connection.send(result)
    connection.close()


def measure_peak_cpu(case: Case, implementation: str, *, tiny: bool = False) -> dict[str, Any]:
    """The same in this process: only meaningful where nothing else runs."""
    found = IMPLEMENTATIONS[implementation]
    # A compiled step is warmed up at its own shape, the others at a tiny one: a run takes seconds.
    small = Step(found, make_workload(replace(case, sizes=None), "cpu", tiny=True), case.mode)
    small.run()
    step = Step(found, make_workload(case, "cpu", tiny=tiny), case.mode)
    if found.compiled:
        step.run()
        step.clear()
    peak = HighWaterMark()
    with peak:
        step.run()
    return {
        "peak_bytes": peak.peak_bytes,
        "gradient_bytes": step.gradient_bytes,
        "method": peak.method,
    }


def measure_peak_cuda(step: Step) -> dict[str, Any]:
    """Peak bytes over the inputs of a step that has run before, from CUDA's caching allocator."""
    step.clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return {
        "peak_bytes": peak,
        "gradient_bytes": step.gradient_bytes,
        "method": "torch.cuda.max_memory_allocated",
    }


class HighWaterMark:
    """Context manager: `peak_bytes`, the growth of resident memory while it was entered.

    Linux can reset the high-water mark (VmHWM); where it cannot (other systems, some containers),
    a thread samples resident memory every millisecond, which misses shorter peaks, and `method`
    says so.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self.method = ""
        self._sampler = contextlib.ExitStack()

    def __enter__(self) -> "HighWaterMark":
        gc.collect()
        _return_freed_memory()
        self._exact = _reset_high_water_mark()
        self.method = "VmHWM" if self._exact else "sampled RSS"
        self._before = _status_bytes("VmRSS")
        if not self._exact:
            self._samples = [self._before]
            self._sampler.enter_context(_sampling(self._samples))
        return self

    def __exit__(self, *exc: object) -> None:
        self._sampler.close()
        top = _status_bytes("VmHWM") if self._exact else max(self._samples)
        self.peak_bytes = max(0, top - self._before)


def _reset_high_water_mark() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    # A container may take the write and ignore it.
    return _status_bytes("VmHWM") <= _status_bytes("VmRSS") + (8 << 20)


def _status_bytes(field: str) -> int:
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for line in STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _return_freed_memory() -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


@contextlib.contextmanager
def _sampling(samples: list[int]) -> Iterator[None]:
    stop = threading.Event()

    def sample() -> None:
        while not stop.is_set():
            samples.append(_status_bytes("VmRSS"))
            time.sleep(0.001)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
