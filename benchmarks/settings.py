"""What a run is told by environment variables (plain pytest works too), and its record."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

DEVICE = "ORPO_BENCH_DEVICE"  # "cpu" or "cuda"; default: a GPU if there is one
PLAN = "ORPO_BENCH_PLAN"  # whose list of cases: "cpu" or "cuda"; default: the device's
TINY = "ORPO_BENCH_TINY"  # "1": tiny sizes though timing is on (dry run)
RECORD = "ORPO_BENCH_RECORD"  # file that takes one JSON line per result; what it has is not rerun
CLOCK = "ORPO_BENCH_CLOCK"  # "wall", or "cpu": processor time of this process, on a shared machine
DEADLINE = "ORPO_BENCH_DEADLINE"  # seconds since the epoch after which nothing new is started


def device() -> str:
    """ "cuda" or "cpu"."""
    return os.environ.get(DEVICE) or ("cuda" if torch.cuda.is_available() else "cpu")


def plan() -> str:
    """Whose list of cases is run: a dry run on a CPU takes the GPU's."""
    return os.environ.get(PLAN) or device()


def tiny() -> bool:
    """Whether a timed run uses tiny sizes."""
    return os.environ.get(TINY) == "1"


def clock() -> Callable[[], float]:
    """Seconds on a CPU by the clock of this run."""
    return time.process_time if os.environ.get(CLOCK) == "cpu" else time.perf_counter


def late() -> bool:
    """Whether the time for this run is over."""
    return time.time() > float(os.environ.get(DEADLINE, "inf"))


def recorded() -> list[dict[str, Any]]:
    """The results so far."""
    path = os.environ.get(RECORD)
    if not path or not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line]


def record(result: dict[str, Any]) -> None:
    """Add one result to the record, if there is one."""
    path = os.environ.get(RECORD)
    if path:
        with Path(path).open("a") as lines:
            lines.write(json.dumps(result) + "\n")


@contextlib.contextmanager
def failures_recorded(case: str, implementation: str, *, tolerated: bool) -> Iterator[None]:
    """Put an exception into the record; a tolerated one (a peer's, timed) skips the test."""
    try:
        yield
    except Exception as error:
        what = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        record({"case": case, "implementation": implementation, "failed": what})
        if tolerated:
            pytest.skip(f"{implementation} failed: {what}")
        raise
