"""Runs the checks: one after another, or side by side where each first compiles its kernels.

A compiler leaves Python's lock alone for most of its time, so that threads are enough. Results do
not depend on how many there are: a check draws from generators of its own.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from time import perf_counter

import torch

from orpo_kernels.kernels import runs_triton
from orpo_kernels.selftest.figures import Case
from orpo_kernels.selftest.report import Check, dtype_name

MOST_WORKERS = 8  # 16 were slower: what is left of Python waits for its lock
# What takes longest comes first, so that none of it is what is waited for in the end: transformers
# is imported, and the larger kernels are compiled.
_SLOW = ("fuse_head", "linear_lse", "sparse_token_logps", "linear_logps", "slot_gradient")


def workers_of(device: torch.device) -> int:
    """Checks at a time: as many as the host has processors where Triton compiles, else one."""
    if not runs_triton(device, torch.float32):
        return 1
    return min(MOST_WORKERS, os.cpu_count() or 1)


def run(
    cases: Sequence[Case], device: torch.device, workers: int, seconds: float | None
) -> tuple[list[Check], list[Case]]:
    """The checks in the order of the cases, and the cases that no time was left for.

    Args:
        cases: what to check.
        device: where they compute.
        workers: how many at a time.
        seconds: none is begun after so many; None: all are.

    Returns:
        The checks, and the cases left out.
    """
    until = None if seconds is None else perf_counter() + seconds
    order = list(range(len(cases)))
    if workers > 1:
        order = sorted(order, key=lambda i: _urgency(cases[i]))
    check = partial(_unless_late, device=device, until=until)
    # One thread of torch's each: problems this small gain nothing from more.
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        take = pool.map if workers > 1 else map
        found = dict(zip(order, take(check, [cases[i] for i in order]), strict=True))
    checks = [each for i in range(len(cases)) if (each := found[i]) is not None]
    return checks, [case for i, case in enumerate(cases) if found[i] is None]


def _urgency(case: Case) -> tuple[bool, int]:
    """bfloat16, which most train in, before the others."""
    slow = _SLOW.index(case.op) if case.op in _SLOW else len(_SLOW)
    return case.setting.dtype != torch.bfloat16, slow


def _unless_late(case: Case, *, device: torch.device, until: float | None) -> Check | None:
    if until is not None and perf_counter() > until:
        return None
    with _surroundings(device):
        return _checked(case)


@contextmanager
def _surroundings(device: torch.device) -> Iterator[None]:
    """What a check finds, whatever its caller has set: these belong to each thread."""
    with ExitStack() as stack:
        # Inputs and truths are made on the CPU, whatever the caller's default device.
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        yield


def _checked(case: Case) -> Check:
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
