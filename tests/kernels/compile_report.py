"""Compiles every kernel for every architecture and row of the tuning table, without a GPU.

    python -m tests.kernels.compile_report [--targets 75 80 gfx942] [--json FILE]

Prints registers, spills, shared memory against the limit, the 16-byte loads and stores and the
units a GEMM runs on; exits with 1 when a kernel spills, does not fit, or lacks a wide access, or
the tensor cores or copies it must use.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from orpo_kernels.kernels import (
    column_sums,
    linear_lse,
    odds_ratio,
    sequence_mean,
    softmax_grad,
    softmax_stats,
    tuning,
)
from tests.kernels.dryrun import SHARED_LIMIT, Resources, dryrun, resources

R, H, V = 256, 4096, 128256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# What linear_lse takes its operands by, and must run on. sm_75 has no such kernel.
FORMS = {
    80: "pointers", 86: "pointers", 89: "pointers", 90: "wgmma", 100: "tcgen05", 120: "tma",
    "gfx90a": "pointers", "gfx942": "pointers", "gfx1100": "pointers",
}  # fmt: skip
UNITS = {
    80: ("mma.sync", "cp.async"), 86: ("mma.sync", "cp.async"), 89: ("mma.sync", "cp.async"),
    90: ("wgmma", "tma"), 100: ("tcgen05", "tma"), 120: ("mma.sync", "tma"),
    "gfx90a": ("mfma",), "gfx942": ("mfma",), "gfx1100": ("wmma",),
}  # fmt: skip


class Case(NamedTuple):
    """A launch under one name: table key, dtype of the streamed tensor, and the launch itself."""

    label: str
    kernel: str
    dtype: torch.dtype
    launch: Callable[[], Any]
    wide_loads: bool = True
    wide_stores: bool = False
    only: str = ""  # of several kernels launched, the one meant

    @property
    def multiplies(self) -> bool:
        """Whether it is a GEMM."""
        return self.only == "_linear_lse_kernel"

    def key(self, target: int | str, architecture: str) -> tuple[str, str, torch.dtype]:
        """In the table."""
        return self.kernel.format(form=FORMS.get(target)), architecture, self.dtype


def _cuda(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def _labels(sets: int, rows: int) -> torch.Tensor:
    return _cuda(sets, rows, dtype=torch.int64)


def _tile_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        # Plain as in most heads; and everything on at once, rows on no vector boundary.
        for what, columns, sets, options in (
            ("plain", V, 1, (1.0, None)),
            ("all options, odd V", 32003, 2, (0.5, 30.0)),
        ):

            def bias(columns: int = columns, sets: int = sets) -> torch.Tensor | None:
                return _cuda(columns) if sets == 2 else None

            def stats(
                with_sum=False, dtype=dtype, columns=columns, sets=sets, options=options, bias=bias
            ):
                tile = _cuda(R, columns, dtype=dtype)
                softmax_stats.softmax_stats(
                    tile, bias(), _labels(sets, R), 0, *options, with_logit_sum=with_sum
                )

            yield Case(f"softmax_stats {name}, {what}", "softmax_stats", dtype, stats)
            if sets == 2:
                with_sum = functools.partial(stats, with_sum=True)
                label = f"softmax_stats {name}, all and logit sum"
                yield Case(label, "softmax_stats", dtype, with_sum)
            outs = (None, torch.bfloat16) if dtype == torch.float32 else (None,)
            for out in outs:

                def grad(
                    dtype=dtype, columns=columns, sets=sets, options=options, bias=bias, out=out
                ):
                    tile = _cuda(R, columns, dtype=dtype)
                    target = None if out is None else _cuda(R, columns, dtype=out)
                    softmax_grad.softmax_grad_(
                        tile, bias(), _labels(sets, R), 0, _cuda(R), *options, target
                    )

                to = "" if out is None else " to bfloat16"
                yield Case(
                    f"softmax_grad_ {name}{to}, {what}", "softmax_grad", dtype, grad,
                    wide_stores=True,
                )  # fmt: skip

        def sums(dtype=dtype):
            column_sums.column_sums(_cuda(R, V, dtype=dtype), _cuda(R))

        yield Case(f"column_sums {name}", "column_sums", dtype, sums)


def _gemm_cases() -> Iterator[Case]:
    for dtype in DTYPES:
        name = str(dtype).removeprefix("torch.")
        for what, bias, sets, options in (
            ("plain", None, 1, (1.0, None, False)),
            ("all options", dtype, 2, (0.5, 30.0, True)),
        ):

            def lse(h, columns=V, dtype=dtype, bias=bias, sets=sets, options=options):
                hidden, weight = _cuda(R, h, dtype=dtype), _cuda(columns, h, dtype=dtype)
                offsets = None if bias is None else _cuda(columns, dtype=bias)
                linear_lse.linear_lse(hidden, weight, offsets, _labels(sets, R), *options)

            after = "" if bias is None else "_transformed"
            gemm = {"wide_loads": False, "only": "_linear_lse_kernel"}
            even, odd = functools.partial(lse, H), functools.partial(lse, H + 1, 32003)
            kernel = "linear_lse_{form}" + after
            yield Case(f"linear_lse {name}, {what}", kernel, dtype, even, **gemm)
            kernel = f"linear_lse_elements{after}"
            yield Case(f"linear_lse {name}, {what}, odd H", kernel, dtype, odd, **gemm)
            if bias is None:
                yield Case(
                    f"label_dots {name}", "label_dots", dtype, even, only="_label_dots_kernel"
                )


def _small_cases() -> Iterator[Case]:
    def padded() -> None:
        mask = _cuda(4, 4096, dtype=torch.bool)
        sequence_mean.sequence_mean(_cuda(4, 4096), mask, None, 4)

    def packed() -> None:
        mask, ids = _cuda(4096, dtype=torch.bool), _cuda(4096, dtype=torch.int64)
        sequence_mean.sequence_mean(_cuda(4096), mask, ids, 4)

    def pairs() -> None:
        odds_ratio.odds_ratio(_cuda(64), _cuda(64))
        odds_ratio.odds_ratio_backward(_cuda(64), _cuda(64), _cuda(64), _cuda(64))

    wide = torch.float32
    yield Case("sequence_mean, padded", "sequence_mean", wide, padded, wide_loads=False)
    yield Case("sequence_mean, packed", "sequence_mean", wide, packed, wide_loads=False)
    yield Case("odds_ratio", "odds_ratio", wide, pairs, wide_loads=False)


def cases() -> list[Case]:
    """Every launch of the report."""
    return [*_tile_cases(), *_gemm_cases(), *_small_cases()]


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
            if target == 75 and case.only:
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
                    if case.only not in ("", launch.name):
                        continue
                    figures = resources(launch.compiled)
                    # The partials and the combination of a few of them are not the stream.
                    streams = not launch.name.endswith("combine_kernel")
                    faults = tuple(_faults(figures, target, case, streams))
                    yield Line(str(target), case.label, launch.name, row, figures, faults)


def _faults(figures: Resources, target: int | str, case: Case, streams: bool) -> Iterator[str]:
    limit = SHARED_LIMIT[target]
    if figures.spills:
        yield f"{figures.spills} spills"
    if figures.shared_bytes > limit:
        yield f"shared memory over {limit}"
    if streams and case.wide_loads and not figures.wide_loads:
        yield "no 16-byte load"
    if streams and case.wide_stores and not figures.wide_stores:
        yield "no 16-byte store"
    if case.multiplies:
        yield from (f"no {each}" for each in _required(target, case) if each not in figures.units)


def _required(target: int | str, case: Case) -> tuple[str, ...]:
    if "elements" in case.kernel:  # nothing copies single elements; mma.sync where wgmma needs more
        return ("mma.sync",) if target in (80, 86, 89, 120) else ()
    # gfx1100 has no tensor cores for float32.
    return () if target == "gfx1100" and case.dtype == torch.float32 else UNITS[target]


def _text(line: Line, limit: int) -> str:
    figures = line.figures
    part = next((p for p in ("combine", "backward") if line.kernel.endswith(f"{p}_kernel")), "")
    label = f"{line.case} ({part})" if part else line.case
    row = "x".join(map(str, line.row))
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
