"""The exact way for row blocks that keep a whole tile: their entries times all entries of the head.

    sums_t <- factor_t sums_t + sum_v (E_tv r_tv scale / 2^reference_t) W_v       a dense row block
    sums_t <- factor_t sums_t                                    another, whose reference moved

Two blocks of 64 rows by some columns of H; a program whose two blocks are neither has nothing to
do, which is what most launches come to. Probabilities are made of the logits as they are loaded and
rounded to what the slots of such a head are multiplied in; float32 sums in registers, over all
columns of the tile. No atomics. Bytes: the logits once per block of H, from the second-level cache.
"""

import triton
import triton.language as tl

from orpo_kernels.constants import COMPACT_ROWS
from orpo_kernels.kernels.elementwise import whole_vectors
from orpo_kernels.kernels.gather_matmul import is_odd
from orpo_kernels.kernels.inputs import LANGUAGE_DTYPE, Inputs
from orpo_kernels.kernels.pack_slots import reference_of
from orpo_kernels.kernels.scan import exponentials
from orpo_kernels.kernels.scan_state import ScanState, product_dtype
from orpo_kernels.kernels.start import Start
from orpo_kernels.kernels.tuning import VECTOR, cdiv, row_for_head


@triton.jit(
    do_not_specialize=[
        "first_row", "R", "C", "first_column", "blocks", "stride_logits", "M", "stride_sums", "H",
        "stride_weight", "ratio", "log2_scale", "logit_scale",
    ],
    do_not_specialize_on_alignment=["heads_ptr", "factor_ptr", "rows_ptr", "bias_ptr"],
)  # fmt: skip
def _dense_rows_kernel(
    sums_ptr,  # (R, H)
    heads_ptr,  # (5, B) int32
    factor_ptr, rows_ptr,  # (R,), (4, M) float32
    logits_ptr,  # (R, C)
    bias_ptr,  # (V,)
    weight_ptr,  # (V, H)
    first_row, R, C, first_column, blocks, stride_logits, M, stride_sums, H, stride_weight,
    ratio, log2_scale, logit_scale,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SIGN: tl.constexpr, DTYPE: tl.constexpr,
    HEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    column_blocks = tl.cdiv(H, BLOCK_H)
    pair = tl.program_id(0) // column_blocks
    other = tl.minimum(2 * pair + 1, blocks - 1)
    first_dense = tl.load(heads_ptr + 2 * pair)
    other_dense = tl.load(heads_ptr + other)
    had = tl.load(heads_ptr + 3 * blocks + 2 * pair)
    other_had = tl.load(heads_ptr + 3 * blocks + other)
    moved = had * tl.load(heads_ptr + 4 * blocks + 2 * pair)
    other_moved = other_had * tl.load(heads_ptr + 4 * blocks + other)
    dense = first_dense + other_dense
    if dense + moved + other_moved == 0:
        return

    column = tl.program_id(0) % column_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    lane = tl.arange(0, 2 * ROWS)
    row = pair * (2 * ROWS) + lane
    exists = row < R
    stride = whole_vectors(stride_weight, HEAD == 0, VECTOR)
    width = whole_vectors(H, HEAD == 0, VECTOR)
    in_row = (column < width)[None, :]
    has_sum = exists & (tl.where(lane < ROWS, had, other_had) > 0)
    is_dense = exists & (tl.where(lane < ROWS, first_dense, other_dense) > 0)
    acc = tl.zeros((2 * ROWS, BLOCK_H), tl.float32)
    if dense > 0:
        reference = reference_of(rows_ptr + first_row + row, is_dense, M)
        logits = logits_ptr + row.to(tl.int64)[:, None] * whole_vectors(stride_logits, True, VECTOR)
        for start in range(0, C, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            inside = is_dense[:, None] & (k < C)[None, :]
            # Whole vectors: what is read past C is the row's padding.
            read = exists[:, None] & (k < tl.cdiv(C, VECTOR) * VECTOR)[None, :]
            x = tl.load(logits + k[None, :], mask=read, other=0.0).to(tl.float32)
            bias = 0.0
            if HAS_BIAS:
                bias = tl.load(bias_ptr + first_column + k, mask=k < C, other=0.0)
                bias = bias.to(tl.float32)[None, :]
            _e, u = exponentials(x, bias, reference[:, None], ratio, log2_scale, SIGN, HAS_SOFTCAP)
            a = tl.where(inside, u * logit_scale, 0.0).to(DTYPE)
            w = weight_ptr + (first_column + k).to(tl.int64)[:, None] * stride + column[None, :]
            w = tl.load(w, mask=(k < C)[:, None] & in_row, other=0.0).to(DTYPE)
            acc = tl.dot(a, w, acc)
    step = whole_vectors(stride_sums, HEAD == 0, VECTOR)
    # After the product: addresses of every element would take its registers.
    out = sums_ptr + row.to(tl.int64)[:, None] * step + column[None, :]
    before = tl.load(out, mask=has_sum[:, None] & in_row, other=0.0)
    before *= tl.load(factor_ptr + row, mask=exists, other=1.0)[:, None]
    tl.store(out, acc + before, mask=exists[:, None] & in_row)


class DenseRows:
    """The dense row blocks of the tiles of one call, for one part of the head."""

    def __init__(self, inputs: Inputs, state: ScanState, part: int) -> None:
        """Takes what stays the same; the part's columns come after those of the parts before it."""
        weight = inputs.weight[part]
        before = sum(each.shape[1] for each in inputs.weight[:part])
        odd = is_odd(weight) or before % VECTOR > 0 or state.sums.stride(0) % VECTOR > 0
        row, options = row_for_head("dense_rows_odd" if odd else "dense_rows", weight)
        self.state = state
        self.programs = cdiv(weight.shape[1], row.block)
        self.start = Start(
            _dense_rows_kernel,
            (
                state.sums[:, before:], state.heads, state.factor, state.rows, state.logits,
                inputs.bias, weight,
            ),
            row,
            {
                "HAS_BIAS": inputs.bias is not None, "HAS_SOFTCAP": inputs.softcap is not None,
                "SIGN": -1.0 if inputs.logit_scale < 0 else 1.0,
                "DTYPE": LANGUAGE_DTYPE[product_dtype(inputs)], "HEAD": odd,
                "ROWS": COMPACT_ROWS, "BLOCK_H": row.block, "BLOCK_K": row.depth, "VECTOR": VECTOR,
            },
            options,
        )  # fmt: skip
        self.last = (
            state.logits.stride(0), state.rows.shape[1], state.sums.stride(0), weight.shape[1],
            weight.stride(0), *state.numbers(inputs), float(inputs.logit_scale),
        )  # fmt: skip

    def __call__(self, rows: tuple[int, int], columns: tuple[int, int]) -> None:
        """Launches rows `start` to `stop` of a vocabulary block."""
        (start, stop), (v0, v1) = rows, columns
        blocks = cdiv(stop - start, COMPACT_ROWS)
        self.start(
            cdiv(blocks, 2) * self.programs, start, stop - start, v1 - v0, v0, blocks,
            *self.last,
        )  # fmt: skip
