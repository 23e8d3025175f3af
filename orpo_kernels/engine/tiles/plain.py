"""The plain-torch form of the tile operations, for every backend without a kernel of its own.

The operations are described in `tiles/schemas.py`. A 16-bit tile is widened in strips of a few MiB,
never as a whole. What other plain forms share is here, once: the transform of logits, the merge of
two online softmaxes, and sums by index that do not depend on the order of threads.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.engine.budget import STRIPS, accumulation_dtype, strip_bytes


def softcapped(z: Tensor, softcap: float) -> tuple[Tensor, Tensor]:
    """`c tanh(z / c)` and its slope, `1 / cosh^2`, which keeps its digits at a saturated cap."""
    x = z / softcap
    capped = torch.tanh(x).mul_(softcap)
    decay = x.abs_().mul_(-2.0).exp_()
    denominator = (decay + 1.0).square_()
    return capped, decay.mul_(4.0).div_(denominator)


def transformed(
    dots: Tensor,
    bias: Tensor | None,
    columns: Tensor,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Logits z and slopes d of single raw dots, each of a column, in the dtype of `dots`."""
    if bias is not None:
        dots = dots + bias.index_select(0, columns).to(dots.dtype)
    z = dots * logit_scale
    if softcap is None:
        return z, torch.full_like(z, logit_scale)
    z, slope = softcapped(z, softcap)
    return z, slope * logit_scale


class Merged(NamedTuple):
    """Two parts of a softmax as one, (R,) each: reference, sum; the sums of both parts rescaled."""

    row_max: Tensor
    sum_exp: Tensor
    rescale: Tensor  # what figures of the first part are multiplied by
    second_sum: Tensor


def merge(row_max: Tensor, sum_exp: Tensor, second_max: Tensor, second_sum: Tensor) -> Merged:
    """One step of an online softmax: sums of exponentials over two maxima, over the larger."""
    top = torch.maximum(row_max, second_max)
    rescale = torch.exp(row_max - top)
    second_sum = second_sum * torch.exp(second_max - top)
    return Merged(top, sum_exp * rescale + second_sum, rescale, second_sum)


def add_at_(target: Tensor, index: Tensor, values: Tensor) -> None:
    """`target[index] += values`, equal indices one after the other: the same bits every time.

    Serial on a CPU; on a GPU sorted, without atomics. Values wider than the target are summed in
    their own dtype, and what several of them add up to is rounded once.
    """
    if target.device.type != "cpu":
        target.index_put_((index,), values, accumulate=True)
    elif target.dtype == values.dtype:
        target.index_add_(0, index, values)
    else:
        touched, place = torch.unique(index, return_inverse=True)
        wide = target[touched].to(values.dtype)
        target[touched] = wide.index_add_(0, place, values).to(target.dtype)


