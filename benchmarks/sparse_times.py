"""The sparse gradient on a GPU: its errors, what its kernels take, and with other block sizes.

    python -m benchmarks.sparse_times [--head llama-3-8b] [--seconds 100] [--json FILE]
    python -m benchmarks.sparse_times --device cpu --tiny      # shows that it runs

In this order, a line each: the sparse gradient and the exact one, frozen, at the default, 64 MiB
and 256 MiB (errors against float64, wall time in bare GEMMs g, launches, the sum of the kernels
and each of them); eps, with float32 and with 16-bit logits (eps 0: exact); the trainable
head; block sizes of `scan` and `gather_slots`, by the time of that kernel; flat logits,
where the sparse gradient should cost what the exact one does, and block sizes of `dense_rows`; last
those of the kernels of dW (`--only sum_products`, `--only slot_products`).
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks import machine
from benchmarks.budgets import MIB, Line, ours, timed
from benchmarks.heads import HEADS, Case
from benchmarks.measure import bare_gemm, kernels_of, totals
from benchmarks.steps import Step
from benchmarks.truth import Truth, WrongResult, compute_truth, errors, judge
from benchmarks.workloads import Workload, make_workload

BUDGETS = (None, 64 * MIB, 256 * MIB)  # the exact gradient at the first two
SHOWN = 9  # kernels of a line, those that take longest

# Rows of the table: tiles of a program, warps, columns of a tile, steps in flight.
SCANS = (
    (16, 2, 64, 1), (8, 2, 64, 1), (32, 2, 64, 1), (16, 2, 64, 2), (16, 1, 32, 1), (32, 1, 32, 1),
    (8, 4, 128, 1), (16, 4, 128, 1), (16, 4, 64, 1), (8, 4, 128, 2),
)  # fmt: skip
# Columns of H, warps, entries of a step, steps in flight, registers.
GATHERS = (
    (256, 8, 32, 4, 128), (256, 8, 32, 3, 128), (256, 8, 64, 3, 168), (128, 4, 32, 4, 128),
    (128, 4, 64, 3, 0), (128, 8, 64, 4, 128), (256, 4, 32, 3, 0),
)  # fmt: skip
# Columns of a panel, warps, slots of a step; columns of a panel, warps, lanes.
PRODUCTS = ((128, 4, 64), (256, 8, 64), (128, 8, 64), (128, 4, 32), (64, 4, 64))
SUMS = ((256, 4, 16), (256, 8, 16), (256, 4, 8), (512, 8, 8), (512, 8, 16), (128, 4, 16))
DENSE = ((128, 8, 32, 3, 0), (256, 8, 32, 3, 0), (256, 8, 64, 2, 0), (128, 8, 64, 3, 0))


class Job(NamedTuple):
    """A line and the logits it runs on; of a sweep a row of the table, and the kernel it is of.

    `narrow`: logits are 16-bit, as where a GEMM cannot write float32.
    """

    title: str
    line: Line
    logits: str = "trained"
    table: tuple[str, tuple[int, ...]] | None = None
    kernel: str = ""
    narrow: bool = False


def jobs() -> Iterator[Job]:
    """Everything, in the order of the module's docstring: inputs are made five times."""
    yield from _lines("frozen")
    for narrow in (False, True):
        what = f"{16 if narrow else 32}-bit logits"
        for power in (10, 12, 14, 15):
            yield Job(f"eps 2^-{power}, {what}", _frozen(2.0**-power), narrow=narrow)
        exact = Line("exact", "frozen", None, ours("exact", None))
        yield Job(f"eps 0, {what}", exact, narrow=narrow)
    yield from _lines("trainable")
    yield from _sweep("scan", SCANS, "trained")
    yield from _sweep("gather_slots", GATHERS, "trained")
    for gradient in ("exact", "sparse"):
        line = Line(gradient, "frozen", None, ours(gradient, None))
        yield Job(f"flat {gradient}", line, "flat")
    yield from _sweep("dense_rows", DENSE, "flat")
    trains = Line("sparse", "trainable", None, ours("sparse", None))
    yield from _sweep("sum_products", SUMS, "trained", trains)
    yield from _sweep("slot_products", PRODUCTS, "trained", trains)


def _lines(mode: str) -> Iterator[Job]:
    for gradient in ("sparse", "exact"):
        for budget in BUDGETS if gradient == "sparse" else BUDGETS[:2]:
            yield Job(gradient, Line(gradient, mode, budget, ours(gradient, budget)))


def _sweep(
    name: str, rows: tuple[tuple[int, ...], ...], logits: str, line: Line | None = None
) -> Iterator[Job]:
    for row in rows:
        some = line or _frozen(None)
        yield Job(f"{name} {row}", some, logits, (name, row), f"_{name}_kernel")


def _frozen(eps: float | None) -> Line:
    return Line("sparse", "frozen", None, ours("sparse", None, eps))


