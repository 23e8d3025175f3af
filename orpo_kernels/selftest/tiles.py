"""Checks of the tile operations, element by element: the dispatched kernel of this device."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels import reference
from orpo_kernels.engine.linear_lse import linear_lse
from orpo_kernels.engine.tiles import (
    accumulate_,
    column_sums,
    csr_matmul_,
    softmax_collect_,
    softmax_grad_,
    softmax_stats,
)
from orpo_kernels.selftest.figures import (
    EPS32,
    Case,
    Figure,
    Setting,
    exact,
    largest,
    rounded_once,
)

# 67 rows x 4,103 columns: primes, which no block divides. 19 rows of what is done row by row.
ROWS, FEW_ROWS, COLUMNS, FIRST_COLUMN = 67, 19, 4103, 1000
VOCABULARY = 2053  # of a head, whose tiles have 64 to 256 columns
WIDTH, SHARE = 33, 2.0**-8  # of a product that is redone; of the known sum, above it collected


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
    yield Case("softmax_stats", "sum of the logits", setting, _logit_sum, (TRANSFORMS[-1],))
    for transform in TRANSFORMS:
        yield Case("softmax_grad_", transform.name, setting, _grad, (transform,))
    for transform in TRANSFORMS:
        yield Case("softmax_collect_", transform.name, setting, _collect, (transform,))
    yield Case("csr_matmul_", "lists of 0 to 8 entries", setting, _csr_matmul)
    for width, what in ((48, "rows on 16 bytes"), (WIDTH, "rows on any byte")):
        yield Case("linear_lse", what, setting, _lse, (TRANSFORMS[-1], width))
    yield Case("column_sums", "strided tile", setting, _column_sums)
    yield Case("accumulate_", "float32 += tile", setting, _accumulate)


def _tile(setting: Setting, transform: Transform, product: Tensor | None = None) -> Tile:
    generator = setting.generator()
    if product is None:
        product = 3.0 * torch.randn(FEW_ROWS, COLUMNS, generator=generator)
        product[1, 17] += 40.0  # one entry has all the mass
        if transform.name == "plain":
            product[2] -= 1.0e4  # far from 0: only differences may matter
    logits = setting.put(product)
    bias = torch.randn(COLUMNS, generator=generator) if transform.bias else None
    # Labels before, in and behind the tile, and none.
    labels = torch.randint(0, 6000, (2, FEW_ROWS), generator=generator)
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
        row_max, sum_exp, _ = softmax_stats(
            tile.logits, tile.bias, tile.labels, FIRST_COLUMN,
            transform.logit_scale, transform.softcap,
        )  # fmt: skip
    yield rounded_once("max", row_max, tile.z.amax(1))
    # Per row, and relative to the maximum that was returned: that is how it is used.
    ratio = exact(sum_exp) / torch.exp(tile.z - exact(row_max)[:, None]).sum(1)
    yield Figure("sum", largest(ratio - 1.0), (16 + tile.rounded) * EPS32)


def _logit_sum(setting: Setting, transform: Transform) -> Iterator[Figure]:
    tile = _tile(setting, transform)
    options = (transform.logit_scale, transform.softcap)
    with setting.all_threads():
        _, _, logit_sum = softmax_stats(
            tile.logits, tile.bias, tile.labels, FIRST_COLUMN, *options, with_logit_sum=True
        )
    wide, bias = exact(tile.logits), None if tile.bias is None else exact(tile.bias)
    terms, _ = reference.transform(wide if bias is None else wide + bias, *options)
    error = exact(logit_sum) - terms.sum(1)
    yield Figure("sum of z", largest(error / terms.abs().sum(1)), 8 * EPS32)


def _grad(setting: Setting, transform: Transform) -> Iterator[Figure]:
    # A float32 tile may also be rounded into a separate 16-bit one: the last that is done.
    narrows = setting.dtype == torch.float32 and transform == TRANSFORMS[-1]
    narrow = (torch.bfloat16, torch.float16) if narrows else ()
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


def _collect(setting: Setting, transform: Transform) -> Iterator[Figure]:
    """The second tile of two: what was before it is rescaled, large entries are redone."""
    generator = setting.generator()
    weight = setting.put(torch.randn(COLUMNS, WIDTH, generator=generator))
    hidden = setting.put(torch.randn(FEW_ROWS, WIDTH, generator=generator) / 2)
    tile = _tile(setting, transform, (exact(hidden) @ exact(weight).t()).float())
    before = tile.z.amax(1).float().to(setting.device) - 0.5
    bias = None if tile.bias is None else tile.bias.double().cpu()
    redone, slopes = reference.tile_logits(
        exact(hidden) @ exact(weight).t(), bias, tile.labels.cpu(), FIRST_COLUMN,
        transform.logit_scale, transform.softcap,
    )  # fmt: skip
    row_max, sum_exp = before.clone(), torch.ones_like(before)
    with setting.all_threads():
        rescale, *entries = softmax_collect_(
            tile.logits, tile.bias, tile.labels, FIRST_COLUMN, row_max, sum_exp, None,
            hidden, weight, SHARE, COLUMNS, transform.logit_scale, transform.softcap, True, True,
        )  # fmt: skip
    yield rounded_once("max", row_max, torch.maximum(tile.z.amax(1), exact(before)))
    level = exact(row_max)[:, None]
    yield rounded_once("rescale", rescale, torch.exp(exact(before) - level[:, 0]))
    offsets, columns, values = (each.cpu() for each in entries)
    rows = torch.arange(FEW_ROWS).repeat_interleave(offsets.diff())
    taken = torch.zeros(tile.z.shape, dtype=torch.bool)
    taken[rows, columns.long()] = True
    e = torch.exp(tile.z - level)
    value = e * tile.slope
    known = torch.exp(exact(before) - level[:, 0]) + e.sum(1)
    # Rounding decides about an entry this close to the limit.
    sure = (value / (SHARE * known[:, None]) - 1).abs() > 2 * setting.eps
    wrong = (taken != (value > SHARE * known[:, None])) & sure
    yield Figure("entries chosen wrongly", float(wrong.sum()), 0.0)
    again = torch.exp(redone - level)
    limit = (64 + tile.rounded) * EPS32
    truth = (again * slopes)[rows, columns.long()]
    yield Figure("values", largest(exact(values) / truth - 1.0), limit)
    total = torch.exp(exact(before) - level[:, 0]) + torch.where(taken, again, e).sum(1)
    yield Figure("sum", largest(exact(sum_exp) / total - 1.0), limit + setting.eps / 8)
    rest = torch.where(taken, 0.0, value)
    yield rounded_once("tile", tile.logits, rest, tile.rounded)


def _csr_matmul(setting: Setting) -> Iterator[Figure]:
    generator = setting.generator()
    counts = torch.randint(0, 9, (ROWS,), generator=generator)
    total = int(counts.sum())
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    columns = torch.randint(0, COLUMNS, (total,), generator=generator)
    values = torch.randn(total, generator=generator)
    weight = setting.put(torch.randn(COLUMNS, WIDTH, generator=generator))
    before = torch.randn(ROWS, WIDTH, generator=generator)
    sums, lists = before.to(setting.device, copy=True), (offsets, columns.int(), values)
    with setting.all_threads():
        csr_matmul_(sums, *(each.to(setting.device) for each in lists), weight)
    rows = torch.arange(ROWS).repeat_interleave(counts)
    terms = values.double()[:, None] * exact(weight)[columns]
    yield rounded_once("sums", sums, before.double().index_add_(0, rows, terms))


def _lse(setting: Setting, transform: Transform, width: int) -> Iterator[Figure]:
    """Statistics of a head; a 16-bit GEMM of a CPU rounds its logits: in sums that averages out."""
    generator = setting.generator()
    hidden = setting.put(torch.randn(ROWS, width, generator=generator))
    weight = setting.put(torch.randn(VOCABULARY, width, generator=generator) / 2)
    bias = torch.randn(VOCABULARY, generator=generator)
    labels = torch.randint(-1, VOCABULARY, (2, ROWS), generator=generator)
    options = (transform.logit_scale, transform.softcap)
    with setting.all_threads():
        row_max, sum_exp, dots, logit_sum = linear_lse(
            hidden, weight, bias.to(setting.device), labels.to(setting.device), *options, True
        )
    true = reference.linear_lse(exact(hidden), exact(weight), bias.double(), labels, *options)
    # The slope of a logit is at most the scale.
    size = transform.logit_scale * largest(exact(hidden) @ exact(weight).t())
    yield Figure("max", largest(exact(row_max) - true[0]) / size, setting.eps)
    error = exact(row_max) + exact(sum_exp).log() - true[0] - true[1].log()
    yield Figure("log-sum-exp", largest(error) / size, setting.eps / 8)
    yield Figure("dots", largest(exact(dots) - true[2]) / largest(true[2]), 16 * EPS32)
    error = exact(logit_sum) - true[3]
    yield Figure("sum of z", largest(error) / (size * VOCABULARY), setting.eps / 64)


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
    partial = setting.put(torch.randn(FEW_ROWS, COLUMNS, generator=generator))
    before = torch.randn(FEW_ROWS, COLUMNS, generator=generator)
    rescale = torch.rand(FEW_ROWS, generator=generator)
    for factor, alpha in ((rescale, 1.0), (None, -1.0)):  # the forward, the weight gradient
        sums = before.to(setting.device, copy=True)
        with setting.all_threads():
            accumulate_(sums, partial, None if factor is None else factor.to(sums.device), alpha)
        wide = None if factor is None else factor.double()
        truth = reference.accumulate(before.double(), exact(partial), wide, alpha)
        yield rounded_once(f"sums, alpha {alpha:+.0f}", sums, truth)
