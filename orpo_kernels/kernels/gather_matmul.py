"""Slots times gathered rows: the matrix product of both gradients of the sparse softmax.

    out_mh = sum over entries k of slot_k[m] rows[index_k, h]

A slot is 64 contiguous bfloat16 values found by address, in units of 16 bytes: one kept column of a
block of 64 rows (out is dhidden, gathered rows are the head's), or one segment of 64 vocabulary
columns of a token (out is dW, gathered rows are a * hidden; `row_segments`). The output is
stationary: float32 accumulators over all entries, written once, no atomics.

dhidden: blocks keep unequal numbers of columns, so the entries are cut into equal pieces. Which
block and which entries a program has is built on the device from the counts: the first piece of a
block adds to the accumulator, the further ones go to partials that one more launch adds, in order.

B row blocks, P pitch of their lists, E further pieces. Bytes from memory: the slots once, and each
gathered row once as long as a block of H of all of them stays in the second-level cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.constants import COMPACT_ROWS, PARTIAL_SHARE
from orpo_kernels.kernels.segment_store import Slots
from orpo_kernels.kernels.tuning import VECTOR, Device, Row, compile_options, launch

SLOT = tl.constexpr(COMPACT_ROWS)
COUNTS = 1024  # counts a program looks at together
LEAST_PIECE = 256  # entries: under it a piece costs more than it evens out
_PARTIAL_BYTES = 16 * 2**20  # of partials that few row blocks may take to fill the device
_ADDED = 1024  # columns per program that adds partials


@triton.jit
def gathered_product(
    slots_ptr, addresses_ptr,  # bfloat16; (entries,) int32, units of 16 bytes
    rows_ptr, stride_rows, indices_ptr,  # (., H); (entries,) int32
    begin, end, column, width, acc,
    DTYPE: tl.constexpr, SLOT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`acc` (SLOT, BLOCK_H), plus the sum over entries `begin` to `end` of columns under `width`.

    The index and the address of the next step are carried in registers: loaded within the step they
    would take a stage of the pipeline each, of what the two operands are prefetched by.
    """
    lane = tl.arange(0, SLOT)
    entry = begin + tl.arange(0, BLOCK_K)
    inside = entry < end
    address = tl.load(addresses_ptr + entry, mask=inside, other=0)
    index = tl.load(indices_ptr + entry, mask=inside, other=0)
    for _ in range(begin, end, BLOCK_K):
        a = tl.load(
            slots_ptr + address[:, None].to(tl.int64) * 8 + lane[None, :],
            mask=inside[:, None], other=0.0,
        )  # fmt: skip
        b = tl.load(
            rows_ptr + index[:, None].to(tl.int64) * stride_rows + column[None, :],
            mask=inside[:, None] & (column < width)[None, :], other=0.0,
        )  # fmt: skip
        entry += BLOCK_K
        inside = entry < end
        address = tl.load(addresses_ptr + entry, mask=inside, other=0)
        index = tl.load(indices_ptr + entry, mask=inside, other=0)
        acc = tl.dot(tl.trans(a.to(DTYPE)), b.to(DTYPE), acc)
    return acc


