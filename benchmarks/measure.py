"""Timing and counting: paired rounds against the bare GEMM, CUDA events, GEMM passes.

`g` is the bare GEMM `H W^T` of the same N scored rows, dtype and device, in row chunks into a
preallocated buffer. Every timed round runs between two `g`; its ratio is taken to their mean, so
that a machine that slows down for a while slows both. On a GPU times come from CUDA events.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import settings
from benchmarks.turns import median_iqr
from benchmarks.workloads import Workload
from orpo_kernels.constants import IGNORE_INDEX

GEMM_ROWS = 256  # per chunk on a CPU; 1,024 rows are within 3 % of it
GEMM_BUFFER_BYTES = 2 << 30  # on a GPU: as many rows as fit
MIN_ROUNDS, MAX_ROUNDS = 3, 15
ROUND_BUDGET_S = 5.0  # per result on the main heads
SMALL_BUDGET_S = 1.5  # on the others
NAMED = 60  # letters of a kernel's name: those of templates are endless
LONG_S = 4.0  # a call that takes longer is timed twice
SLOW_S = 12.0  # this long: once, and not weighed again


def bare_gemm(workload: Workload) -> Callable[[], None]:
    """A call that multiplies the N scored rows with the head, and nothing else."""
    mask = workload.union_labels != IGNORE_INDEX
    rows = workload.hidden.detach()[mask]
    weight = workload.weight.detach()
    at_once = GEMM_ROWS
    if rows.is_cuda:
        at_once = max(GEMM_ROWS, GEMM_BUFFER_BYTES // (weight.shape[0] * weight.element_size()))
    buffer = rows.new_empty(min(at_once, len(rows)), weight.shape[0])

    def gemm() -> None:
        for chunk in rows.split(at_once):
            torch.mm(chunk, weight.t(), out=buffer[: len(chunk)])

    return gemm


class Stopwatch:
    """Seconds of one call: CUDA events on a GPU, the clock of the settings elsewhere."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.clock = settings.clock()

    def __call__(self, work: Callable[[], Any], ahead: Callable[[], Any] | None = None) -> float:
        """Run `work` and return the seconds it took.

        On a GPU `ahead` is started first, and not timed: the device is busy when `work` begins, as
        it is with the model's forward in a training step. Without it the device is idle until the
        host has prepared the first launch.
        """
        if not self.cuda:
            start = self.clock()
            work()
            return self.clock() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if ahead is not None:
            ahead()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3


@dataclass
class PairedRounds:
    """Seconds of the rounds, and of the bare GEMM before the first and after each."""

    rounds_s: list[float] = field(default_factory=list)
    gemm_s: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Medians and IQRs, in ms and in g; empty when nothing was timed."""
        around = zip(self.gemm_s, self.gemm_s[1:], strict=False)
        gemms = [(before + after) / 2 for before, after in around]
        ratios = [each / g for each, g in zip(self.rounds_s, gemms, strict=False)]
        if not ratios:
            return {}
        return {
            "time_ms": median_iqr([1e3 * each for each in self.rounds_s]),
            "gemm_ms": median_iqr([1e3 * each for each in self.gemm_s]),
            "ratio_to_gemm": median_iqr(ratios),
            "rounds": len(ratios),
        }


def rounds_for(first_s: float, budget_s: float = ROUND_BUDGET_S) -> int:
    """How many rounds fit the budget, judged by the first call; one when it is hopeless."""
    if first_s > LONG_S:
        return 1 if first_s > SLOW_S else 2
    return max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget_s / max(first_s, 1e-6))))


def counted(run: Callable[[], Any], device: str) -> dict[str, float]:
    """Launches of one call, and what its kernels take in sum; nothing on a CPU."""
    return totals(kernels_of(run)) if device == "cuda" else {}


def totals(kernels: dict[str, tuple[int, float]]) -> dict[str, float]:
    """Launches and milliseconds of all kernels."""
    launches = sum(count for count, _ in kernels.values())
    return {"launches": launches, "kernels_ms": sum(ms for _, ms in kernels.values())}


def kernels_of(run: Callable[[], Any]) -> dict[str, tuple[int, float]]:
    """Launches and milliseconds of each kernel of one call on a GPU, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA]) as prof:
        run()
        torch.cuda.synchronize()
    # As they are: torch's own tables take 0.1 ms of each, and a model's step has tens of thousands.
    return kernels_in(prof.profiler.kineto_results.events())  # type: ignore[union-attr]


def kernels_in(events: Iterable[Any]) -> dict[str, tuple[int, float]]:
    """Launches and milliseconds by name of the kernels among a profiler's events."""
    found: dict[str, tuple[int, float]] = {}
    for event in events:
        name = event.name()
        # Not copies and fills, buffers of the profiler, ranges that somebody named.
        if event.device_type() == torch.autograd.DeviceType.CUDA and not name.startswith(
            ("Mem", "Activity", "Optimizer.", "ProfilerStep")
        ):
            count, milliseconds = found.get(name[:NAMED], (0, 0.0))
            found[name[:NAMED]] = count + 1, milliseconds + event.duration_ns() / 1e6
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


class GemmCounter(TorchDispatchMode):
    """Counts the FLOP of matrix products that run while it is active, inside custom ops too.

    A custom op is one call for a dispatch mode; here its backend kernel is called with the mode on
    again, so the products inside are seen. Products inside a Triton or C++ kernel are not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        name = func.name()
        self.flop += gemm_flop(name, args)
        if not name.startswith("aten::"):
            key = _backend_key(args)
            with self, torch.no_grad():
                return func.redispatch(key, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _backend_key(args: tuple[Any, ...]) -> Any:
    tensors = (each for each in args if isinstance(each, Tensor))
    cuda = any(each.is_cuda for each in tensors)
    keys = torch._C.DispatchKey
    return torch._C.DispatchKeySet(keys.CUDA if cuda else keys.CPU)


def gemm_flop(name: str, args: tuple[Any, ...]) -> int:
    """FLOP of one dense product, 0 for any other op."""
    short = name.removeprefix("aten::").split(".")[0]
    if short in ("mm", "bmm", "_scaled_mm"):
        left, right = args[:2]
    elif short in ("addmm", "addmm_", "baddbmm", "baddbmm_"):
        left, right = args[1:3]
    else:
        return 0
    return int(2 * left.numel() * right.shape[-1])


def passes(flop: float, workload: Workload) -> float:
    """FLOP in units of one pass over the scored rows, 2 N V H."""
    return float(f"{flop / (2 * workload.scored * workload.weight.numel()):.3g}")


def count_gemm_flop(work: Callable[[], Any]) -> int:
    """FLOP of the matrix products of one call.

    torch.compile refuses to run under a dispatch mode; it fuses what surrounds the products and
    never the products themselves, so they are counted in the same function, run eagerly.
    """
    with torch.compiler.set_stance("force_eager"), GemmCounter() as counter:
        work()
    return counter.flop
