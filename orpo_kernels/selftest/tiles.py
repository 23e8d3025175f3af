"""Checks of the tile operations, element by element: the dispatched kernel of this device."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels import reference
from orpo_kernels.engine.tiles import accumulate_, column_sums, softmax_grad_, softmax_stats
from orpo_kernels.selftest.figures import (
    EPS32,
    Case,
    Figure,
    Setting,
    exact,
    largest,
    rounded_once,
)

# 67 rows x 4,103 columns: primes, which no block divides, and more than one strip of plain torch.
ROWS, COLUMNS, FIRST_COLUMN = 67, 4103, 1000


class Transform(NamedTuple):
    """The logit transform of a tile."""

    name: str
    logit_scale: float = 1.0
    softcap: float | None = None
    bias: bool = False


TRANSFORMS = (
    Transform("plain"),
    Transform("bias, scale", 0.7, None, True),
    Transform("bias, scale, softcap", 0.7, 15.0, True),
)


class Tile(NamedTuple):
    """Logits, bias, labels (2, R); the true z (R, C), its slope, the size of what is rounded."""

    logits: Tensor
    bias: Tensor | None
    labels: Tensor
    z: Tensor
    slope: Tensor
    rounded: float


def cases(setting: Setting) -> Iterator[Case]:
    """The tile operations, in one dtype."""
    for transform in TRANSFORMS:
        yield Case("softmax_stats", transform.name, setting, _stats, (transform,))
    for transform in TRANSFORMS:
        yield Case("softmax_grad_", transform.name, setting, _grad, (transform,))
    yield Case("column_sums", "strided tile", setting, _column_sums)
    yield Case("accumulate_", "float32 += tile", setting, _accumulate)


def _tile(setting: Setting, transform: Transform) -> Tile:
    generator = setting.generator()
    logits = 3.0 * torch.randn(ROWS, COLUMNS, generator=generator)
    logits[1, 17] += 40.0  # one entry has all the mass
    if transform.name == "plain":
        logits[2] -= 1.0e4  # far from 0: only differences may matter
    logits = setting.put(logits)
    bias = torch.randn(COLUMNS, generator=generator) if transform.bias else None
    # Labels before, in and behind the tile, and none.
    labels = torch.randint(0, 6000, (2, ROWS), generator=generator)
    labels[:, ::7] = -1
    wide = None if bias is None else bias.double()
    z, slope = reference.tile_logits(
        exact(logits), wide, labels, FIRST_COLUMN, transform.logit_scale, transform.softcap
    )
    rounded = 0.0 if wide is None else largest(exact(logits) + wide)
    bias = None if bias is None else bias.to(setting.device)
    return Tile(logits, bias, labels.to(setting.device), z, slope, rounded)


def _stats(setting: Setting, transform: Transform) -> Iterator[Figure]:
    tile = _tile(setting, transform)
    with setting.all_threads():
        row_max, sum_exp = softmax_stats(
            tile.logits, tile.bias, tile.labels, FIRST_COLUMN,
            transform.logit_scale, transform.softcap,
        )  # fmt: skip
    yield rounded_once("max", row_max, tile.z.amax(1))
    # Per row, and relative to the maximum that was returned: that is how it is used.
    ratio = exact(sum_exp) / torch.exp(tile.z - exact(row_max)[:, None]).sum(1)
    yield Figure("sum", largest(ratio - 1.0), (16 + tile.rounded) * EPS32)


def _grad(setting: Setting, transform: Transform) -> Iterator[Figure]:
    # A float32 tile may also be rounded into a separate 16-bit one.
    narrow = (torch.bfloat16, torch.float16) if setting.dtype == torch.float32 else ()
    for out_dtype in (None, *narrow):
        tile = _tile(setting, transform)
        # The maximum of the whole row may lie in another block, above this tile's.
        level = (tile.z.amax(1) + 0.25).float()
        truth = reference.softmax_grad(tile.z, tile.slope, level.double())
        out = None if out_dtype is None else torch.empty_like(tile.logits, dtype=out_dtype)
        with setting.all_threads():
            softmax_grad_(
                tile.logits, tile.bias, tile.labels, FIRST_COLUMN, level.to(setting.device),
                transform.logit_scale, transform.softcap, out,
            )  # fmt: skip
        written = tile.logits if out is None else out
        yield rounded_once(f"tile in {written.dtype}", written, truth, tile.rounded)


def _column_sums(setting: Setting) -> Iterator[Figure]:
    generator = setting.generator()
    tile = setting.put(torch.rand(ROWS, COLUMNS, generator=generator))[3:, 11:-5]
    coefficients = torch.randn(ROWS - 3, generator=generator)
    terms = exact(tile) * coefficients.double()[:, None]
    with setting.all_threads():
        sums = column_sums(tile, coefficients.to(setting.device))
    error = exact(sums) - terms.sum(0)
    yield Figure("sums", largest(error / terms.abs().sum(0)), 8 * EPS32)


def _accumulate(setting: Setting) -> Iterator[Figure]:
    generator = setting.generator()
    partial = setting.put(torch.randn(ROWS, COLUMNS, generator=generator))
    before = torch.randn(ROWS, COLUMNS, generator=generator)
    rescale = torch.rand(ROWS, generator=generator)
    for factor, alpha in ((rescale, 1.0), (None, -1.0)):  # the forward, the weight gradient
        sums = before.to(setting.device, copy=True)
        with setting.all_threads():
            accumulate_(sums, partial, None if factor is None else factor.to(sums.device), alpha)
        wide = None if factor is None else factor.double()
        truth = reference.accumulate(before.double(), exact(partial), wide, alpha)
        yield rounded_once(f"sums, alpha {alpha:+.0f}", sums, truth)