@triton.jit(
    do_not_specialize=["stride_counts", "pitch", "B", "extras"],
    do_not_specialize_on_alignment=["counts_ptr"],
)
def pieces_kernel(
    items_ptr,  # (2, B + E) int32: first entry, end
    ends_ptr,  # (B,) int32: further pieces of the blocks so far
    counts_ptr, stride_counts,  # (B,) int32
    pitch, B, extras,
    LEAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cuts the entries of row blocks into pieces: the first of each, then the further ones."""
    block = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    items = B + extras

    total = 0
    for start in range(0, B, BLOCK):
        offs = (start + lane).to(tl.int64) * stride_counts
        total += tl.sum(tl.load(counts_ptr + offs, mask=start + lane < B, other=0), 0)
    # So that the further pieces are at most E: each is a whole piece after another of its block.
    piece = tl.maximum((total + extras - 1) // extras, LEAST)
    before = 0
    everything = 0
    for start in range(0, B, BLOCK):
        offs = (start + lane).to(tl.int64) * stride_counts
        count = tl.load(counts_ptr + offs, mask=start + lane < B, other=0)
        further = (tl.maximum(count, 1) - 1) // piece
        before += tl.sum(tl.where(start + lane < block, further, 0), 0)
        everything += tl.sum(further, 0)

    count = tl.load(counts_ptr + block.to(tl.int64) * stride_counts)
    further = (tl.maximum(count, 1) - 1) // piece
    base = block * pitch
    tl.store(items_ptr + block, base)
    tl.store(items_ptr + items + block, base + tl.minimum(count, piece))
    tl.store(ends_ptr + block, before + further)
    for start in range(0, further, BLOCK):
        first = (start + lane + 1) * piece
        item = items_ptr + B + before + start + lane
        mine = start + lane < further
        tl.store(item, base + first, mask=mine)
        tl.store(item + items, base + tl.minimum(count, first + piece), mask=mine)
    if block == 0:  # pieces that do not exist are empty
        for start in range(everything, extras, BLOCK):
            item = items_ptr + B + start + lane
            tl.store(item, 0 * lane, mask=start + lane < extras)
            tl.store(item + items, 0 * lane, mask=start + lane < extras)


@triton.jit(do_not_specialize=["stride_weight", "H", "items"])
def _gather_matmul_kernel(
    partial_ptr,  # (B + E, SLOT, H) float32
    slots_ptr, addresses_ptr,  # bfloat16; (B, P) int32
    weight_ptr, stride_weight, columns_ptr,  # (C, H); (B, P) int32
    items_ptr,  # (2, B + E) int32
    H, items,
    DTYPE: tl.constexpr, HEAD: tl.constexpr, SLOT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0)
    begin = tl.load(items_ptr + item)
    end = tl.load(items_ptr + items + item)
    if end <= begin:
        return
    width = H
    if not HEAD:  # as multiples, which the compiler sees
        stride_weight = stride_weight // VECTOR * VECTOR
        width = H // VECTOR * VECTOR
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)

    acc = gathered_product(
        slots_ptr, addresses_ptr, weight_ptr, stride_weight, columns_ptr,
        begin, end, column, width, tl.zeros((SLOT, BLOCK_H), tl.float32), DTYPE, SLOT,
        BLOCK_K,
    )  # fmt: skip

    row = item.to(tl.int64) * SLOT + tl.arange(0, SLOT)
    out = partial_ptr + row[:, None] * width + column[None, :]
    tl.store(out, acc, mask=(column < width)[None, :])


@triton.jit(
    do_not_specialize=["stride_accumulator", "stride_counts", "H", "B"],
    do_not_specialize_on_alignment=["counts_ptr"],
)
def _add_pieces_kernel(
    accumulator_ptr, stride_accumulator,  # (R, H) float32
    partial_ptr,  # (B + E, SLOT, H) float32
    ends_ptr,  # (B,) int32
    counts_ptr, stride_counts,  # (B,) int32
    H, B,
    SLOT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    block = row // SLOT
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if tl.load(counts_ptr + block.to(tl.int64) * stride_counts) == 0:
        return
    first = tl.load(ends_ptr + block - 1, mask=block > 0, other=0)
    end = tl.load(ends_ptr + block)
    out = accumulator_ptr + row.to(tl.int64) * stride_accumulator + column
    acc = tl.load(out, mask=column < H, other=0.0)
    partial_ptr += (row % SLOT) * H + column
    acc += tl.load(partial_ptr + block.to(tl.int64) * SLOT * H, mask=column < H, other=0.0)
    for piece in range(B + first, B + end):
        acc += tl.load(
            partial_ptr + tl.cast(piece, tl.int64) * SLOT * H, mask=column < H, other=0.0
        )
    tl.store(out, acc, mask=column < H)


def slot_language_dtype(dtype: torch.dtype) -> tl.dtype:
    """What slots are multiplied in: float16 with float16 entries, else bfloat16."""
    return tl.float16 if dtype == torch.float16 else tl.bfloat16


def further_pieces(
    row_blocks: int, H: int, processors: int, block_columns: int, tile_bytes: int
) -> int:
    """How many pieces beyond one per row block: pieces of half the mean, more to fill the device.

    Two per row block; or more, in partials of at most a 16th of the tile's own bytes.
    """
    wanted = -(-4 * processors // -(-H // block_columns))
    affordable = min(_PARTIAL_BYTES, tile_bytes // PARTIAL_SHARE) // (4 * COMPACT_ROWS * H)
    return max(2 * row_blocks, min(wanted, affordable))


def is_odd(*matrices: Tensor) -> bool:
    """Whether rows start on no 16 bytes, or end within them.

    Raises:
        ValueError: columns of a matrix lie apart.
    """
    for matrix in matrices:
        if matrix.stride(1) != 1:
            raise ValueError(
                f"the rows of {tuple(matrix.shape)} must be contiguous, got strides "
                f"{matrix.stride()}; a copy of it is the caller's to afford"
            )
    return any(n % VECTOR for m in matrices for n in (m.shape[1], m.stride(0)))


def slot_matmul(
    accumulator: Tensor,  # (R, H) float32
    kept: Slots,
    weight: Tensor,  # (C, H)
) -> None:
    """Launches `accumulator += kept E @ weight`.

    float32 `weight` is rounded to bfloat16, what the slots are, as it is gathered; with a float16
    one the slots are widened to its digits. Waits for nothing: the counts stay on the device.

    Raises:
        ValueError: columns of `weight` lie apart.
    """
    slots, columns, addresses, counts = kept.slots, kept.columns, kept.addresses, kept.ends[:, -1]
    tile_bytes = slots.shape[0] * slots.stride(0) * slots.element_size()

    def run(row: Row, device: Device) -> None:
        R, H = accumulator.shape
        B, pitch = columns.shape
        extras = further_pieces(B, H, device.processors, row.block, tile_bytes)
        new = columns.new_empty
        items, piece_ends = new((2, B + extras)), new(B)
        partial = accumulator.new_empty((B + extras, COMPACT_ROWS, H))
        pieces_kernel[(B,)](
            items, piece_ends, counts, counts.stride(0), pitch, B, extras,
            LEAST=LEAST_PIECE, BLOCK=COUNTS, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        _gather_matmul_kernel[(B + extras, triton.cdiv(H, row.block))](
            partial, slots, addresses, weight, weight.stride(0), columns, items, H, B + extras,
            DTYPE=slot_language_dtype(weight.dtype), HEAD=odd, SLOT=COMPACT_ROWS, BLOCK_H=row.block, BLOCK_K=row.depth, VECTOR=VECTOR,
            **compile_options(row, device),
        )  # fmt: skip
        _add_pieces_kernel[(R, triton.cdiv(H, _ADDED))](
            accumulator, accumulator.stride(0), partial, piece_ends, counts, counts.stride(0), H, B,
            SLOT=COMPACT_ROWS, BLOCK=_ADDED, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip

    odd = is_odd(weight)
    launch("gather_matmul_odd" if odd else "gather_matmul", weight.dtype, weight.device, run)
