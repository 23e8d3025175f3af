"""Time of each row kernel over its byte floor: bytes it must move / measured copy bandwidth.

python -m tests.gpu.row_times [--json FILE] [--tiny] [--device cpu]
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from orpo_kernels.engine import tiles
from orpo_kernels.odds_ratio import odds_ratio_loss
from orpo_kernels.sequence_mean import sequence_mean

# Rows: an evaluation's few, a 64 MiB workspace's (256), a large one's. Columns: Llama 3's
# vocabulary, and one whose rows start anywhere in a vector.
SHAPES = ((128, 128256), (256, 128256), (1024, 128256), (4096, 128256), (1024, 32003))
ROUNDS = 20


class Work(NamedTuple):
    """A call to time: its name, the bytes it must read and write, and the call."""

    name: str
    floor_bytes: int
    call: Callable[[], Any]


def works(device: str, shapes: tuple[tuple[int, int], ...]) -> Iterator[Work]:
    """Every row kernel at every shape; tensors are made one shape at a time."""
    for rows, columns in shapes:
        labels = torch.randint(0, columns, (1, rows), device=device)
        for dtype in (torch.bfloat16, torch.float32):
            tile = torch.randn(rows, columns, device=device).to(dtype)
            reference = tile.float().amax(1)
            name = f"{rows} x {columns} {str(dtype).removeprefix('torch.')}"
            size = tile.numel() * tile.element_size()

            def stats(tile=tile, labels=labels, **asked):
                return tiles.softmax_stats(tile, None, labels, 0, 1.0, None, **asked)

            def grad(tile=tile, labels=labels, reference=reference, out=None):
                tiles.softmax_grad_(tile, None, labels, 0, reference, 1.0, None, out)

            def sums(tile=tile, weights=reference):
                return tiles.column_sums(tile, weights)

            yield Work(f"softmax_stats {name}", size, stats)
            with_sum = functools.partial(stats, with_logit_sum=True)
            yield Work(f"softmax_stats {name} with logit sum", size, with_sum)
            yield Work(f"column_sums {name}", size, sums)
            if dtype == torch.float32:
                out = torch.empty_like(tile, dtype=torch.bfloat16)
                into = size + out.numel() * out.element_size()
                yield Work(
                    f"softmax_grad_ {name} to bfloat16", into, functools.partial(grad, out=out)
                )
            yield Work(f"softmax_grad_ {name}", 2 * size, grad)  # in place: last
    values = -torch.rand(16, 8192, device=device)
    mask = torch.ones_like(values, dtype=torch.bool)
    means = functools.partial(sequence_mean, values, mask, None, 16)
    yield Work("sequence_mean 16 x 8192", 5 * values.numel(), means)
    logps = -torch.rand(64, device=device)
    yield Work("odds_ratio 64 pairs", 16 * 64, functools.partial(odds_ratio_loss, logps, logps * 2))


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


def measure(device: str, *, tiny: bool) -> dict[str, Any]:
    """Copy bandwidth (bytes read and written per second) and every kernel's share of it."""
    cells = 2**20 if tiny else 2**29
    rounds = 3 if tiny else ROUNDS
    flush = torch.empty(2**16 if tiny else 2**28, dtype=torch.uint8, device=device)
    source = torch.ones(cells, dtype=torch.float16, device=device)
    target = torch.empty_like(source)
    copy = functools.partial(target.copy_, source)
    bandwidth = 4 * cells / median_s(copy, device, rounds, flush)
    del source, target, copy
    results = []
    for work in works(device, ((3, 1003), (8, 512)) if tiny else SHAPES):
        seconds = median_s(work.call, device, rounds, flush)
        share = work.floor_bytes / bandwidth / seconds
        results.append({"name": work.name, "time_us": seconds * 1e6, "share_of_copy": share})
        sys.stdout.write(f"{work.name:48}{seconds * 1e6:10.1f} us {share:7.1%} of copy\n")
    return {"copy_gb_per_s": bandwidth / 1e9, "kernels": results}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    figures = measure(args.device, tiny=args.tiny)
    sys.stdout.write(f"copy: {figures['copy_gb_per_s']:.0f} GB/s\n")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
