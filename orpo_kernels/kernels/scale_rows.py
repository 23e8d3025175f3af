"""g into dhidden, in place, in one launch: its factor, and the entries of two differing labels.

    dhidden_t = a_t (1 - p_t) g_t                                  one label, or two that agree
    dhidden_t = (a + a2) (1 - p - p2) g_t + b (d W[y] - d2 W[y2])                   two that differ
    b = a p2 - a2 (1 - p2),   1 - p2 by expm1;   d, d2: slopes

With `product` (the sparse gradient) g_t - dropped_t product_g stands for g_t, g the group of row t.
N rows, H and r columns, K label sets; `coefficients.py` defines a and a2. g is of the first label:
what all entries of the head have in common cancels within it, before it is rounded. Rows nobody
scores are left as they are, 0. Bytes: a row of g read and written, 4 H of the head where labels differ.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels.coefficients import Slopes, slope_numbers, slopes_of
from orpo_kernels.kernels.elementwise import expm1, where_width, whole_vectors
from orpo_kernels.kernels.inputs import LANGUAGE_DTYPE, pair
from orpo_kernels.kernels.start import Start, in_vectors
from orpo_kernels.kernels.tuning import VECTOR, row_of


@triton.jit
def _scale_part(
    g_ptr, first_ptr, second_ptr, product_ptr, width, factor, dropped, moved, slope, slope2, distinct,
    HAS_SECOND: tl.constexpr, HAS_TAIL: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        g = tl.load(g_ptr + column, mask=inside, other=0.0).to(tl.float32)
        if HAS_TAIL:
            g -= dropped * tl.load(product_ptr + column, mask=inside, other=0.0)
        g *= factor
        if HAS_SECOND:
            w = tl.load(first_ptr + column, mask=column < where_width(width, distinct), other=0.0)
            w2 = tl.load(second_ptr + column, mask=column < where_width(width, distinct), other=0.0)
            difference = slope * w.to(DTYPE).to(tl.float32) - slope2 * w2.to(DTYPE).to(tl.float32)
            g += moved * difference
        tl.store(g_ptr + column, g.to(g_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "N", "H", "r", "stride_g", "stride_g_r", "stride_weight", "stride_weight_r", "stride_set",
        "stride_dlogps", "stride_labels", "ignore_index",
    ],
    do_not_specialize_on_alignment=["statistics_ptr", "dlogps_ptr", "labels_ptr", "groups_ptr"],
)  # fmt: skip
def _scale_rows_kernel(
    g_ptr, g_r_ptr,  # (N, H), (N, r)
    statistics_ptr,  # (7 or 8, N) float32
    product_ptr, groups_ptr,  # (G, H + r) float32, (N,) int64
    dlogps_ptr, labels_ptr,  # (K, N)
    weight_ptr, weight_r_ptr,  # (V, H), (V, r)
    N, H, r, stride_g, stride_g_r, stride_weight, stride_weight_r,
    stride_set, stride_dlogps, stride_labels, ignore_index,
    HAS_SECOND: tl.constexpr, LOW_RANK: tl.constexpr, HAS_TAIL: tl.constexpr,
    HAS_GROUPS: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label, second, a, a2 = slopes_of(
        dlogps_ptr, labels_ptr, row, stride_set, stride_dlogps, stride_labels, ignore_index,
        HAS_SECOND,
    )  # fmt: skip
    if label >= 0:
        statistics = statistics_ptr + row
        factor = (a + a2) * tl.load(statistics + 2 * N)
        second_logp = tl.load(statistics + 4 * N)
        moved = a2 * expm1(second_logp) + a * tl.exp(second_logp)
        slope, slope2 = tl.load(statistics + 5 * N), tl.load(statistics + 6 * N)
        distinct = second >= 0
        width = whole_vectors(H, ALIGNED, VECTOR)
        rest_width = whole_vectors(r, ALIGNED, VECTOR)
        dropped = 0.0
        product = product_ptr
        if HAS_TAIL:
            dropped = tl.load(statistics + 7 * N)
            if HAS_GROUPS:
                product += tl.load(groups_ptr + row) * (width + rest_width)
        step = whole_vectors(stride_weight, ALIGNED, VECTOR)
        _scale_part(
            g_ptr + row * whole_vectors(stride_g, ALIGNED, VECTOR), weight_ptr + label * step,
            weight_ptr + second * step, product, width, factor, dropped, moved, slope, slope2,
            distinct, HAS_SECOND, HAS_TAIL, DTYPE, BLOCK,
        )  # fmt: skip
        if LOW_RANK:
            step = whole_vectors(stride_weight_r, ALIGNED, VECTOR)
            _scale_part(
                g_r_ptr + row * whole_vectors(stride_g_r, ALIGNED, VECTOR),
                weight_r_ptr + label * step, weight_r_ptr + second * step,
                product + width if HAS_TAIL else product, rest_width, factor, dropped, moved,
                slope, slope2, distinct, HAS_SECOND, HAS_TAIL, DTYPE, BLOCK,
            )  # fmt: skip


def scale_rows(
    g: tuple[Tensor, ...],  # (N, H), and (N, r) or not: overwritten
    statistics: Tensor,  # (7, N) float32, or (8, N) of the sparse gradient
    slopes: Slopes,
    parts: tuple[Tensor, ...],  # of the head: (V, H), and (V, r) or not
    dtype: torch.dtype,  # of the GEMMs' operands: what entries of the head are rounded to
    product: Tensor | None = None,  # (G, H + r) float32, of the sparse gradient
    groups: Tensor | None = None,  # (N,) int64; None: one group
) -> None:
    """Launches the factors of all rows."""
    weight, weight_r = pair(parts)
    N = statistics.shape[1]
    row = row_of("scale_rows", dtype, statistics.device)
    start = Start(
        _scale_rows_kernel,
        (
            *pair(g), statistics, product, groups, slopes.dlogps, slopes.labels, weight, weight_r,
        ),
        row,
        {
            "HAS_SECOND": slopes.labels.shape[0] == 2, "LOW_RANK": weight_r is not None,
            "HAS_TAIL": product is not None, "HAS_GROUPS": groups is not None,
            "DTYPE": LANGUAGE_DTYPE[dtype], "ALIGNED": in_vectors(*parts, *g),
            "BLOCK": row.block, "VECTOR": VECTOR,
        },
    )  # fmt: skip
    widths = [each.shape[1] for each in g] + [0]
    strides = [each.stride(0) for each in g] + [0]
    weights = [each.stride(0) for each in parts] + [0]
    start(
        N, statistics.stride(0), *widths[:2], *strides[:2], *weights[:2], *slope_numbers(slopes)
    )  # fmt: skip
