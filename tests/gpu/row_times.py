"""Time of each row kernel over its byte floor: bytes it must move / measured copy bandwidth.

And of `linear_lse` over the bare GEMM, with each tile its table has, so that a better one shows;
and of the kernels of the sparse gradient (`sparse_times.py`).

python -m tests.gpu.row_times [--json FILE] [--tiny] [--device cpu]
"""

import argparse
import contextlib
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from orpo_kernels.engine import tiles
from orpo_kernels.engine.linear_lse import linear_lse
from orpo_kernels.kernels import gpu_backend
from orpo_kernels.odds_ratio import odds_ratio_loss
from orpo_kernels.pair_loss import pair_loss
from orpo_kernels.sequence_mean import sequence_mean
from tests.gpu.loop_times import loop_works
from tests.gpu.sparse_times import sparse_shares
from tests.gpu.timing import median_s

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
    labels = torch.ones_like(values, dtype=torch.int64)
    both = functools.partial(sequence_mean, values, labels, (values, labels), num_sequences=16)
    yield Work("sequence_mean 16 x 8192, and 8 of the NLL", 18 * values.numel(), both)
    logps, count = -torch.rand(1, 128, device=device), torch.ones(1, 128, device=device)
    pairs = functools.partial(odds_ratio_loss, logps[0, :64], logps[0, 64:])
    yield Work("odds_ratio 64 pairs", 16 * 64, pairs)
    loss = functools.partial(pair_loss, logps, count, beta=0.1, by_token=True)
    yield Work("pair_loss 64 pairs", 24 * 64, loss)
    for each in loop_works(device, tiny=len(shapes) < len(SHAPES)):
        yield Work(*each)


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


def gemm_shares(device: str, *, tiny: bool) -> list[dict[str, Any]]:
    """TFLOP/s of `linear_lse` and of the GEMM of 16-bit logits alone: N 8192, H 4096, V 128256."""
    N, H, V = (64, 32, 1003) if tiny else (8192, 4096, 128256)
    dtype = torch.bfloat16
    hidden = torch.randn(N, H, device=device).to(dtype)
    weight = (torch.randn(V, H, device=device) * H**-0.5).to(dtype)
    labels = torch.randint(0, V, (1, N), device=device)
    flush = torch.empty(2**16 if tiny else 2**28, dtype=torch.uint8, device=device)
    logits = torch.empty(N, V, dtype=dtype, device=device)
    gemm = functools.partial(torch.mm, hidden, weight.t(), out=logits)
    bare = median_s(gemm, device, 5, flush)
    del logits, gemm
    results = []
    for name, restrict in _tiles(hidden):
        with restrict:
            seconds = median_s(
                lambda: linear_lse(hidden, weight, None, labels, 1.0, None, False), device, 5, flush
            )
        tflops = 2e-12 * N * H * V / seconds
        results.append(
            {"name": name, "tflop_per_s": tflops, "share_of_gemm": bare / seconds,
             "gemm_tflop_per_s": 2e-12 * N * H * V / bare}
        )  # fmt: skip
        sys.stdout.write(f"{name:60}{tflops:8.1f} TFLOP/s {bare / seconds:7.1%} of the GEMM\n")
    return results


def _tiles(hidden: torch.Tensor) -> Iterator[tuple[str, contextlib.AbstractContextManager[Any]]]:
    """The tiles to time: those of the table for this device, or what a CPU has."""
    if hidden.device.type == "cpu" or gpu_backend() != "triton":
        yield "linear_lse plain torch", contextlib.nullcontext()
        return
    from orpo_kernels.kernels import linear_lse as launcher
    from orpo_kernels.kernels import tuning

    info = tuning.device_info(hidden.device)
    key = (f"linear_lse_{launcher._form(hidden, hidden, info)}", info.architecture, hidden.dtype)
    for tile in tuning.TABLE[key]:
        yield f"linear_lse {tuple(tile)}", mock.patch.dict(tuning.TABLE, {key: (tile,)})


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    figures = measure(args.device, tiny=args.tiny)
    figures["gemm"] = gemm_shares(args.device, tiny=args.tiny)
    figures["sparse"] = sparse_shares(args.device, tiny=args.tiny)
    sys.stdout.write(f"copy: {figures['copy_gb_per_s']:.0f} GB/s\n")
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
