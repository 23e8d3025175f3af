"""Time of the sparse gradient beside the exact one: `linear_logps`, forward and backward.

On hidden states that are near their label's row, of a frozen head and of one that trains. Its
kernels one by one: `python -m benchmarks.sparse_times`.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from orpo_kernels import linear_logps
from tests.gpu.timing import median_s

ROUNDS = 10


class Shape(NamedTuple):
    """Rows of a chunk, hidden size, vocabulary."""

    R: int
    H: int
    V: int


def sparse_shares(device: str, *, tiny: bool) -> list[dict[str, Any]]:
    """By gradient and head: microseconds."""
    shape = Shape(128, 64, 1024) if tiny else Shape(2048, 4096, 128256)
    flush = torch.empty(2**16 if tiny else 2**28, dtype=torch.uint8, device=device)
    timed = functools.partial(median_s, device=device, rounds=3 if tiny else ROUNDS, flush=flush)
    results = []
    for name, seconds in _steps(device, shape, timed):
        results.append({"name": name, "time_us": seconds * 1e6})
        sys.stdout.write(f"{name:60}{seconds * 1e6:10.1f} us\n")
    return results


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
