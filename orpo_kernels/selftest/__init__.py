"""The self-test: is what this package computes on this machine right?

Some faults are in no line of ours: a compiler, a driver or a BLAS that gets a kernel wrong, without
NaN, without an error, until training goes wrong. `orpo-kernels selftest` compares every op, forward
and backward, in float32, bf16 and fp16, with its definition in float64, on the user's own device,
in a few seconds. Bug reports start with its output.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from time import perf_counter

import torch

from orpo_kernels.selftest import logps, losses, model, schedule, sparse, tiles
from orpo_kernels.selftest.figures import Case, Setting
from orpo_kernels.selftest.report import (
    DTYPES,
    Check,
    SelfTestReport,
    dtype_name,
    environment,
    headline,
    tile_backends,
)

__all__ = ["Check", "SelfTestReport", "main", "self_test"]

# The command begins no check after so many seconds. The first run on an H200, whose host was slow,
# took 54 s, of which the compilers took most: with 15 s a tenth was checked. What was compiled is
# remembered, and the next run took 15 s.
LIMIT_S = 60.0


def self_test(
    device: torch.device | str | None = None, *, json: bool = False, seconds: float | None = None
) -> SelfTestReport:
    """Check every op on this machine, and print what was found.

    Args:
        device: where to compute; default: the accelerator, the CPU if there is none.
        json: print one JSON object instead of a table.
        seconds: begin no check after so many, and say which were left out; default: no limit.

    Returns:
        The report: `passed`, `failures`, and the figures.

    Raises:
        ValueError: a device that cannot be used.

    Note:
        A few seconds and a few MB; on a GPU the first time longer, as kernels are compiled, as many
        at a time as the host has processors. Leaves the random state, autocast, grad mode and the
        number of threads as they were. On the CPU the tile operations run on all of torch's
        threads, the rest on one.
    """
    where = usable_device(device)
    start = perf_counter()
    about, backends = environment(where), tile_backends(where)
    if not json:
        sys.stdout.write(headline(about, backends) + "\n")
        sys.stdout.flush()
    skipped = []
    if find_spec("transformers") is None:
        skipped.append("fuse_head: transformers is not installed")
    threads, workers = torch.get_num_threads(), schedule.workers_of(where)
    with ExitStack() as stack:
        # Problems this small gain nothing from threads; on a busy machine they wait for each other.
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(1)
        of_tiles = threads if workers == 1 else 1
        cases = tuple(_cases(where, of_tiles, with_model=not skipped))
        checks, left_out = schedule.run(cases, where, workers, seconds)
    if left_out:
        skipped.append(_no_time(left_out, seconds))
    report = SelfTestReport(about, backends, tuple(checks), tuple(skipped), perf_counter() - start)
    sys.stdout.write((report.json() if json else report.findings()) + "\n")
    return report


def _no_time(cases: Sequence[Case], seconds: float | None) -> str:
    """Which checks were left out, by op and dtype."""
    count = Counter(f"{case.op} in {dtype_name(case.setting.dtype)}" for case in cases)
    names = ", ".join(name if n == 1 else f"{name} ({n})" for name, n in count.items())
    return (
        f"no time was left after {seconds:g} s for {len(cases)} checks: {names}; run this again "
        "(what was compiled is remembered) or with --seconds 0 for no limit"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`orpo-kernels selftest`.

    Args:
        argv: arguments; those of the process if None.

    Returns:
        Exit status: 0, 1 if a check failed, 2 for a device that cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="orpo-kernels selftest",
        description="Check every op against float64 on this machine; takes a few seconds, on a GPU "
        "the first time longer, as kernels are compiled.",
    )
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, xpu; default: the accelerator, else cpu"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for bug reports")
    parser.add_argument(
        "--seconds", type=float, default=LIMIT_S,
        help="begin no check after so many, 0: no limit; default: %(default)g",
    )  # fmt: skip
    options = parser.parse_args(argv)
    try:
        report = self_test(options.device, json=options.json, seconds=options.seconds or None)
    except ValueError as error:
        sys.stderr.write(f"orpo-kernels selftest: {error}\n")
        return 2
    return 0 if report.passed else 1


def usable_device(device: torch.device | str | None) -> torch.device:
    """`device`, or the accelerator, or the CPU.

    Raises:
        ValueError: it cannot be used.
    """
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"device must be one torch can use, got {device}: {reason}") from error
    return where


def _cases(device: torch.device, threads: int, *, with_model: bool) -> Iterator[Case]:
    for dtype in DTYPES:
        setting = Setting(device, dtype, threads)
        yield from tiles.cases(setting)
        yield from losses.cases(setting)
        yield from logps.cases(setting)
        yield from sparse.cases(setting)
        if with_model:
            yield from model.cases(setting)
