"""The slots of a chunk times the entries of the head they are of, once for all vocabulary blocks.

    sums_t <- sums_t + sum over entries k of the list of its row block of slot_k[t] W[column_k]

Row blocks keep unequal numbers of columns: lists are cut into equal pieces on the device, as in
`gather_matmul`, whose product this is. The first piece of a block adds to its sums where a dense
tile left some, the further ones are added by one more launch, in order. The grid has the columns of
H slowest, so that the rows of the head that programs share stay in the second-level cache.
"""

import triton
import triton.language as tl

from orpo_kernels.constants import COMPACT_ROWS
from orpo_kernels.kernels.elementwise import whole_vectors
from orpo_kernels.kernels.gather_matmul import (
    COUNTS,
    LEAST_PIECE,
    gathered_product,
    is_odd,
    pieces_kernel,
)
from orpo_kernels.kernels.inputs import LANGUAGE_DTYPE, Inputs
from orpo_kernels.kernels.scan_state import ScanState, product_dtype
from orpo_kernels.kernels.start import Start
from orpo_kernels.kernels.tuning import VECTOR, Row, cdiv, row_for_head

_ADDED = 1024  # columns per program that adds pieces


@triton.jit(
    do_not_specialize=["blocks", "items", "stride_sums", "H", "stride_weight"],
    do_not_specialize_on_alignment=["items_ptr", "heads_ptr"],
)
def _gather_slots_kernel(
    sums_ptr,  # (ROWS (B + E), H) float32
    slots_ptr, addresses_ptr, columns_ptr,  # bfloat16; (B, P) int32
    weight_ptr,  # (V, H)
    items_ptr, heads_ptr,  # (2, B + E), (5, B) int32
    blocks, items, stride_sums, H, stride_weight,
    DTYPE: tl.constexpr, HEAD: tl.constexpr, SLOT: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    item = tl.program_id(0) % items
    begin = tl.load(items_ptr + item)
    end = tl.load(items_ptr + items + item)
    had = tl.load(heads_ptr + item, mask=item < blocks, other=0)
    had += tl.load(heads_ptr + 3 * blocks + item, mask=item < blocks, other=0)
    # The first piece of a block that has nothing is still to be written: as zeros.
    if (end <= begin) & ((item >= blocks) | (had > 0)):
        return
    width = whole_vectors(H, HEAD == 0, VECTOR)
    stride = whole_vectors(stride_weight, HEAD == 0, VECTOR)
    column = tl.program_id(0) // items * BLOCK_H + tl.arange(0, BLOCK_H)
    step = whole_vectors(stride_sums, HEAD == 0, VECTOR)
    sums_ptr += item.to(tl.int64) * SLOT * step
    out = tl.arange(0, SLOT)[:, None] * step + column[None, :]
    read = whole_vectors(tl.where(had > 0, width, 0), HEAD == 0, VECTOR)
    acc = tl.load(sums_ptr + out, mask=(column < read)[None, :], other=0.0)

    acc = gathered_product(
        slots_ptr, addresses_ptr, weight_ptr, stride, columns_ptr,
        begin, end, column, width, acc, DTYPE, SLOT, BLOCK_K,
    )  # fmt: skip
    tl.store(sums_ptr + out, acc, mask=(column < width)[None, :])


@triton.jit(
    do_not_specialize=["blocks", "stride_sums", "H"], do_not_specialize_on_alignment=["ends_ptr"]
)
def _add_further_kernel(
    sums_ptr,  # (SLOT (B + E), H) float32
    ends_ptr,  # (B,) int32: further pieces of the blocks so far
    blocks, stride_sums, H,
    SLOT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column_blocks = tl.cdiv(H, BLOCK)
    row = tl.program_id(0) // column_blocks
    block = row // SLOT
    first = tl.load(ends_ptr + block - 1, mask=block > 0, other=0)
    end = tl.load(ends_ptr + block)
    if first == end:
        return
    column = tl.program_id(0) % column_blocks * BLOCK + tl.arange(0, BLOCK)
    at = sums_ptr + column
    out = at + row.to(tl.int64) * stride_sums
    acc = tl.load(out, mask=column < H, other=0.0)
    for piece in range(blocks + first, blocks + end):
        further = (tl.cast(piece, tl.int64) * SLOT + row % SLOT) * stride_sums
        acc += tl.load(at + further, mask=column < H, other=0.0)
    tl.store(out, acc, mask=column < H)


class GatherSlots:
    """The products of the chunks of one call."""

    def __init__(self, inputs: Inputs, state: ScanState, vocabulary_blocks: int) -> None:
        """Takes what stays the same from chunk to chunk."""
        self.state, self.parts = state, []
        shape = state.shape
        allocated = state.heads.shape[1]
        self.extras = shape.pieces
        items = state.heads.new_empty((2, allocated + self.extras))
        ends = state.heads.new_empty(allocated)
        # What the last block of the vocabulary wrote.
        counts = state.ends[vocabulary_blocks % 2]
        self.cut = Start(
            pieces_kernel, (items, ends, counts), Row(COUNTS, 4),
            {"LEAST": LEAST_PIECE, "BLOCK": COUNTS},
        )  # fmt: skip
        self.add = Start(
            _add_further_kernel, (state.sums, ends), Row(_ADDED, 4),
            {"SLOT": COMPACT_ROWS, "BLOCK": _ADDED},
        )  # fmt: skip
        first = 0
        for weight in inputs.weight:
            odd = is_odd(weight) or first % VECTOR > 0 or state.sums.stride(0) % VECTOR > 0
            name = "gather_slots_odd" if odd else "gather_slots"
            row, options = row_for_head(name, weight)
            start = Start(
                _gather_slots_kernel,
                (
                    state.sums[:, first:], state.slots, state.addresses, state.columns, weight,
                    items, state.heads,
                ),
                row,
                {
                    "DTYPE": LANGUAGE_DTYPE[product_dtype(inputs)], "HEAD": odd,
                    "SLOT": COMPACT_ROWS, "BLOCK_H": row.block, "BLOCK_K": row.depth,
                    "VECTOR": VECTOR,
                },
                options,
            )  # fmt: skip
            numbers = (state.sums.stride(0), weight.shape[1], weight.stride(0))
            self.parts.append((start, cdiv(weight.shape[1], row.block), numbers))
            first += weight.shape[1]

    def __call__(self, rows: int) -> None:
        """Launches the sums of the first `rows` rows of the chunk, complete then."""
        blocks = cdiv(rows, COMPACT_ROWS)
        items = blocks + self.extras
        self.cut(blocks, 1, self.state.shape.listed, blocks, self.extras)
        for start, programs, numbers in self.parts:
            start(items * programs, blocks, items, *numbers)
        stride, width = self.state.sums.stride(0), self.state.sums.shape[1]
        self.add(rows * cdiv(width, _ADDED), blocks, stride, width)
