"""One step of an online softmax over vocabulary blocks: a row of a tile is read once, in registers.

    z = softcap(scale * (x + b)),   d = dz / dx,   labels' columns left out
    m' = m, or max z where that is over m + limit;   s' = s e^(m - m') + sum e^(z - m')
    P = e^(z - m') d in the GEMMs' dtype;   accumulator <- e^(m - m') accumulator

R rows, C <= BLOCK columns, M rows of the state, H columns of the accumulator. Float32 arithmetic,
natural logarithms. The reference m is not the maximum: it moves only when the maximum grows by more
than `limit` nats, so that the accumulator of P W is almost never rescaled, whatever the logits; P
is then at most e^limit. Bytes: the tile read, P written (over the tile where it is given as P's
memory: all warps have read their part of a row before one writes); 8 H for a row whose reference
moves. One program per row, no atomics.

Where a GEMM cannot add in float32 its product is a `partial` of 16 bits: that of the block before
is added here.
"""

import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels.elementwise import transform, where_width, whole_vectors
from orpo_kernels.kernels.inputs import Inputs, Sums, Tiles
from orpo_kernels.kernels.start import Start
from orpo_kernels.kernels.tuning import VECTOR, row_holding

_SUMMED = 1024  # columns of the accumulator rescaled together


@triton.jit
def held_row(
    logits_ptr, bias_ptr, column, first_column, C, label, second, logit_scale, softcap,
    HAS_SECOND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Logits z of columns of a row, -inf in those of labels and past C, and slopes d.

    The tile's rows are whole vectors: what is read past C is its own padding.
    """
    x = tl.load(logits_ptr + column, mask=column < tl.cdiv(C, VECTOR) * VECTOR, other=0.0)
    x = x.to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + first_column + column, mask=column < C, other=0.0)
        x += bias.to(tl.float32)
    z, slope = transform(x, logit_scale, softcap, HAS_SOFTCAP)
    kept = (column < C) & (column != label)
    if HAS_SECOND:
        kept = kept & (column != second)
    return tl.where(kept, z, float("-inf")), slope


@triton.jit
def _add_partial(accumulator_ptr, partial_ptr, factor, block, H, BLOCK_H: tl.constexpr):
    """`accumulator <- factor (accumulator + partial)`, the first time `factor partial`."""
    for start in range(0, H, BLOCK_H):
        column = start + tl.arange(0, BLOCK_H)
        inside = column < H
        total = tl.load(partial_ptr + column, mask=inside, other=0.0).to(tl.float32)
        total += tl.load(
            accumulator_ptr + column, mask=column < where_width(H, block > 1), other=0.0
        )
        tl.store(accumulator_ptr + column, total * factor, mask=inside)


@triton.jit
def _rescale(accumulator_ptr, factor, H, BLOCK_H: tl.constexpr):
    for start in range(0, H, BLOCK_H):
        column = start + tl.arange(0, BLOCK_H)
        a = tl.load(accumulator_ptr + column, mask=column < H, other=0.0)
        tl.store(accumulator_ptr + column, a * factor, mask=column < H)


@triton.jit(
    do_not_specialize=[
        "first_row", "first_logit", "first_prob", "first_sum", "first_column", "block", "C", "M",
        "H", "stride_logits", "stride_probs",
    ],
    do_not_specialize_on_alignment=["state_ptr", "bias_ptr", "labels_ptr", "second_ptr"],
)  # fmt: skip
def _softmax_block_kernel(
    state_ptr,  # (2 + 2 K, M) float32: reference, sum
    probs_ptr,  # (R, C)
    accumulator_ptr, partial_ptr,  # (G, H) float32, (G, H)
    logits_ptr,  # (R, C)
    bias_ptr,  # (V,)
    labels_ptr, second_ptr,  # (M,) int64
    first_row, first_logit, first_prob, first_sum, first_column, block, C, M, H,
    stride_logits, stride_probs, limit, logit_scale, softcap,
    HAS_SECOND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    STORES: tl.constexpr, SUMS: tl.constexpr, HAS_PARTIAL: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_H: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = first_row + pid
    state = state_ptr + row
    label = (tl.load(labels_ptr + row) - first_column).to(tl.int32)
    second = label
    if HAS_SECOND:
        second = (tl.load(second_ptr + row) - first_column).to(tl.int32)

    column = tl.arange(0, BLOCK)
    offs = (first_logit + pid).to(tl.int64) * whole_vectors(stride_logits, True, VECTOR)
    z, slope = held_row(
        logits_ptr + offs, bias_ptr, column, first_column, C, label, second, logit_scale, softcap,
        HAS_SECOND, HAS_BIAS, HAS_SOFTCAP, VECTOR,
    )  # fmt: skip
    old, old_sum = tl.load(state), tl.load(state + M)

    top = tl.max(z, 0)
    reference = tl.where(top > old + limit, top, old)
    base = tl.where(reference == float("-inf"), 0.0, reference)  # nothing but labels so far
    factor = tl.exp(old - base)
    e = tl.exp(z - base)

    total = old_sum * factor + tl.sum(e, 0)

    # All warps read the row's figures, one writes them; and P may lie over the logits.
    tl.debug_barrier()
    tl.store(state, reference)
    tl.store(state + M, total)
    if STORES:
        offs = (first_prob + pid).to(tl.int64) * whole_vectors(stride_probs, True, VECTOR)
        inside = column < tl.cdiv(C, VECTOR) * VECTOR
        tl.store(probs_ptr + offs + column, (e * slope).to(probs_ptr.dtype.element_ty), mask=inside)
    if SUMS:
        width = whole_vectors(H, ALIGNED, VECTOR)
        sums = accumulator_ptr + (first_sum + pid).to(tl.int64) * width
        if HAS_PARTIAL:
            if block > 0:
                partial = partial_ptr + (first_sum + pid).to(tl.int64) * width
                _add_partial(sums, partial, factor, block, width, BLOCK_H)
        elif (block > 0) & (factor != 1.0):
            _rescale(sums, factor, width, BLOCK_H)


class SoftmaxBlock:
    """The steps of one call: tensors stay, rows and columns change."""

    def __init__(
        self,
        inputs: Inputs,
        state: Tensor,  # (2 + 2 K, M) float32
        tiles: Tiles,
        sums: Sums | None,
        limit: float,
    ) -> None:
        """Takes what stays the same from tile to tile."""
        row = row_holding("softmax_block", tiles.logits.dtype, state.device, tiles.columns)
        width = 0 if sums is None else sums.total.shape[1]
        accumulator, partial = (None, None) if sums is None else sums
        self.start = Start(
            _softmax_block_kernel,
            (
                state, tiles.probs, accumulator, partial, tiles.logits, inputs.bias, inputs.labels,
                inputs.second,
            ),
            row,
            {
                **inputs.options, "STORES": tiles.probs is not None, "SUMS": sums is not None,
                "HAS_PARTIAL": partial is not None, "ALIGNED": width % VECTOR == 0,
                "BLOCK": row.block, "BLOCK_H": _SUMMED, "VECTOR": VECTOR,
            },
        )  # fmt: skip
        self.tiles = tiles
        self.last = (state.shape[1], width, *tiles.strides, limit, *inputs.numbers)

    def __call__(
        self, rows: tuple[int, int], first_sum: int, columns: tuple[int, int], block: int
    ) -> None:
        """Launches rows `start` to `stop`, whose sums begin at `first_sum`, of the block-th block."""
        (start, stop), (v0, v1) = rows, columns
        self.start(
            stop - start, start, *self.tiles.firsts(start), first_sum, v0, block, v1 - v0,
            *self.last,
        )  # fmt: skip
