"""Slots times gathered rows: the matrix product of the sparse gradient of hidden states.

    out_mh = sum over entries k of slot_k[m] rows[index_k, h]

A slot is 64 contiguous bfloat16 values found by address, in units of 16 bytes: one kept column of a
block of 64 rows; gathered rows are the head's. The output is stationary: float32 accumulators over
all entries. Row blocks keep unequal numbers of columns, so the entries are cut into equal pieces:
which block and which entries a program has is built on the device from the counts.

B row blocks, P pitch of their lists, E further pieces.
"""

import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels.tuning import VECTOR

COUNTS = 1024  # counts a program looks at together
LEAST_PIECE = 256  # entries: under it a piece costs more than it evens out


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


def is_odd(*matrices: Tensor) -> bool:
    """Whether rows start on no 16 bytes, or end within them.

    Raises:
        ValueError: columns of a matrix lie apart.
    """
    for matrix in matrices:
        if matrix.shape[1] > 1 and matrix.stride(1) != 1:
            raise ValueError(
                f"the rows of {tuple(matrix.shape)} must be contiguous, got strides "
                f"{matrix.stride()}; a copy of it is the caller's to afford"
            )
    return any(n % VECTOR for m in matrices for n in (m.shape[1], m.stride(0)))
