"""The self-test: is what this package computes on this machine right?

Some faults are in no line of ours: a compiler, a driver or a BLAS that gets a kernel wrong, without
NaN, without an error, until training goes wrong. `orpo-kernels selftest` compares every op, forward
and backward, in float32, bf16 and fp16, with its definition in float64, on the user's own device,
in a few seconds. Bug reports start with its output.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from time import perf_counter

import torch

from orpo_kernels.selftest import logps, losses, model, sparse, tiles
from orpo_kernels.selftest.figures import Case, Setting
from orpo_kernels.selftest.report import (
    DTYPES,
    Check,
    SelfTestReport,
    dtype_name,
    environment,
    tile_backends,
)

__all__ = ["Check", "SelfTestReport", "main", "self_test"]


def self_test(device: torch.device | str | None = None, *, json: bool = False) -> SelfTestReport:
    """Check every op on this machine, and print what was found.

    Args:
        device: where to compute; default: the accelerator, the CPU if there is none.
        json: print one JSON object instead of a table.

    Returns:
        The report: `passed`, `failures`, and the figures.

    Raises:
        ValueError: a device that cannot be used.

    Note:
        A few seconds and a few MB. Leaves the random state, autocast, grad mode and the number of
        threads as they were. On the CPU the tile operations run on all of torch's threads, the
        rest on one.
    """
    where = _usable(device)
    start = perf_counter()
    skipped = []
    if find_spec("transformers") is None:
        skipped.append("fuse_head: transformers is not installed")
    with ExitStack() as stack:
        # Inputs and truths are made on the CPU, whatever the caller's default device.
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(where.type, enabled=False))
        # Problems this small gain nothing from threads; on a busy machine they wait for each other.
        threads = torch.get_num_threads()
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(1)
        checks = tuple(_check(case) for case in _cases(where, threads, with_model=not skipped))
    report = SelfTestReport(
        environment(where), tile_backends(where), checks, tuple(skipped), perf_counter() - start
    )
    sys.stdout.write((report.json() if json else report.text()) + "\n")
    return report


def main(argv: Sequence[str] | None = None) -> int:
    """`orpo-kernels selftest`.

    Args:
        argv: arguments; those of the process if None.

    Returns:
        Exit status: 0, 1 if a check failed, 2 for a device that cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="orpo-kernels selftest",
        description="Check every op against float64 on this machine; takes a few seconds.",
    )
    parser.add_argument(
        "--device", help="cpu, cuda, cuda:1, xpu; default: the accelerator, else cpu"
    )
    parser.add_argument("--json", action="store_true", help="print JSON, for bug reports")
    options = parser.parse_args(argv)
    try:
        return 0 if self_test(options.device, json=options.json).passed else 1
    except ValueError as error:
        sys.stderr.write(f"orpo-kernels selftest: {error}\n")
        return 2


def _usable(device: torch.device | str | None) -> torch.device:
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


def _check(case: Case) -> Check:
    labels = (case.op, case.name, dtype_name(case.setting.dtype))
    try:
        figures = case.run()
    except Exception as error:  # whatever a broken kernel raises is a finding; the rest still runs
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Check(*labels, False, "", float("nan"), 0.0, f"raised {reason}")
    worst = max(figures, key=lambda figure: figure.used)
    wrong = [
        f"{each.what} is off by {each.error:.1e}, at most {each.limit:.1e} is right"
        for each in figures
        if not each.passed
    ]
    return Check(*labels, not wrong, worst.what, worst.error, worst.limit, "; ".join(wrong))
