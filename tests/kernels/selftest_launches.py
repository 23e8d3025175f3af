"""What the self-test launches on a GPU that is not here: how often, and with which constants.

python -m tests.kernels.selftest_launches 90

Tensors are a CPU's, taken for a GPU's, and nothing is launched: what the checks find is wrong, and
they are made to their end. What the host reads of the rows that are scored is computed, as it
decides what is launched next. In a process of its own: the dispatch key of the CPU is taken.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

os.environ["ORPO_KERNELS_CPU_BACKEND"] = "torch"  # the CPU dispatch key is ours here

import torch
import triton
from torch import Tensor

from orpo_kernels import kernels, odds_ratio, pair_loss, selftest, sequence_mean
from orpo_kernels.engine import gemm, linear_lse, policy, problem
from orpo_kernels.engine.tiles import plain
from orpo_kernels.kernels import choose_rows, score_rows, start, tuning
from orpo_kernels.selftest import schedule

CPU = torch.device("cpu")
launched: dict[str, dict[str, set[Any]]] = {}
counts = Counter[str]()  # of the check that is being made


def record(kernel: Any, constants: dict[str, Any]) -> None:
    """Notes a launch."""
    counts[kernel.__name__] += 1
    seen = launched.setdefault(kernel.__name__, {})
    for name, value in constants.items():
        if isinstance(value, bool | int):
            seen.setdefault(name, set()).add(value)


def _launch(kernel: Any, _grid: Any) -> Callable[..., None]:
    def launch(*given: Any, **named: Any) -> None:
        values = dict(zip(kernel.arg_names, given, strict=False)) | named
        record(
            kernel, {each.name: values[each.name] for each in kernel.params if each.is_constexpr}
        )

    return launch


def _zeros(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *given, **named: function(*given, **named).zero_()


def _score(flat: Tensor, ignore_index: int, *rest: Any) -> Any:
    """The labels that are looked up of each row, and which sets score it: as `score_rows`."""
    found, scored, counts = _launched_score(flat, ignore_index, *rest)
    scored.copy_(flat != ignore_index)
    found[0].copy_(torch.where(scored[0], flat[0], -1))
    if len(flat) == 2:
        found[0].copy_(torch.where(scored[0], flat[0], torch.where(scored[1], flat[1], -1)))
        found[1].copy_(torch.where(scored.all(0) & (flat[0] != flat[1]), flat[1], -1))
    return found, scored, counts


def _choose(first: Tensor, second: Tensor | None, groups: Tensor | None, counts: Tensor) -> Any:
    """The rows that have a label, in front: as `choose_rows`."""
    chosen = _launched_choose(first, second, groups, counts)
    rows = (first >= 0).nonzero()[:, 0]
    chosen.places[: len(rows)] = rows
    chosen.labels.fill_(-1)
    for of_set, given in zip(chosen.labels, (first, second), strict=False):
        if given is not None:
            of_set[: len(rows)] = given[rows]
    if groups is not None:
        chosen.groups[: len(rows)] = groups[rows]
    chosen.totals[0] = len(rows)
    return chosen


_launched_score, _launched_choose = score_rows.score_rows, choose_rows.choose_rows


def take_the_cpu_for(capability: int) -> None:
    """A card of this compute capability."""
    modern = capability >= 80
    info = tuning.Device(tuning.architecture_class(*divmod(capability, 10)), 132, capability)
    tuning.device_info = lambda device: info
    kernels.DEVICES = ("cpu",)
    kernels.has_tensor_cores = lambda device: modern
    policy.device_class = lambda device: "cuda sm_80+" if modern else "cuda"
    for name in ("softmax_stats", "softmax_grad_", "column_sums"):
        kernels.register_tile_operation(name, getattr(plain, name))
    kernels.register_tile_operation("linear_lse", linear_lse._linear_lse)
    for module, names in (
        (sequence_mean, ("sequence_mean", "sequence_mean_backward")),
        (odds_ratio, ("odds_ratio", "odds_ratio_backward")),
        (pair_loss, ("pair_loss",)),
    ):
        for name in names:
            kernels.register_custom_op(name, getattr(module, f"_{name}"))
    of_call = sys.modules["orpo_kernels.linear_logps"]
    of_call.choose_compute_dtype = lambda hidden, weight, _: torch.promote_types(
        hidden.dtype, weight.dtype
    )
    if modern:
        for module in (gemm, problem):
            module.gemm_widens = lambda device, dtype: dtype.itemsize == 2
    gemm._widening_mm = lambda out, a, b: out.copy_(a.float() @ b.float())
    gemm._widening_addmm = lambda out, a, b: out.add_(a.float() @ b.float())
    score_rows.score_rows, choose_rows.choose_rows = _score, _choose
    for where, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        setattr(where, name, _zeros(getattr(where, name)))
    start.Start._start = lambda self, programs, numbers: record(self.kernel, self.constants)
    triton.KernelInterface.__getitem__ = _launch


def main() -> None:
    """Prints, as JSON, the values of each constant of each kernel, and each check's launches."""
    take_the_cpu_for(int(sys.argv[1]))
    torch.set_num_threads(1)
    checks: dict[str, list[Counter[str]]] = {}  # one a dtype
    for case in selftest._cases(CPU, 1, with_model=False):
        counts.clear()
        schedule.run([case], CPU)
        checks.setdefault(f"{case.op}: {case.name}", []).append(counts.copy())
    constants = {
        name: {each: sorted(values) for each, values in of_kernel.items()}
        for name, of_kernel in launched.items()
    }
    sys.stdout.write(json.dumps({"constants": constants, "checks": checks}))


if __name__ == "__main__":
    main()
