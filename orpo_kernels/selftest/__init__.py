"""The self-test: is what this package computes on this machine right?

Some faults are in no line of ours: a compiler, a driver or a BLAS that gets a kernel wrong, without
NaN, without an error, until training goes wrong. `orpo-kernels selftest` compares every op, forward
and backward, in float32, bf16 and fp16, with its definition in float64, on the user's own device,
in a few seconds. Bug reports start with its output.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from time import perf_counter

import torch

from orpo_kernels.selftest import (
    compilers,
    forks,
    kept,
    logps,
    losses,
    model,
    schedule,
    sparse,
    startup,
    tiles,
)
from orpo_kernels.selftest.figures import Case, Setting
from orpo_kernels.selftest.report import (
    DTYPES,
    Check,
    SelfTestReport,
    dtype_name,
    headline,
    machine_of,
    tile_backends,
    versions,
)

__all__ = ["Check", "SelfTestReport", "main", "self_test"]

# The command begins no check after so many seconds, but on a GPU: `schedule.EndsInTime`.
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
        at a time as the host has processors: on Linux, and where nothing in the process has used
        the GPU before, in processes forked for that, else in threads. Leaves the random state,
        autocast, grad mode, garbage collection and the number of threads as they were. On the CPU
        the tile operations run on all of torch's threads, the rest on one.
    """
    return _self_test(device, json, lambda _, plan: schedule.Limit(seconds, plan.turns))


@startup.lean()  # until all is said: the first collection of what was made takes 0.15 s
def _self_test(
    device: torch.device | str | None,
    json: bool,
    limit_of: Callable[[float, schedule.Plan], schedule.Limit],
) -> SelfTestReport:
    start = perf_counter()
    with ExitStack() as stack:
        about = versions()
        _say(headline(about), json)
        wanted = _wanted(device)
        plan = schedule.plan_of(wanted, forks=compilers.can_fork(wanted))
        limit = limit_of(start, plan)
        if plan.workers:  # before the device is used
            begin = perf_counter()
            workers = stack.enter_context(compilers.compiling_beside(plan.workers, limit.wait))
            limit.loading_seconds = forks.load_kernels() - begin
            if workers is not None:
                limit.answers, limit.end_workers = workers.answers, workers.end
        where = usable_device(wanted)
        backends, machine = tile_backends(where), machine_of(where)
        _say(headline(machine | backends), json)
        skipped = []
        if find_spec("transformers") is None:
            skipped.append("fuse_head: transformers is not installed")
        threads = torch.get_num_threads()
        # Problems this small gain nothing from threads; on a busy machine they wait for each other.
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(1)
        of_tiles = threads if plan.threads == 1 else 1
        cases = tuple(_cases(where, of_tiles, with_model=not skipped))
        checks, left_out = schedule.run(cases, where, plan, limit)
    skipped += _left_out(left_out, limit)
    seconds = perf_counter() - start
    report = SelfTestReport(about | machine, backends, tuple(checks), tuple(skipped), seconds)
    sys.stdout.write((report.json() if json else report.findings()) + "\n")
    return report


def _usual_limit(start: float, plan: schedule.Plan) -> schedule.Limit:
    """That of the command."""
    if plan.turns is None:
        return schedule.Limit(LIMIT_S, None)
    return schedule.EndsInTime(plan.turns, start)


def _say(text: str, json: bool) -> None:
    """At once, but where JSON is all that may be printed."""
    if not json:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def _left_out(cases: Sequence[Case], limit: schedule.Limit) -> list[str]:
    """Which checks were left out, by op and dtype, and why."""
    waiting = [case for case in cases if limit.waits(case)]
    others = [case for case in cases if case not in waiting]
    lines = []
    if others:
        again = "again (what was compiled is remembered) or " if limit.compiles else ""
        lines.append(
            f"no time was left within {limit.seconds:g} s for {_named(others)}; run this {again}"
            "with --seconds 0 for no limit"
        )
    if waiting:
        took = f"about {limit.import_seconds:.0f} s" if limit.import_seconds else "long"
        lines.append(
            f"no time was left to import transformers, which takes {took}, for {_named(waiting)}; "
            "--seconds 0 takes it"
        )
    return lines


def _named(cases: Sequence[Case]) -> str:
    count = Counter(f"{case.op} in {dtype_name(case.setting.dtype)}" for case in cases)
    names = ", ".join(name if n == 1 else f"{name} ({n})" for name, n in count.items())
    return f"{len(cases)} checks: {names}"


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
        "--seconds", type=float,
        help=f"begin no check after so many, 0: no limit; default: {LIMIT_S:g}, on a GPU what ends "
        f"within {schedule.WARM_S:g}, within {schedule.COLD_S:g} where kernels are compiled",
    )  # fmt: skip
    options = parser.parse_args(argv)
    try:
        if options.seconds is None:
            report = _self_test(options.device, options.json, _usual_limit)
        else:
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
    where = _wanted(device)
    with _refusing(where):
        torch.empty(1, device=where)
    return where


def _wanted(device: torch.device | str | None) -> torch.device:
    """The same, which is not used yet."""
    if device is None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    with _refusing(device):
        return torch.device(device)


@contextmanager
def _refusing(device: torch.device | str) -> Iterator[None]:
    try:
        yield
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"device must be one torch can use, got {device}: {reason}") from error


def _cases(device: torch.device, threads: int, *, with_model: bool) -> Iterator[Case]:
    for dtype in DTYPES:
        setting = Setting(device, dtype, threads)
        yield from tiles.cases(setting)
        yield from losses.cases(setting)
        yield from logps.cases(setting)
        yield from kept.cases(setting)
        yield from sparse.cases(setting)
        if with_model:
            yield from model.cases(setting)
