"""What the rows of each group give back for what they dropped: the other side of the tail in dW.

    rest_g = sum over the rows t of group g of a_t m_t h_t

a_t m_t is softmax_t s_t dropped_t, of the statistics. Float32 sums of
splits of the rows, added in one order. M rows among N, G groups, P splits. Bytes: hidden once.
"""

import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels import tuning
from orpo_kernels.kernels.elementwise import row_place, whole_vectors
from orpo_kernels.kernels.inputs import Inputs
from orpo_kernels.kernels.start import Start, in_vectors, places
from orpo_kernels.kernels.tuning import VECTOR, cdiv, row_of


@triton.jit(
    do_not_specialize=[
        "M", "N", "H", "each", "stride_group", "stride_split", "period", "stride_slice",
        "stride_row",
    ],
    do_not_specialize_on_alignment=[
        "out_ptr", "coefficients_ptr", "statistics_ptr", "groups_ptr", "index_ptr",
    ],
)  # fmt: skip
def _given_back_kernel(
    out_ptr,  # (P, G, H) float32
    hidden_ptr,  # (N, H)
    coefficients_ptr, statistics_ptr,  # (5, M), (8, N) float32
    groups_ptr, index_ptr,  # (M,) int64
    M, N, H, each, stride_group, stride_split, period, stride_slice, stride_row,
    GROUPS: tl.constexpr, HAS_INDEX: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    width = whole_vectors(H, ALIGNED, VECTOR)
    column_blocks = tl.cdiv(H, BLOCK)
    split = tl.program_id(0) // column_blocks
    column = tl.program_id(0) % column_blocks * BLOCK + tl.arange(0, BLOCK)
    first = tl.zeros((ROWS, BLOCK), tl.float32)
    second = tl.zeros((ROWS, BLOCK), tl.float32)
    end = tl.minimum((split + 1) * each, M)
    for start in range(split * each, end, ROWS):
        row = start + tl.arange(0, ROWS)
        exists = row < end
        position = row.to(tl.int64)
        if HAS_INDEX:
            position = tl.load(index_ptr + row, mask=exists, other=0)
        statistics = statistics_ptr + position
        scale = tl.load(statistics + N, mask=exists, other=0.0)
        beside = tl.load(statistics + 2 * N, mask=exists, other=0.0)
        dropped = tl.load(statistics + 7 * N, mask=exists, other=0.0)
        softmax = tl.load(coefficients_ptr + M + row, mask=exists, other=0.0)
        total = tl.where(scale > 0, beside / tl.where(scale > 0, scale, 1.0), 0.0)
        mass = softmax * total * dropped
        place = row_place(position, period, stride_slice, stride_row, ALIGNED, VECTOR)
        h = hidden_ptr + place[:, None] + column[None, :]
        h = tl.load(h, mask=exists[:, None] & (column < width)[None, :], other=0.0).to(tl.float32)
        group = tl.load(groups_ptr + row, mask=exists, other=-1)
        first += tl.where(group == 0, mass, 0.0)[:, None] * h
        if GROUPS == 2:
            second += tl.where(group == 1, mass, 0.0)[:, None] * h
    out = out_ptr + split.to(tl.int64) * stride_split + column
    tl.store(out, tl.sum(first, 0), mask=column < width)
    if GROUPS == 2:
        tl.store(out + stride_group, tl.sum(second, 0), mask=column < width)


def given_back(
    hidden: Tensor,  # (N, H), or (B, T, H) with N = B T
    inputs: Inputs,
    statistics: Tensor,  # (8, N) float32
    coefficients: Tensor,  # (5, M) float32
    groups: Tensor,  # (M,) int64, -1 for none
    group_count: int,
) -> Tensor:
    """Launches the rows (G, H) float32 that the tail is multiplied with."""
    M, G, H = inputs.labels.shape[0], group_count, hidden.shape[-1]
    row = row_of("given_back", hidden.dtype, hidden.device)
    programs = cdiv(H, row.block)
    wanted = max(1, 4 * tuning.device_info(hidden.device).processors // programs)
    each = cdiv(cdiv(M, wanted), row.depth) * row.depth
    splits = cdiv(M, each)
    out = coefficients.new_empty((splits, G, H))
    start = Start(
        _given_back_kernel,
        (out, hidden, coefficients, statistics, groups, inputs.positions), row,
        {
            "GROUPS": G, "HAS_INDEX": inputs.positions is not None,
            "ALIGNED": in_vectors(hidden), "ROWS": row.depth, "BLOCK": row.block,
            "VECTOR": VECTOR,
        },
    )  # fmt: skip
    start(
        splits * programs, M, statistics.stride(0), H, each, H, G * H, *places(hidden)
    )  # fmt: skip
    return out.sum(0)
