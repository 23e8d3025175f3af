"""Tile operations: one schema each, and their plain-torch form for every backend without its own.

A tile holds the raw logits `h W^T` of R rows and C consecutive vocabulary columns, `first_column`
on. The transform is part of the operation: `z = softcap(scale * (tile + bias))`, `d = dz / dtile`.

    softmax_stats   max, sum of exp(z - max) and, on request, sum of z, per row 1 read
    softmax_grad_   tile <- exp(z - reference) * d, label columns 0             1 read + 1 write
    column_sums     coefficients^T tile, of one row of them or several          1 read
    accumulate_     accumulator <- rescale * accumulator + alpha * partial      1 read + 1 update

and those of a CPU, where a 16-bit GEMM rounds its logits (`engine/collect.py`):

    softmax_collect_  one step of an online softmax, E in place; large entries apart, redone in
                      float32 from the inputs, as a list per row                1 read + 1 write
    csr_matmul_     accumulator += that list @ weight                           a row per entry
    softmax_compact_online_  the same step for the sparse gradient: what is not in the list is
                      summed by column                                          1 read + 1 write

`labels` is (K, R) int64, K label sets, -1 where a row has none. Label columns take no part in the
maximum and the sum of exponentials and are zeroed in the gradient: the engine handles them in
float32, from exact dots, so a confident token loses no digits. The sum of z, empty when not asked
for, is over all columns, those of labels included: it belongs to a mean over the vocabulary.

All arithmetic is float32 (float64 for a float64 tile); a 16-bit tile is widened in strips that stay
in cache, never as a whole.

A backend implements an operation by registering a kernel for its dispatch key (CPU: `csrc/`; CUDA,
ROCm and XPU: `kernels/`).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from orpo_kernels.engine import native
from orpo_kernels.kernels import register_tile_operation

_STRIP_BYTES_CPU = 2**21  # widened strip: an L2 cache; less costs calls, and threads their barriers
_STRIP_BYTES_OTHER = 2**22  # elsewhere a strip is a few launches: larger, yet inside 64 MiB
_STRIPS = 4  # at once: the widened strip, and with a softcap its slope and two temporaries

torch.library.define(
    "orpo_kernels::softmax_stats",
    "(Tensor logits, Tensor? bias, Tensor labels, int first_column, float logit_scale, "
    "float? softcap, bool with_logit_sum=False) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "orpo_kernels::softmax_grad_",
    "(Tensor(a!) logits, Tensor? bias, Tensor labels, int first_column, Tensor reference, "
    "float logit_scale, float? softcap, Tensor(b!)? out=None) -> ()",
)
torch.library.define("orpo_kernels::column_sums", "(Tensor tile, Tensor coefficients) -> Tensor")
torch.library.define(
    "orpo_kernels::accumulate_",
    "(Tensor(a!) accumulator, Tensor partial, Tensor? rescale, float alpha=1.0) -> ()",
)

torch.library.define(
    "orpo_kernels::softmax_collect_",
    "(Tensor(a!) logits, Tensor? bias, Tensor labels, int first_column, Tensor(b!) row_max, "
    "Tensor(c!) sum_exp, Tensor? others, Tensor? hidden, Tensor? weight, float share, int most, "
    "float logit_scale, float? softcap, bool online, bool store) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "orpo_kernels::csr_matmul_",
    "(Tensor(a!) accumulator, Tensor offsets, Tensor columns, Tensor values, Tensor weight) -> ()",
)
torch.library.define(
    "orpo_kernels::softmax_compact_online_",
    "(Tensor(a!) logits, Tensor? bias, Tensor labels, int first_column, Tensor(b!) row_max, "
    "Tensor(c!) sum_exp, Tensor? others, Tensor? hidden, Tensor? weight, float eps, float share, "
    "int most, float logit_scale, float? softcap, Tensor groups, Tensor(d!) tail, int capacity) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "orpo_kernels::compact_weight_gradient",
    "(Tensor(a!) block, Tensor store, Tensor table, int item, int first_column, "
    "Tensor coefficients, Tensor hidden, Tensor? tail=None, Tensor? tail_rows=None) -> ()",
)

softmax_stats = torch.ops.orpo_kernels.softmax_stats
softmax_grad_ = torch.ops.orpo_kernels.softmax_grad_
column_sums = torch.ops.orpo_kernels.column_sums
accumulate_ = torch.ops.orpo_kernels.accumulate_
softmax_collect_ = torch.ops.orpo_kernels.softmax_collect_
csr_matmul_ = torch.ops.orpo_kernels.csr_matmul_
softmax_compact_online_ = torch.ops.orpo_kernels.softmax_compact_online_
compact_weight_gradient = torch.ops.orpo_kernels.compact_weight_gradient

OPERATIONS = (
    "softmax_stats", "softmax_grad_", "column_sums", "accumulate_", "softmax_collect_",
    "csr_matmul_", "softmax_compact_online_", "compact_weight_gradient",
)  # fmt: skip
native.load(f"orpo_kernels::{name}" for name in OPERATIONS)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic and of every per-row figure for logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def strip_bytes(device: torch.device) -> int:
    """Bytes of scratch one tile operation in plain torch may take (a strip and its temporaries)."""
    return _STRIPS * (_STRIP_BYTES_CPU if device.type == "cpu" else _STRIP_BYTES_OTHER)


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


def _strips(tile: Tensor) -> list[tuple[int, int]]:
    limit = strip_bytes(tile.device) // _STRIPS
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


def _softmax_stats(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    first_column: int,
    logit_scale: float,
    softcap: float | None,
    with_logit_sum: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
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


def _softmax_grad_(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    first_column: int,
    reference: Tensor,
    logit_scale: float,
    softcap: float | None,
    out: Tensor | None = None,
) -> None:
    out = logits if out is None else out
    options = (logit_scale, softcap)
    for i, j, e, slope in exponentials(logits, bias, labels, first_column, reference, *options):
        out[i:j].copy_(e if slope is None else e.mul_(slope))


def _column_sums(tile: Tensor, coefficients: Tensor) -> Tensor:
    sums = coefficients.new_zeros((*coefficients.shape[:-1], tile.shape[1]))
    for i, j in _strips(tile):
        sums += coefficients[..., i:j] @ tile[i:j].to(sums.dtype)
    return sums


@torch.library.impl("orpo_kernels::accumulate_", "CompositeExplicitAutograd")
def _accumulate_(
    accumulator: Tensor, partial: Tensor, rescale: Tensor | None, alpha: float = 1.0
) -> None:
    # A GPU widens in registers; add_ on a CPU would first widen the whole of a 16-bit partial.
    narrow = partial.device.type == "cpu" and partial.dtype != accumulator.dtype
    for i, j in _strips(partial) if narrow else [(0, partial.shape[0])]:
        if rescale is not None:
            accumulator[i:j].mul_(rescale[i:j, None])
        wide = partial[i:j].to(accumulator.dtype) if narrow else partial
        accumulator[i:j].add_(wide, alpha=alpha)


@torch.library.register_fake("orpo_kernels::softmax_stats")  # type: ignore[untyped-decorator]
def _softmax_stats_fake(
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    first_column: int,
    logit_scale: float,
    softcap: float | None,
    with_logit_sum: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_stats(logits, with_logit_sum)


@torch.library.register_fake("orpo_kernels::column_sums")  # type: ignore[untyped-decorator]
def _column_sums_fake(tile: Tensor, coefficients: Tensor) -> Tensor:
    return coefficients.new_empty((*coefficients.shape[:-1], tile.shape[1]))


@torch.library.register_fake("orpo_kernels::softmax_grad_")  # type: ignore[untyped-decorator]
@torch.library.register_fake("orpo_kernels::accumulate_")  # type: ignore[untyped-decorator]
def _in_place_fake(*args: object, **kwargs: object) -> None:
    return None


for _name, _plain in (
    ("softmax_stats", _softmax_stats),
    ("softmax_grad_", _softmax_grad_),
    ("column_sums", _column_sums),
):
    torch.library.impl(f"orpo_kernels::{_name}", "CompositeExplicitAutograd", _plain)
    register_tile_operation(_name, _plain)
