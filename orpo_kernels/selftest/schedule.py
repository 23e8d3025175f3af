"""Runs the checks: one after another, or in processes side by side where each compiles its kernels.

Processes, as threads would wait for Python's lock: on an H200's host 16 of them took 39 s. And a
kernel that kills its process, or leaves its device in an error, fails its own check and no other.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from time import perf_counter

import torch

from orpo_kernels.kernels import runs_triton
from orpo_kernels.selftest.checking import checked, failed, labels_of
from orpo_kernels.selftest.figures import Case
from orpo_kernels.selftest.report import Check

MOST_WORKERS = 12
_WORKER_BYTES = 2**30  # of the device: a context, the kernels, and small tensors
# What takes longest comes first, so that none of it is what is waited for in the end: transformers
# is imported, and the larger kernels are compiled.
_SLOW = ("fuse_head", "linear_lse", "sparse_linear_logps", "linear_logps", "slot_gradient")


def workers_of(device: torch.device) -> int:
    """Processes: as many as the host has processors and the device room for, where Triton compiles.

    Elsewhere one, which is the caller's own.
    """
    if not runs_triton(device, torch.float32):
        return 1
    room = MOST_WORKERS
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0] // _WORKER_BYTES
    return max(1, min(MOST_WORKERS, os.cpu_count() or 1, room))


def run(
    cases: Sequence[Case], device: torch.device, workers: int, seconds: float | None
) -> tuple[list[Check], list[Case]]:
    """The checks in the order of the cases, and the cases that no time was left for.

    Args:
        cases: what to check.
        device: where they compute.
        workers: processes; 1: this one.
        seconds: none is begun after so many; None: all are.

    Returns:
        The checks, and the cases left out.
    """
    until = None if seconds is None else perf_counter() + seconds
    found: dict[int, Check] = {}
    if workers == 1:
        for i, case in enumerate(cases):
            if until is None or perf_counter() <= until:
                found[i] = checked(case)
    else:
        waiting: SimpleQueue[int] = SimpleQueue()
        for i in sorted(range(len(cases)), key=lambda i: _urgency(cases[i])):
            waiting.put(i)
        with ThreadPoolExecutor(workers) as pool:
            for _ in pool.map(
                lambda _: _serve(waiting, cases, device, until, found), range(workers)
            ):
                pass
    checks = [found[i] for i in range(len(cases)) if i in found]
    return checks, [case for i, case in enumerate(cases) if i not in found]


def _urgency(case: Case) -> tuple[bool, int]:
    """bfloat16, which most train in, before the others."""
    slow = _SLOW.index(case.op) if case.op in _SLOW else len(_SLOW)
    return case.setting.dtype != torch.bfloat16, slow


def _serve(
    waiting: SimpleQueue[int],
    cases: Sequence[Case],
    device: torch.device,
    until: float | None,
    found: dict[int, Check],
) -> None:
    """Lets a process check what is waiting; one that dies is replaced."""
    worker = None
    while until is None or perf_counter() <= until:
        try:
            i = waiting.get_nowait()
        except Empty:
            break
        if worker is None:
            worker = _Worker(device, with_model=any(case.op == "fuse_head" for case in cases))
        found[i] = worker.check(cases[i])
        if not worker.is_alive:
            worker = None
    if worker is not None:
        worker.close()


class _Worker:
    """A process of `worker.py`."""

    def __init__(self, device: torch.device, *, with_model: bool) -> None:
        # It finds the same package as this process, wherever that was found.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - `close` does
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.worker", str(device), str(int(with_model))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, env=environment,
            text=True, bufsize=1,
        )  # fmt: skip

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def check(self, case: Case) -> Check:
        """What the process finds; that it died, if it does."""
        labels = labels_of(case)
        asked, answers = self.process.stdin, self.process.stdout
        if asked is None or answers is None:
            raise RuntimeError("a worker without pipes")
        try:
            asked.write(json.dumps(labels) + "\n")
            answer = answers.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            return Check(**json.loads(answer))
        code = self.process.wait()
        self.errors.seek(0)
        last = (self.errors.read().strip().splitlines() or ["no message"])[-1]
        return failed(labels, f"its process ended with exit status {code}: {last}")

    def close(self) -> None:
        """Lets the process end."""
        self.process.communicate()
        self.errors.close()
