"""Time of the sparse gradient's kernels over what they cannot go under.

`softmax_compact`: bytes of the tile / copy bandwidth. `slot_matmul`: FLOP of what is kept over
the rate of a square GEMM. The weight gradient: bytes of dW / copy bandwidth. Of a tile that keeps
one row's entry in 1, 5 or 15 % of the columns of every 64 rows. And the whole of `linear_logps`,
forward and backward, beside the exact gradient, on hidden states that are near their label's row.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from orpo_kernels import linear_logps
from orpo_kernels.constants import DEFAULT_EPS
from orpo_kernels.kernels import has_slots, launcher
from orpo_kernels.kernels.segment_store import Slots
from tests.gpu.timing import median_s

ROUNDS = 10


class Shape(NamedTuple):
    """Rows of a chunk, hidden size, vocabulary."""

    R: int
    H: int
    V: int


def sparse_shares(device: str, bandwidth: float, *, tiny: bool) -> list[dict[str, Any]]:
    """By kernel and kept share: microseconds, and the share of its floor (bytes/s, or FLOP/s)."""
    shape = Shape(128, 64, 1024) if tiny else Shape(2048, 4096, 128256)
    flush = torch.empty(2**16 if tiny else 2**28, dtype=torch.uint8, device=device)
    timed = functools.partial(median_s, device=device, rounds=3 if tiny else ROUNDS, flush=flush)
    side = 256 if tiny else 8192
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    flops = 2 * side**3 / timed(functools.partial(torch.mm, a, b))
    results = []
    for name, seconds, floor_s in _kernels(device, shape, timed, bandwidth, flops):
        results.append(
            {"name": name, "time_us": seconds * 1e6, "share_of_floor": floor_s / seconds}
        )
        sys.stdout.write(f"{name:60}{seconds * 1e6:10.1f} us {floor_s / seconds:7.1%} of floor\n")
    for name, seconds in _steps(device, shape, timed):
        results.append({"name": name, "time_us": seconds * 1e6})
        sys.stdout.write(f"{name:60}{seconds * 1e6:10.1f} us\n")
    return results


def _kernels(
    device: str, shape: Shape, timed: Callable[..., float], bandwidth: float, flops: float
) -> Iterator[tuple[str, float, float]]:
    R, H, V = shape
    if not has_slots(torch.device(device), torch.float32):
        return  # a dry run: no kernel of these runs there
    softmax_compact = launcher("softmax_compact", "softmax_compact")
    slot_matmul = launcher("gather_matmul", "slot_matmul")
    labels = torch.zeros((1, R), dtype=torch.int64, device=device)
    level, groups = torch.zeros(R, device=device), torch.arange(R, device=device) % 2
    weight = torch.randn(V, H, device=device).to(torch.bfloat16)
    for dtype in (torch.float32, torch.bfloat16):
        for percent in (1, 5, 15):
            logits = torch.full((R, V), -20.0, device=device, dtype=dtype)
            columns = torch.rand(R // 64, V, device=device) < percent / 100
            row = torch.randint(0, 64, (R // 64, V), device=device)
            lane = torch.arange(64, device=device)[:, None]
            logits.view(R // 64, 64, V)[(row[:, None] == lane) & columns[:, None]] = 0.0
            tile, tail = torch.empty_like(logits), torch.zeros(2, V, device=device)
            restore = functools.partial(tile.copy_, logits)

            def compact(tile=tile, tail=tail, restore=restore):
                restore()
                return softmax_compact(
                    tile, None, labels, 0, level, level + 1, DEFAULT_EPS, 1.0, None, groups, tail
                )

            name = f"{str(dtype).removeprefix('torch.')}, {percent} % of {R} x {V}"
            seconds = max(timed(compact) - timed(restore), 1e-9)
            size = tile.numel() * tile.element_size()
            yield f"softmax_compact {name}", seconds, size / bandwidth
            kept, sums = compact(), torch.zeros(R, H, device=device)
            work = 2.0 * int(kept.entries) * H / flops
            product = functools.partial(slot_matmul, sums, kept, weight)
            yield f"slot_matmul {name}", timed(product), work
            if dtype == torch.float32:
                yield from _weight_gradient(shape, kept, timed, bandwidth, name)


def _weight_gradient(
    shape: Shape, kept: Slots, timed: Callable[..., float], bandwidth: float, name: str
) -> Iterator[tuple[str, float, float]]:
    from orpo_kernels.kernels import row_segments, weight_gradient
    from orpo_kernels.kernels.segment_store import segment_store, table_bytes

    R, H, V = shape
    new = functools.partial(torch.empty, device=kept.mass.device)
    size = table_bytes(R, V, 1) + 128 * R * V // 256
    store = segment_store(new(size, dtype=torch.uint8), R, V, 1)
    store.used[:1].zero_()
    pack = functools.partial(row_segments.pack_segments, store, kept, 0, 0, 0)
    seconds = timed(pack)
    moved = 3 * 128 * int(store.used[1])
    yield f"pack_segments {name}", seconds, moved / bandwidth
    lists = weight_gradient.list_tokens(store, 0, V)
    hidden = torch.randn(R, H, device=kept.mass.device).to(torch.bfloat16)
    labels = torch.randint(0, V, (1, R), device=hidden.device)
    targets = weight_gradient.sort_targets(labels, torch.ones_like(labels, dtype=torch.float), 0, V)
    dweight, ones = new((V, H), dtype=torch.bfloat16), torch.ones(1, device=hidden.device)
    tail, rows = torch.rand(2, V, device=hidden.device), torch.rand(2, H, device=hidden.device)
    gradient = functools.partial(
        weight_gradient.segment_weight_gradient, dweight, store, lists, hidden, ones, tail, rows,
        targets, hidden,
    )  # fmt: skip
    yield f"segment_weight_gradient {name}", timed(gradient), dweight.nbytes / bandwidth


def _steps(device: str, shape: Shape, timed: Callable[..., float]) -> Iterator[tuple[str, float]]:
    _, H, V = shape
    N = 4 * shape.R
    weight = torch.randn(V, H, device=device).to(torch.bfloat16)
    labels = torch.randint(0, V, (N,), device=device)
    hidden = (weight[labels].float() * (14 / H)).to(torch.bfloat16).requires_grad_()
    for trains in (False, True):
        weight.requires_grad_(trains)
        wanted = [hidden, weight] if trains else [hidden]
        for gradient in ("exact", "sparse"):

            def step(gradient=gradient, wanted=wanted):
                logps = linear_logps(hidden, weight, labels, gradient=gradient)
                return torch.autograd.grad(logps.sum(), wanted)

            head = "trainable" if trains else "frozen"
            yield f"linear_logps {gradient}, {head} head, N = {N}", timed(step)
