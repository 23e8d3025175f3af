"""One head on a GPU at the budgets cards get: ours and the peers, launches and the kernels' sum.

    python -m benchmarks.budgets [--head llama-3-8b] [--seconds 110] [--json FILE]
    python -m benchmarks.budgets --device cpu --tiny        # shows that it runs

A line per implementation, mode and budget: time in g, the bare GEMM of the same run, of a call that
finds the device idle, and of one that finds it busy, as in a training step; what the GPU's kernels
take in sum, how many launches that is, peak memory over the inputs, the errors of
loss and gradients against float64. What of ours is wrong is not timed, and then the exit code is 1.
Where the wall time is far over the kernels' sum, launches are what costs.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import machine
from benchmarks.heads import HEADS, Case
from benchmarks.implementations import BETA, IMPLEMENTATIONS, Implementation
from benchmarks.measure import Stopwatch, bare_gemm, counted
from benchmarks.steps import Step
from benchmarks.truth import Truth, WrongResult, compute_truth, errors, judge
from benchmarks.workloads import Workload, make_workload
from orpo_kernels import orpo_loss

MIB = 2**20
# The default of an 8 GB card is 80 MiB, of one with 24 GB 240 MiB; None: of the card at hand.
BUDGETS = (64 * MIB, 256 * MIB, None)
KEEPS_ALL = 3072 * MIB  # room for E of 8,192 rows of Llama 3's vocabulary
PEERS = {
    "frozen": ("trl-chunked", "trl-orpo", "eager", "cce", "liger"),
    "trainable": ("eager", "trl-chunked", "trl-orpo", "cce"),
    "eval": ("trl-chunked", "cce", "eager"),
}
ROUNDS = 7


class Line(NamedTuple):
    """What is run."""

    name: str
    mode: str
    budget: int | None
    implementation: Implementation


def lines() -> Iterator[Line]:
    """Every line, mode by mode, ours first: inputs are made once a mode."""
    for mode, peers in PEERS.items():
        for budget in (*BUDGETS, KEEPS_ALL) if mode == "trainable" else BUDGETS:
            yield Line("ours-exact", mode, budget, ours("exact", budget))
        for budget in BUDGETS if mode != "eval" else ():
            yield Line("ours-sparse", mode, budget, ours("sparse", budget))
        for name in peers:
            yield Line(name, mode, None, IMPLEMENTATIONS[name])


def ours(gradient: str, budget: int | None, eps: float | None = None) -> Implementation:
    """Our loss, with a workspace of so many bytes."""

    def prepare(workload: Workload) -> Callable[[], torch.Tensor]:
        options: dict[str, Any] = {"gradient": gradient, "workspace_bytes": budget, "eps": eps}
        return lambda: orpo_loss(
            workload.hidden, workload.weight, workload.labels, nll_labels=workload.nll_labels,
            beta=BETA, softcap=workload.softcap, **options,
        ).loss  # fmt: skip

    return Implementation(f"ours-{gradient}", "", prepare, lambda workload, device: None)


def measured(line: Line, work: Workload, truth: Truth, device: str) -> dict[str, Any]:
    """Errors, times, launches and memory of one line; why there are none, where it cannot run.

    Raises:
        WrongResult: it does not compute the loss.
    """
    row: dict[str, Any] = {"name": line.name, "mode": line.mode, "budget_bytes": line.budget}
    reason = line.implementation.missing(work, device)
    if reason:
        return row | {"skipped": reason}
    step = Step(line.implementation, work, line.mode)

    def run() -> None:
        step.clear()
        step.run()

    try:
        for _ in range(2):
            step.clear()
            loss = step.run()
        row["errors"] = errors(truth, loss, *step.gradients)
        judge(
            row["errors"],
            str(work.hidden.dtype).removeprefix("torch."),
            peer=not line.name.startswith("ours"),
        )
        row |= timed(run, bare_gemm(work), device)
        row |= counted(run, device)
        row["peak_bytes"] = peak(step, device)
    except torch.cuda.OutOfMemoryError:
        row["skipped"] = "out of memory"
    step.clear()
    return row


def timed(run: Callable[[], None], gemm: Callable[[], None], device: str) -> dict[str, float]:
    """Time of the rounds over the bare GEMMs around them, medians.

    `step_g` and `step_ms`: with the device busy when the call begins, as in a training step.
    """
    clock, found = Stopwatch(device), dict[str, list[float]]()
    gemm()
    before = clock(gemm)
    for _ in range(ROUNDS if device == "cuda" else 1):
        idle, busy = clock(run), clock(run, ahead=gemm)
        after = clock(gemm)
        of_round = {
            "time_ms": 1e3 * idle, "g": 2 * idle / (before + after),
            "step_ms": 1e3 * busy, "step_g": 2 * busy / (before + after),
        }  # fmt: skip
        for name, value in of_round.items():
            found.setdefault(name, []).append(value)
        before = after
    return {name: statistics.median(values) for name, values in found.items()}


def peak(step: Step, device: str) -> int:
    """Most bytes over the inputs, gradients left out."""
    if device != "cuda":
        return 0
    step.clear()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step.run()
    return torch.cuda.max_memory_allocated() - before - step.gradient_bytes


def text(row: dict[str, Any]) -> str:
    """One line of the table."""
    budget = "default" if row["budget_bytes"] is None else f"{row['budget_bytes'] // MIB} MiB"
    start = f"{row['mode']:10} {row['name']:12} {budget:9}"
    if "skipped" in row:
        return f"{start} {row['skipped']}"
    kernels = ""
    if "launches" in row:
        kernels = f" kernels {row['kernels_ms']:8.2f} ms in {row['launches']:5} launches"
    wrong = " ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
    return (
        f"{start} {row['g']:7.2f} g, in a step {row['step_g']:5.2f} "
        f"{row['time_ms']:9.2f} ms{kernels} "
        f"peak {row['peak_bytes'] / MIB:8.0f} MiB  {wrong}"
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.budgets", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--head", choices=list(HEADS), default="llama-3-8b")
    parser.add_argument("--seconds", type=float, default=110.0, help="start nothing new after this")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    works: dict[str, tuple[Workload, Truth]] = {}
    wrong = 0
    for line in lines():
        if time.perf_counter() - start > options.seconds:
            print("out of time before", line.mode, line.name)
            break
        if line.mode not in works:
            works.clear()
            case = Case(options.head, line.mode)
            work = make_workload(case, options.device, tiny=options.tiny)
            works[line.mode] = (work, compute_truth(work))
        try:
            rows.append(measured(line, *works[line.mode], options.device))
        except WrongResult as error:
            wrong += 1
            print(f"{line.mode:10} {line.name:12} WRONG: {error}", flush=True)
            continue
        print(text(rows[-1]), flush=True)
    if options.json:
        machine.write_results(options.json, options.device, rows, head=options.head)
    return min(1, wrong)


if __name__ == "__main__":
    sys.exit(main())