def rows_at_once(matrix: Tensor) -> int:
    """How many rows of `matrix` a plain form may gather and widen at once."""
    wide = accumulation_dtype(matrix.dtype).itemsize
    return max(1, strip_bytes(matrix.device) // (4 * wide * max(1, matrix.shape[1])))


def _strips(tile: Tensor) -> list[tuple[int, int]]:
    limit = strip_bytes(tile.device) // STRIPS
    rows = max(1, limit // max(1, tile.shape[1] * accumulation_dtype(tile.dtype).itemsize))
    return [(i, min(i + rows, tile.shape[0])) for i in range(0, tile.shape[0], rows)]


def _transform(
    strip: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None
) -> Tensor:
    z = strip.to(accumulation_dtype(strip.dtype), copy=True)
    if bias is not None:
        z += bias
    if softcap is not None:
        return z.mul_(logit_scale / softcap).tanh_().mul_(softcap)
    return z if logit_scale == 1.0 else z.mul_(logit_scale)


def _fill_label_columns(z: Tensor, labels: Tensor, first_column: int, value: float) -> None:
    # Written without nonzero: rows whose label lies elsewhere rewrite the value they have.
    for row_labels in labels:
        column = (row_labels - first_column)[:, None]
        inside = (column >= 0) & (column < z.shape[1])
        column = column.clamp(0, z.shape[1] - 1)
        z.scatter_(1, column, torch.where(inside, value, z.gather(1, column)))


def softmax_stats(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    first_column: int,
    logit_scale: float,
    softcap: float | None,
    with_logit_sum: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `tiles/schemas.py`."""
    row_max, sum_exp, logit_sum = _empty_stats(logits, with_logit_sum)
    dtype = row_max.dtype
    for i, j in _strips(logits):
        z = _transform(logits[i:j], bias, logit_scale, softcap)
        if with_logit_sum:
            torch.sum(z, 1, out=logit_sum[i:j])
        _fill_label_columns(z, labels[:, i:j], first_column, -torch.inf)
        # A tile of one column that is the label has no maximum: the smallest number keeps exp at 0.
        torch.amax(z, 1, out=row_max[i:j]).clamp_(min=torch.finfo(dtype).min)
        torch.sum(z.sub_(row_max[i:j, None]).exp_(), 1, out=sum_exp[i:j])
    return row_max, sum_exp, logit_sum


def _empty_stats(logits: Tensor, with_logit_sum: bool) -> tuple[Tensor, Tensor, Tensor]:
    row_max = logits.new_empty(logits.shape[0], dtype=accumulation_dtype(logits.dtype))
    logit_sum = torch.empty_like(row_max) if with_logit_sum else row_max.new_empty(0)
    return row_max, torch.empty_like(row_max), logit_sum


def exponentials(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    first_column: int,
    reference: Tensor,
    logit_scale: float,
    softcap: float | None,
) -> Iterator[tuple[int, int, Tensor, Tensor | None]]:
    """Strips of the tile: first and last row, exp(z - reference), d or None where it is 1."""
    for i, j in _strips(logits):
        z, slope = _transform(logits[i:j], bias, logit_scale, None), None
        if softcap is not None:
            z, slope = softcapped(z, softcap)
            slope.mul_(logit_scale)
        elif logit_scale != 1.0:
            slope = torch.full((), logit_scale, dtype=z.dtype, device=z.device)
        z.sub_(reference[i:j, None]).exp_()
        _fill_label_columns(z, labels[:, i:j], first_column, 0.0)
        yield i, j, z, slope


def softmax_grad_(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    first_column: int,
    reference: Tensor,
    logit_scale: float,
    softcap: float | None,
    out: Tensor | None = None,
) -> None:
    """See `tiles/schemas.py`."""
    out = logits if out is None else out
    options = (logit_scale, softcap)
    for i, j, e, slope in exponentials(logits, bias, labels, first_column, reference, *options):
        out[i:j].copy_(e if slope is None else e.mul_(slope))


def column_sums(tile: Tensor, coefficients: Tensor) -> Tensor:
    """See `tiles/schemas.py`."""
    sums = coefficients.new_zeros((*coefficients.shape[:-1], tile.shape[1]))
    for i, j in _strips(tile):
        sums += coefficients[..., i:j] @ tile[i:j].to(sums.dtype)
    return sums


def accumulate_(
    accumulator: Tensor, partial: Tensor, rescale: Tensor | None, alpha: float = 1.0
) -> None:
    """See `tiles/schemas.py`."""
    # A GPU widens in registers; add_ on a CPU would first widen the whole of a 16-bit partial.
    narrow = partial.device.type == "cpu" and partial.dtype != accumulator.dtype
    for i, j in _strips(partial) if narrow else [(0, partial.shape[0])]:
        if rescale is not None:
            accumulator[i:j].mul_(rescale[i:j, None])
        wide = partial[i:j].to(accumulator.dtype) if narrow else partial
        accumulator[i:j].add_(wide, alpha=alpha)


def softmax_stats_fake(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    first_column: int,
    logit_scale: float,
    softcap: float | None,
    with_logit_sum: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Results that are not computed, of tensors that have no memory."""
    return _empty_stats(logits, with_logit_sum)


def column_sums_fake(tile: Tensor, coefficients: Tensor) -> Tensor:
    """As `softmax_stats_fake`."""
    return coefficients.new_empty((*coefficients.shape[:-1], tile.shape[1]))
