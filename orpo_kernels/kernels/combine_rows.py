"""Partial maxima and sums of exponentials of rows, folded into their running softmax.

    m' = max(m, partial m);   s' = s e^(m - m') + sum over partials of s_p e^(m_p - m')

R rows, S splits each, M rows of the state. One order, no atomics. Bytes: 8 S per row.
"""

import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels.start import Start
from orpo_kernels.kernels.tuning import MAX_SPLITS, cdiv, row_of


@triton.jit(
    do_not_specialize=["first_row", "R", "M", "splits"],
    do_not_specialize_on_alignment=["state_ptr", "max_ptr", "sum_ptr"],
)
def _combine_rows_kernel(
    state_ptr,  # (2 + 2 K, M) float32: reference, sum
    max_ptr, sum_ptr,  # (R, S) float32
    first_row, R, M, splits,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.arange(0, BLOCK_S)
    exists = (row[:, None] < R) & (split[None, :] < splits)
    offs = row[:, None].to(tl.int64) * splits + split[None, :]
    state = state_ptr + first_row + row

    m = tl.load(max_ptr + offs, mask=exists, other=float("-inf"))
    s = tl.load(sum_ptr + offs, mask=exists, other=0.0)
    old = tl.load(state, mask=row < R, other=0.0)
    old_sum = tl.load(state + M, mask=row < R, other=0.0)

    # A block of nothing but labels has the smallest number for its maximum: never -inf.
    top = tl.maximum(old, tl.max(m, 1))
    total = old_sum * tl.exp(old - top) + tl.sum(s * tl.exp(m - top[:, None]), 1)

    tl.debug_barrier()  # several warps read the figures of a row, one writes them
    tl.store(state, top, mask=row < R)
    tl.store(state + M, total, mask=row < R)


def combine_rows(
    state: Tensor,  # (2 + 2 K, M) float32
    partials: Tensor,  # (2, R, S) float32
    first_row: int,
) -> None:
    """Launches the rows of the state from `first_row` on."""
    row_max, sums = partials.unbind(0)
    R, splits = row_max.shape
    row = row_of("combine_rows", state.dtype, state.device)
    start = Start(
        _combine_rows_kernel, (state, row_max, sums), row,
        {"BLOCK_R": row.block, "BLOCK_S": MAX_SPLITS},
    )  # fmt: skip
    start(cdiv(R, row.block), first_row, R, state.shape[1], splits)
