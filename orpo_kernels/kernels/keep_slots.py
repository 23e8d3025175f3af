"""The slots of a chunk to the store that a trainable head keeps for the backward, or their columns.

Row blocks lie there one after the other, each with all of its slots: those with a dense tile are
left out, and so is the first that finds no room and whatever comes after it. The backward does
these rows the exact way. What is kept of a row, and dhidden with it, does not ask.

One launch for a chunk of rows: B row blocks, PIECES programs each, which add the counts of the
blocks before, in one order. Of the two numbers of `used` the number of the chunk decides which is
read and which is written. Bytes: slots and columns read and written once.
"""

import triton
import triton.language as tl

from orpo_kernels.constants import COMPACT_ROWS
from orpo_kernels.kernels.scan_state import ScanState
from orpo_kernels.kernels.slot_store import SlotStore
from orpo_kernels.kernels.start import Start
from orpo_kernels.kernels.tuning import VECTOR, cdiv, row_of

_COUNTED = 64  # row blocks whose counts a program looks at together
_PIECES = 8  # programs that share a row block


@triton.jit
def _is_dense(heads_ptr, block, inside, blocks):
    """Whether a tile of row blocks was done the exact way, this one or one before."""
    now = tl.load(heads_ptr + block, mask=inside, other=0)
    before = tl.load(heads_ptr + 3 * blocks + block, mask=inside, other=0)
    return now + before > 0


@triton.jit(
    do_not_specialize=["chunk", "first_block", "blocks", "listed", "capacity"],
    do_not_specialize_on_alignment=["table_ptr", "used_ptr", "heads_ptr", "ends_ptr"],
)
def _keep_slots_kernel(
    kept_ptr, kept_columns_ptr,  # (S, ROWS) bfloat16, (S,) int32
    table_ptr,  # (NB, 2) int64
    used_ptr,  # (2,) int32
    slots_ptr, addresses_ptr, columns_ptr,  # (slots, ROWS) bfloat16; (B, P) int32
    heads_ptr, ends_ptr,  # (5, B), (B,) int32
    chunk, first_block, blocks, listed, capacity,
    WITH_SLOTS: tl.constexpr, ROWS: tl.constexpr, PIECES: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) // PIECES
    piece = tl.program_id(0) % PIECES
    before, everything = 0, 0
    for start in range(0, blocks, BLOCK_B):
        other = start + tl.arange(0, BLOCK_B)
        count = tl.load(ends_ptr + other, mask=other < blocks, other=0)
        count = tl.where(_is_dense(heads_ptr, other, other < blocks, blocks), 0, count)
        before += tl.sum(tl.where(other < block, count, 0), 0)
        everything += tl.sum(count, 0)
    used = tl.load(used_ptr + chunk % 2, mask=chunk > 0, other=0)
    count = tl.load(ends_ptr + block)
    fits = used + before + count <= capacity
    count = tl.where(_is_dense(heads_ptr, block, block < blocks, blocks), -1, count)
    count = tl.where(fits, count, -1)
    first = used + before
    if piece == 0:
        entry = table_ptr + 2 * (first_block + block).to(tl.int64)
        tl.store(entry, tl.where(count < 0, -1, first).to(tl.int64))
        tl.store(entry + 1, count.to(tl.int64))
        if block == 0:  # past the capacity nothing fits any more
            tl.store(used_ptr + 1 - chunk % 2, tl.minimum(used + everything, capacity + 1))

    lane = tl.arange(0, ROWS)
    listed_at = block.to(tl.int64) * listed
    for start in range(piece * BLOCK_K, count, PIECES * BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        inside = k < count
        column = tl.load(columns_ptr + listed_at + k, mask=inside, other=0)
        tl.store(kept_columns_ptr + first + k, column, mask=inside)
        if WITH_SLOTS:
            address = tl.load(addresses_ptr + listed_at + k, mask=inside, other=0).to(tl.int64)
            source = slots_ptr + address[:, None] * VECTOR + lane[None, :]
            slot = tl.load(source, mask=inside[:, None], other=0.0)
            out = kept_ptr + (first + k).to(tl.int64)[:, None] * ROWS + lane[None, :]
            tl.store(out, slot, mask=inside[:, None])


class KeepSlots:
    """What is kept of the chunks of one call, in order."""

    def __init__(self, state: ScanState, store: SlotStore, vocabulary_blocks: int) -> None:
        """Takes what stays the same; nothing is in the store before the first chunk."""
        row = row_of("keep_slots", state.slots.dtype, state.slots.device)
        counts = state.ends[vocabulary_blocks % 2]  # what the last block of the vocabulary wrote
        self.start = Start(
            _keep_slots_kernel,
            (
                state.slots if store.slots is None else store.slots, store.columns, store.table,
                state.used.new_empty(2), state.slots, state.addresses, state.columns, state.heads,
                counts,
            ),
            row,
            {
                "WITH_SLOTS": store.slots is not None, "ROWS": COMPACT_ROWS, "PIECES": _PIECES,
                "BLOCK_B": _COUNTED, "BLOCK_K": row.block, "VECTOR": VECTOR,
            },
        )  # fmt: skip
        self.last = (state.shape.listed, store.columns.shape[0])

    def __call__(self, start: int, stop: int, chunk: int) -> None:
        """Launches rows `start` to `stop`, of the chunk-th chunk."""
        blocks = cdiv(stop - start, COMPACT_ROWS)
        self.start(blocks * _PIECES, chunk, start // COMPACT_ROWS, blocks, *self.last)
