"""How a call is timed on a device."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


def median_s(call: Callable[[], Any], device: str, rounds: int, flush: torch.Tensor) -> float:
    """Median seconds of a call that finds nothing of its own in the second-level cache."""
    for _ in range(2):
        call()
    times = []
    for _ in range(rounds):
        flush.zero_()
        if device == "cpu":
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)