def measured(job: Job, work: Workload, truth: Truth, device: str) -> dict[str, Any]:
    """Errors, times and launches of one job."""
    line = job.line
    row: dict[str, Any] = {
        "title": job.title, "mode": line.mode, "budget_bytes": line.budget, "logits": job.logits,
    }  # fmt: skip
    step = Step(line.implementation, work, line.mode)

    def run() -> None:
        step.clear()
        step.run()

    for _ in range(2):
        step.clear()
        loss = step.run()
    row["errors"] = errors(truth, loss, *step.gradients)
    judge(row["errors"], str(work.hidden.dtype).removeprefix("torch."), peer=False)
    row |= timed(run, bare_gemm(work), device)
    row |= kernels(run, device)
    step.clear()
    return row


def kernels(run: Any, device: str) -> dict[str, Any]:
    """Launches of one step and what its kernels take: all of them, and each by name, ms."""
    if device != "cuda":
        return {}
    found = kernels_of(run)
    return {**totals(found), "kernels": found}


def text(row: dict[str, Any], kernel: str) -> str:
    """A line, and the kernels that take longest; of a sweep only the kernel it is of."""
    budget = "default" if row["budget_bytes"] is None else f"{row['budget_bytes'] // MIB} MiB"
    wrong = " ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
    out = f"{row['mode']:10}{row['title']:32}{budget:9}{row['g']:6.2f} g"
    out += f", in a step {row['step_g']:5.2f} {row['time_ms']:8.2f} ms"
    if "kernels" not in row:
        return f"{out}  {wrong}"
    out += f", kernels {row['kernels_ms']:8.2f} ms in {row['launches']:4}  {wrong}"
    shown = [(k, *v) for k, v in row["kernels"].items() if not kernel or k == kernel]
    for name, count, each in shown[:SHOWN]:
        out += f"\n{'':12}{name:62}{count:6} x {1e3 * each / count:9.1f} us = {each:8.3f} ms"
    return out


@contextlib.contextmanager
def with_row(table: tuple[str, tuple[int, ...]] | None) -> Iterator[None]:
    """A row in the table of block sizes, for bfloat16 operands of this device."""
    if table is None:
        yield
        return
    from orpo_kernels.engine.sparse import scan_loop
    from orpo_kernels.kernels import tuning

    name, (block, warps, depth, *others) = table
    architecture = tuning.device_info(torch.device("cuda", 0)).architecture
    dtype = torch.float32 if name == "scan" else torch.bfloat16
    key, row = (name, architecture, dtype), tuning.Row(block, warps, depth, *others)
    with (
        mock.patch.dict(tuning.TABLE, {key: (row,)}),
        # Flat calls are otherwise left to the exact loop, and none is dense tile by tile.
        mock.patch.object(
            scan_loop, "MOST_DENSE", 1.0 if name == "dense_rows" else scan_loop.MOST_DENSE
        ),
    ):
        yield


@contextlib.contextmanager
def with_logits(narrow: bool) -> Iterator[None]:
    """Logits in the dtype of the operands, if `narrow`."""
    if not narrow:
        yield
        return
    from orpo_kernels.engine import gemm, problem

    with contextlib.ExitStack() as stack:
        for module in (gemm, problem):
            stack.enter_context(mock.patch.object(module, "gemm_widens", return_value=False))
        yield


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse_times", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--head", choices=list(HEADS), default="llama-3-8b")
    parser.add_argument("--seconds", type=float, default=100.0, help="start nothing new after this")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="jobs whose title begins so")
    parser.add_argument("--but", help="not those whose title begins so")
    options = parser.parse_args(arguments)
    start, rows, wrong = time.perf_counter(), [], 0
    known: dict[tuple[str, str], tuple[Workload, Truth]] = {}
    for job in jobs():
        left_out = options.but is not None and job.title.startswith(options.but)
        if not job.title.startswith(options.only) or left_out:
            continue
        if job.table and options.device == "cpu":
            continue
        if time.perf_counter() - start > options.seconds:
            print("out of time before", job.title)
            break
        key = (job.line.mode, job.logits)
        if key not in known:
            known.clear()
            case = Case(options.head, job.line.mode, job.logits)
            work = make_workload(case, options.device, tiny=options.tiny)
            known[key] = (work, compute_truth(work))
        try:
            with with_row(job.table), with_logits(job.narrow):
                rows.append(measured(job, *known[key], options.device))
        except WrongResult as error:
            wrong += 1
            print(f"{job.line.mode:10}{job.title:32}WRONG: {error}", flush=True)
            continue
        except Exception as error:  # a block size that does not compile
            if job.table is None:
                raise
            print(job.title, type(error).__name__, str(error)[:80])
            continue
        print(text(rows[-1], job.kernel), flush=True)
    if options.json:
        machine.write_results(options.json, options.device, rows, head=options.head)
    return min(1, wrong)


if __name__ == "__main__":
    sys.exit(main())
