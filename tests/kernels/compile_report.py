"""Compiles every kernel for every architecture and row of the tuning table, without a GPU.

    python -m tests.kernels.compile_report [--targets 75 80 gfx942] [--json FILE]

Prints registers, spills, shared memory against the limit, the 16-byte loads and stores and the
units a GEMM runs on; exits with 1 when a kernel spills, does not fit, or lacks a wide access, or
the tensor cores or copies it must use, or a barrier between what it reads and writes.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from orpo_kernels.kernels import tuning
from tests.kernels import barriers
from tests.kernels.compile_cases import Case, cases
from tests.kernels.dryrun import SHARED_LIMIT, TENSOR_CORES, Resources, dryrun, resources

# What linear_lse must run on, and be fed by.
UNITS = {
    80: ("mma.sync", "cp.async"), 86: ("mma.sync", "cp.async"), 89: ("mma.sync", "cp.async"),
    90: ("wgmma", "tma"), 100: ("tcgen05", "tma"), 120: ("mma.sync", "tma"),
    "gfx90a": ("mfma",), "gfx942": ("mfma",), "gfx1100": ("wmma",),
}  # fmt: skip


class Line(NamedTuple):
    """One line of the report."""

    target: str
    case: str
    kernel: str
    row: tuning.Row | tuning.Tile
    figures: Resources
    faults: tuple[str, ...]


def report(target: int | str, chosen: list[Case]) -> Iterator[Line]:
    """Compiles the cases with every row of their table for one target."""
    with dryrun(target) as log:
        architecture = tuning.device_info(torch.device("cuda")).architecture
        for case in chosen:
            if not case.suits(target):
                continue
            key = case.key(target, architecture)
            rows = tuning.TABLE[key]
            for row in rows:
                tuning.TABLE[key] = (row,)
                log.clear()
                try:
                    case.launch()
                finally:
                    tuning.TABLE[key] = rows
                for launch in log:
                    streams = case.streams(launch.name)
                    if case.alone and not streams:
                        continue
                    figures = resources(launch.compiled)
                    faults = (
                        *_faults(figures, target, row, case, streams),
                        *barriers.faults(launch.name, launch.compiled, launch.shared),
                    )
                    yield Line(str(target), case.label, launch.name, row, figures, faults)


def _faults(
    figures: Resources,
    target: int | str,
    row: tuning.Row | tuning.Tile,
    case: Case,
    streams: bool,
) -> Iterator[str]:
    limit = SHARED_LIMIT[target]
    if figures.spills:
        yield f"{figures.spills} spills"
    if figures.shared_bytes > limit:
        yield f"shared memory over {limit}"
    if streams and case.wide_loads and not figures.wide_loads:
        yield "no 16-byte load"
    if streams and case.wide_stores and not figures.wide_stores:
        yield "no 16-byte store"
    if streams and case.operands:
        yield from _product_faults(figures, target, row, case)


def _product_faults(
    figures: Resources, target: int | str, row: tuning.Row | tuning.Tile, case: Case
) -> Iterator[str]:
    # gfx1100 has no tensor cores for float32, which linear_lse alone multiplies as it is.
    exact = isinstance(row, tuning.Tile) and case.dtype == torch.float32
    if target == "gfx1100" and exact:
        return
    units = figures.units
    if case.operands == "tiles":
        yield from (f"no {each}" for each in UNITS[target] if each not in units)
    elif not units.keys() & TENSOR_CORES.keys():
        yield "no tensor cores"
    if case.operands == "gathered" and isinstance(target, int):
        if not figures.wide_stores:
            yield "no 16-byte store of the product"
        # The rows of every step in flight, 16 bytes per thread and copy; the slots come apart.
        copies = row.block * row.depth * case.dtype.itemsize // (16 * 32 * row.warps)
        if units.get("cp.async", 0) < row.stages * copies:
            yield "gathered rows not copied to shared memory under the product"


def _text(line: Line, limit: int) -> str:
    figures = line.figures
    part = next((p for p in ("combine", "backward") if line.kernel.endswith(f"{p}_kernel")), "")
    label = f"{line.case} ({part})" if part else line.case
    row = "x".join(map(str, line.row if line.row.depth else line.row[:2]))
    return (
        f"{line.target:8}{label:52}{row:16}"
        f"{figures.registers:>5}{figures.spills:>7}{figures.shared_bytes:>11} / {limit:<7}"
        f"{figures.wide_loads:>5}{figures.wide_stores:>7}  {' '.join(figures.units)} "
        f"{'; '.join(line.faults)}\n"
    )


def main() -> int:
    """The command line; number of faults as the exit status, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="*", default=[str(each) for each in SHARED_LIMIT])
    parser.add_argument("--kernels", default="", help="only cases whose name begins so")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    lines = []
    heading = f"{'target':8}{'case':52}{'row':16}{'regs':>5}{'spills':>7}"
    sys.stdout.write(f"{heading}{'shared / limit':>20}{'loads':>6}{'stores':>7}\n")
    for text in args.targets:
        target = int(text) if text.isdigit() else text
        chosen = [case for case in cases() if case.label.startswith(args.kernels)]
        for line in report(target, chosen):
            lines.append(line)
            sys.stdout.write(_text(line, SHARED_LIMIT[target]))
            sys.stdout.flush()
    faults = sum(bool(line.faults) for line in lines)
    sys.stdout.write(f"{len(lines)} kernels compiled, {faults} with a fault\n")
    if args.json is not None:
        args.json.write_text(json.dumps([line._asdict() for line in lines], indent=1))
    return min(1, faults)


if __name__ == "__main__":
    sys.exit(main())
