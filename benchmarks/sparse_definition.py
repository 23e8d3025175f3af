"""What dhidden errs by the definition of the sparse gradient, at the sizes of a GPU.

    python -m benchmarks.sparse_definition [--head llama-3-8b] [--rows 8192]

The inputs of the GPU's figures, drawn on the CPU, one eps after the other: `softmax_compact` of
`reference.py` in columns of 64 rows, entries in bfloat16 as a GPU keeps them, and each once only;
products in float32. Errors of `label - W^T u` by row, as it is and rounded to bfloat16, relative,
Frobenius. No estimates: which columns are kept follows from the softmax itself. Takes 4 GB, and on
two cores ten minutes for 8,192 rows of Llama 3's head. Writes
`results/<machine>/sparse-definition.json`.
"""

import argparse
import math
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.heads import HEADS, Case, sizes_of
from benchmarks.results import FOLDER
from benchmarks.truth import relative
from benchmarks.workloads import Workload, make_workload
from orpo_kernels import reference
from orpo_kernels.constants import COMPACT_ROWS, IGNORE_INDEX
from orpo_kernels.options import LogpsOptions

FILE = "sparse-definition.json"
_CHUNK = 4 * COMPACT_ROWS


class Inputs(NamedTuple):
    """Scored rows: hidden (N, H) and weight (V, H) float32; labels, groups (N,)."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    groups: Tensor


class Sums(NamedTuple):
    """Of one eps: W^T k (N, H) and m (N,), kept in one number and in two; sums of the tail."""

    products: Tensor  # (2, N, H)
    masses: Tensor  # (2, N)
    tail: Tensor  # (G, V)
    columns: list[int]  # kept, of 64 rows


def inputs_of(workload: Workload, rows: int) -> Inputs:
    """The first row blocks of so many, evenly among all; whole ones."""
    hidden, labels = workload.hidden.detach().flatten(0, 1), workload.union_labels.flatten()
    rejected = torch.arange(len(labels)) >= len(labels) // 2
    scored = (labels != IGNORE_INDEX).nonzero()[:, 0]
    blocks = scored[: len(scored) // COMPACT_ROWS * COMPACT_ROWS].view(-1, COMPACT_ROWS)
    wanted = min(len(blocks), rows // COMPACT_ROWS)
    chosen = blocks[torch.linspace(0, len(blocks) - 1, wanted).long()].flatten()
    weight = workload.weight.detach().float()
    return Inputs(hidden[chosen].float(), weight, labels[chosen], rejected[chosen].long())


def measure(given: Inputs, powers: list[float]) -> list[dict[str, Any]]:
    """Errors of every eps; `rounding` is that of the true gradient to bfloat16 alone."""
    hidden, weight, labels, groups = given
    N, H = hidden.shape
    true, beside = torch.empty(N, H), torch.empty(N, 1)
    found = [
        Sums(
            torch.empty(2, N, H), torch.empty(2, N, dtype=torch.float64),
            torch.zeros(reference.GROUPS, len(weight), dtype=torch.float64), [],
        )
        for _ in powers
    ]  # fmt: skip
    for start in range(0, N, _CHUNK):
        rows = slice(start, start + _CHUNK)
        entries = torch.softmax(hidden[rows] @ weight.t(), 1)
        mine = labels[rows, None]
        beside[rows] = 1 - entries.gather(1, mine)
        entries.scatter_(1, mine, 0.0)
        true[rows] = entries @ weight
        for power, sums in zip(powers, found, strict=True):
            _add(sums, entries, groups[rows], 2.0**power, rows, weight)
    label = beside.double() * weight[labels].double()
    truth = label - true.double()
    lines, rounding = [], relative(truth.bfloat16().double(), truth)
    for power, sums in zip(powers, found, strict=True):
        mean = sums.tail / sums.tail.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
        rest = (mean.float() @ weight).double()[groups]
        share = sum(sums.columns) * COMPACT_ROWS / (N * len(weight))
        line: dict[str, Any] = {"eps": f"2^{power:.2f}", "kept_share": share}
        line["rounding"] = rounding
        for name, product, mass in zip(("once", "twice"), sums.products, sums.masses, strict=True):
            gradient = label - product.double() - mass[:, None] * rest
            line[name] = relative(gradient, truth)
            line[f"{name}_rounded"] = relative(gradient.bfloat16().double(), truth)
        lines.append(line)
    return lines


def _add(
    sums: Sums, entries: Tensor, groups: Tensor, eps: float, rows: slice, weight: Tensor
) -> None:
    whole = torch.ones_like(entries[:, :1])
    kept, mask, tail = reference.softmax_compact(
        entries, whole, groups, eps=eps, block=COMPACT_ROWS, rounding=torch.bfloat16
    )
    sums.tail.add_(tail)
    sums.columns.append(int(mask[::COMPACT_ROWS].sum()))
    once = entries.bfloat16().float().masked_fill_(~mask, 0.0)
    total = entries.double().sum(1)
    for i, each in enumerate((once, kept)):
        sums.products[i, rows] = each @ weight
        sums.masses[i, rows] = total - each.double().sum(1)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sparse_definition", description=__doc__
    )
    parser.add_argument("--head", choices=list(HEADS), default="llama-3-8b")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--results", default=str(FOLDER), help="where <machine>/ is made")
    options = parser.parse_args(arguments)
    if options.rows < COMPACT_ROWS:
        parser.error(f"--rows is at least {COMPACT_ROWS}, a block of rows; got {options.rows}")
    sizes = sizes_of(Case(options.head), "cuda", tiny=options.tiny)
    given = inputs_of(make_workload(Case(options.head, sizes=sizes)), options.rows)
    default = math.log2(LogpsOptions().eps_of(len(given.weight), trains=False))
    powers = [-12.0, -14.0, *([default] if default < -12 else []), -15.0]
    lines = measure(given, powers)
    path = Path(options.results, machine.slug("cpu"), FILE)
    path.parent.mkdir(parents=True, exist_ok=True)
    machine.write_results(path, "cpu", lines, head=options.head, rows=len(given.labels))
    for line in lines:
        sys.stdout.write(
            f"{line['eps']}: {100 * line['kept_share']:.2f} % kept, dhidden errs "
            f"{line['twice_rounded']:.2e} ({line['twice']:.2e} before it is rounded), entries kept "
            f"in one number {line['once_rounded']:.2e} ({line['once']:.2e})\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
