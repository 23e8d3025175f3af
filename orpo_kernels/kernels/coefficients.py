"""What multiplies each row of a trainable head's gradient, in one launch.

    dW_v = sum_t (share_t 1[v = y_t] + share2_t 1[v = y2_t] - softmax_t E_tv) h_t,  E = e^(z - m) d
    a = d loss / d logp, a2 of a second label that differs, else a is the sum of both
    softmax = (a + a2) e^(m - lse)
    share = d (a (1 - p) - a2 p),   share2 = d2 (a2 (1 - p2) - a p2),   1 - p by expm1

M scored rows among N, K label sets. Rows of the result (5, M) float32: m, softmax, share, share2,
and a bound of what multiplies h in the row, |a| + |a2| times the largest slope: float16 is scaled
by it (`unit`), which reaches from 6e-8 to 6.5e4 only. Bytes: about 60 a row.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels.elementwise import expm1, row_place, whole_vectors
from orpo_kernels.kernels.start import Start, in_vectors, places
from orpo_kernels.kernels.tuning import VECTOR, cdiv, row_of


class Slopes(NamedTuple):
    """How the loss depends on the log-probs of all N positions, K label sets."""

    dlogps: Tensor  # (K, N) float32, any strides
    labels: Tensor  # (K, N) int64, of `ignore_index` where a set does not score
    ignore_index: int


@triton.jit
def slopes_of(
    dlogps_ptr, labels_ptr, position, stride_set, stride_dlogps, stride_labels, ignore_index,
    HAS_SECOND: tl.constexpr,
):  # fmt: skip
    """Of a position: labels y and y2 (-1 for none), a and a2."""
    label = tl.load(labels_ptr + position)
    a = tl.load(dlogps_ptr + position * stride_dlogps).to(tl.float32)
    scored = label != ignore_index
    label = tl.where(scored, label, -1)
    a = tl.where(scored, a, 0.0)
    second = tl.full((), -1, tl.int64)
    a2 = a * 0.0
    if HAS_SECOND:
        other = tl.load(labels_ptr + stride_labels + position)
        b = tl.load(dlogps_ptr + stride_set + position * stride_dlogps).to(tl.float32)
        also = other != ignore_index
        distinct = scored & also & (other != label)
        second = tl.where(distinct, other, -1)
        a2 = tl.where(distinct, b, 0.0)
        a = tl.where(also & (distinct == 0), a + b, a)
        label = tl.where(scored | (also == 0), label, other)
    return label, second, a, a2


@triton.jit
def shares_of(statistics_ptr, N, a, a2):
    """Of a row: what multiplies h in dW of its labels, and W of its labels in dhidden."""
    first_logp, second_logp = tl.load(statistics_ptr + 3 * N), tl.load(statistics_ptr + 4 * N)
    share = -a * expm1(first_logp) - a2 * tl.exp(first_logp)
    share2 = -a2 * expm1(second_logp) - a * tl.exp(second_logp)
    return (
        share * tl.load(statistics_ptr + 5 * N), share2 * tl.load(statistics_ptr + 6 * N),
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "M", "N", "stride_set", "stride_dlogps", "stride_labels", "ignore_index",
    ],
    do_not_specialize_on_alignment=[
        "out_ptr", "statistics_ptr", "dlogps_ptr", "labels_ptr", "index_ptr",
    ],
)  # fmt: skip
def _coefficients_kernel(
    out_ptr,  # (5, M) float32
    statistics_ptr,  # (7, N) float32
    dlogps_ptr, labels_ptr,  # (K, N)
    index_ptr,  # (M,) int64
    M, N, stride_set, stride_dlogps, stride_labels, ignore_index, largest_slope,
    HAS_SECOND: tl.constexpr, HAS_INDEX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = row < M
    position = tl.minimum(row, M - 1).to(tl.int64)
    if HAS_INDEX:
        position = tl.load(index_ptr + position)
    _label, _second, a, a2 = slopes_of(
        dlogps_ptr, labels_ptr, position, stride_set, stride_dlogps, stride_labels, ignore_index,
        HAS_SECOND,
    )  # fmt: skip
    statistics = statistics_ptr + position
    share, share2 = shares_of(statistics, N, a, a2)

    softmax = (a + a2) * tl.load(statistics + N)
    bound = (tl.abs(a) + tl.abs(a2)) * largest_slope

    tl.store(out_ptr + row, tl.load(statistics), mask=exists)
    tl.store(out_ptr + M + row, softmax, mask=exists)
    tl.store(out_ptr + 2 * M + row, share, mask=exists)
    tl.store(out_ptr + 3 * M + row, share2, mask=exists)
    tl.store(out_ptr + 4 * M + row, bound, mask=exists)


@triton.jit(
    do_not_specialize=["H", "period", "stride_slice", "stride_row"],
    do_not_specialize_on_alignment=["bounds_ptr", "index_ptr"],
)
def _reach_kernel(
    bounds_ptr,  # (M,) float32
    hidden_ptr,  # (N, H)
    index_ptr,  # (M,) int64
    H, period, stride_slice, stride_row,
    HAS_INDEX: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    position = row.to(tl.int64)
    if HAS_INDEX:
        position = tl.load(index_ptr + row)
    offs = row_place(position, period, stride_slice, stride_row, ALIGNED, VECTOR)
    width = whole_vectors(H, ALIGNED, VECTOR)
    largest = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        h = tl.load(hidden_ptr + offs + column, mask=column < width, other=0.0)
        largest = tl.maximum(largest, tl.abs(h.to(tl.float32)))
    tl.store(bounds_ptr + row, tl.load(bounds_ptr + row) * tl.max(largest, 0))


def slope_numbers(slopes: Slopes) -> tuple[int, int, int, int]:
    """Strides and the ignored label, as `slopes_of` takes them."""
    stride_set, stride = slopes.dlogps.stride()
    return stride_set, stride, slopes.labels.stride(0), slopes.ignore_index


def coefficients(
    statistics: Tensor,  # (7, N) float32
    slopes: Slopes,
    index: Tensor | None,  # (M,) int64
    logit_scale: float,
) -> Tensor:
    """Launches the coefficients (5, M) of the scored rows: m, softmax, share, share2, bound."""
    M = statistics.shape[1] if index is None else index.shape[0]
    out = torch.empty((5, M), dtype=torch.float32, device=statistics.device)
    row = row_of("coefficients", torch.float32, statistics.device)
    start = Start(
        _coefficients_kernel, (out, statistics, slopes.dlogps, slopes.labels, index), row,
        {
            "HAS_SECOND": slopes.labels.shape[0] == 2, "HAS_INDEX": index is not None,
            "BLOCK": row.block,
        },
    )  # fmt: skip
    numbers = (M, statistics.stride(0), *slope_numbers(slopes), max(1.0, abs(logit_scale)))
    start(cdiv(M, row.block), *numbers)
    return out


def unit_of(
    bounds: Tensor,  # (M,) float32: of `coefficients`; overwritten
    hidden: Tensor | None,  # (N, H): of which products are summed in float16; None: in float32
    index: Tensor | None,  # (M,) int64
) -> Tensor:
    """What float16 operands of the weight gradient are divided by, (1,) float32.

    At most 2^14 is then what multiplies h; where the GEMM writes float16, the sum of the products
    too.
    """
    largest = bounds.amax(0, keepdim=True)
    if hidden is not None:
        row = row_of("reach", hidden.dtype, hidden.device)
        start = Start(
            _reach_kernel, (bounds, hidden, index), row,
            {
                "HAS_INDEX": index is not None, "ALIGNED": in_vectors(hidden), "BLOCK": row.block,
                "VECTOR": VECTOR,
            },
        )  # fmt: skip
        start(bounds.shape[0], hidden.shape[-1], *places(hidden))
        largest = torch.maximum(largest, bounds.sum(0, keepdim=True))
    return largest.mul_(2.0**-14).clamp_(min=torch.finfo(torch.float32).tiny)
