"""The live columns of a tile to slots, and what it drops to the sums of the tail.

    slot_k[t] = E_tv r_tv scale / 2^reference_t,  v = column k of the list of 64 rows, bfloat16;
                of a column that is listed twice, the second has what rounding left of the first
    mass_t   <- factor_t mass_t + sum of the slots of a wide span, as rounded
    tail_gv  += sum over row blocks that are not dense of the column sums of `scan`

A program has 64 rows and a wide span of columns, several of `scan`: it lists the live ones at the place that the counts
before it leave, and reads those again from the tile. Others add the tail, 256 columns each, over
the row blocks in order. Where a reference moved, the slots of earlier blocks are brought to the new
one first. Bytes: 4 (2) per entry of live columns, in sectors of 32; slots, lists; the tail sums once.
"""

import triton
import triton.language as tl

from orpo_kernels.constants import COMPACT_ROWS
from orpo_kernels.kernels.elementwise import whole_vectors
from orpo_kernels.kernels.inputs import Inputs
from orpo_kernels.kernels.scan import NEVER, WHOLE, exponentials
from orpo_kernels.kernels.scan_state import ScanState
from orpo_kernels.kernels.start import Start
from orpo_kernels.kernels.tuning import VECTOR, cdiv, row_of

_COUNTED = 128  # counts a program looks at together
_ADDED = 16  # row blocks whose sums it adds at once


@triton.jit
def reference_of(rows_ptr, exists, M):
    """What slots of rows refer to; where a row has nothing yet, what makes every entry 0."""
    reference = tl.load(rows_ptr + M, mask=exists, other=NEVER)
    return tl.where(reference < -0.5 * NEVER, NEVER, reference)


@triton.jit
def listed_columns(columns_ptr, k, count):
    """The columns of entries k of a list, and which is the second of its column."""
    token = tl.load(columns_ptr + k, mask=k < count, other=0)
    earlier = tl.load(columns_ptr + k - 1, mask=(k > 0) & (k < count), other=-1)
    return token, earlier == token


@triton.jit
def slot_of(u, again):
    """Entries (BLOCK_K, ROWS) rounded, or what that leaves of them."""
    slot = u.to(tl.bfloat16)
    return tl.where(again[:, None], (u - slot.to(tl.float32)).to(tl.bfloat16), slot)


@triton.jit
def _add_tails(
    tail_ptr, tails_ptr, heads_ptr, column, blocks, pitch, C, V, GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
):  # fmt: skip
    """To the sums of columns those of row blocks, in order."""
    for group in tl.static_range(GROUPS):
        out = tail_ptr + group * V + column
        total = tl.load(out, mask=column < C, other=0.0)
        for start in range(0, blocks, BLOCKS):
            for each in tl.static_range(BLOCKS):  # whose loads do not wait for one another
                block = start + each
                dense = tl.load(heads_ptr + block, mask=block < blocks, other=1)
                end = tl.where(dense > 0, 0, C)
                at = tails_ptr + tl.cast(block * GROUPS + group, tl.int64) * pitch + column
                total += tl.load(at, mask=column < end, other=0.0)
        tl.store(out, total, mask=column < C)


@triton.jit
def _counts_of(counts_ptr, start, end, BLOCK: tl.constexpr):
    """Counts of some spans."""
    span = start + tl.arange(0, BLOCK)
    return tl.load(counts_ptr + span, mask=span < end, other=0)


@triton.jit
def _slots_of(counts_ptr, counts, first, end, BLOCK: tl.constexpr):
    """Slots of the spans before `first`, and from there to `end`; the first counts are given."""
    before, mine = 0, 0
    for start in range(0, end, BLOCK):
        span, count = start + tl.arange(0, BLOCK), counts % WHOLE
        counts = _counts_of(counts_ptr, start + BLOCK, end, BLOCK)
        before += tl.sum(tl.where(span < first, count, 0), 0)
        mine += tl.sum(tl.where(span < first, 0, count), 0)
    return before, mine


@triton.jit
def _heads(heads_ptr, blocks):
    """Of a row block: whether it is dense, its first entry and slot, whether its reference moved."""
    first_entry, first_slot = tl.load(heads_ptr + blocks), tl.load(heads_ptr + 2 * blocks)
    return tl.load(heads_ptr), first_entry, first_slot, tl.load(heads_ptr + 4 * blocks)


@triton.jit
def _rescale(slots_ptr, addresses_ptr, factor, entries, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Slots of earlier blocks times a power of two by row."""
    for start in range(0, entries, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at = tl.load(addresses_ptr + k, mask=k < entries, other=0).to(tl.int64)
        at = slots_ptr + at[:, None] * 8 + tl.arange(0, ROWS)[None, :]
        mine = (k < entries)[:, None]
        slot = tl.load(at, mask=mine, other=0.0).to(tl.float32) * factor[None, :]
        tl.store(at, slot.to(tl.bfloat16), mask=mine)


@triton.jit(
    do_not_specialize=[
        "first_row", "R", "C", "first_column", "blocks", "index", "width", "spans", "together",
        "masses",
        "listed", "stride_logits", "M", "V", "ratio", "log2_scale", "logit_scale",
    ],
    do_not_specialize_on_alignment=[
        "mass_ptr", "columns_ptr", "addresses_ptr", "tail_ptr", "heads_ptr", "counts_ptr",
        "factor_ptr", "rows_ptr", "bias_ptr",
    ],
)  # fmt: skip
def _pack_slots_kernel(
    slots_ptr,  # (slots, ROWS) bfloat16
    mass_ptr,  # (W, R) float32
    columns_ptr, addresses_ptr,  # (B, P) int32
    tail_ptr,  # (G, V) float32
    tails_ptr,  # (B, G, S SPAN) float32
    live_ptr,  # (B, S SPAN) int8: slots of a column
    heads_ptr, counts_ptr,  # (5, B), (B, S) int32
    factor_ptr, rows_ptr,  # (R,), (4, M) float32
    logits_ptr,  # (R, C)
    bias_ptr,  # (V,)
    first_row, R, C, first_column, blocks, index, width, spans, together, masses, listed, stride_logits,
    M, V, ratio, log2_scale, logit_scale,
    GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, SIGN: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
    TAIL: tl.constexpr, BLOCKS: tl.constexpr, TILE: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    width = width // TILE * TILE  # which the compiler then sees
    if pid >= masses * blocks:
        column = (pid - masses * blocks) * TAIL + tl.arange(0, TAIL)
        _add_tails(
            tail_ptr + first_column, tails_ptr, heads_ptr, column, blocks, spans * width, C, V,
            GROUPS, BLOCKS,
        )  # fmt: skip
        return
    span = pid % masses
    block = pid // masses
    lane = block * ROWS + tl.arange(0, ROWS)
    exists = lane < R
    columns_ptr += block.to(tl.int64) * listed
    addresses_ptr += block.to(tl.int64) * listed
    # All that the start depends on is on its way before anything waits for any of it; of the marks
    # last, which threads exchange as soon as they have them.
    first = span * together
    end = tl.minimum(first + together, spans)
    reference = reference_of(rows_ptr + first_row + lane, exists, M)
    factor = tl.load(factor_ptr + lane, mask=exists, other=1.0)
    at_mass = mass_ptr + span.to(tl.int64) * R + lane
    filled = tl.where(index > 0, R, 0)  # of a chunk's first block nothing was written before
    mass = tl.load(at_mass, mask=lane < filled, other=0.0) * factor
    dense, first_entry, first_slot, moved = _heads(heads_ptr + block, blocks)
    counts = _counts_of(counts_ptr + block * spans, 0, end, BLOCK_S)
    column = first * width + tl.arange(0, SPAN)
    live_ptr += block.to(tl.int64) * (spans * width)
    inside = column < tl.minimum(C, end * width)
    live = tl.load(live_ptr + column, mask=inside, other=0).to(tl.int32)
    before, count = _slots_of(counts_ptr + block * spans, counts, first, end, BLOCK_S)
    count = tl.where(dense > 0, 0, count)
    if (span == 0) & (moved > 0):
        _rescale(slots_ptr, addresses_ptr, factor, first_entry, ROWS, BLOCK_K)
    if count > 0:
        place = before + tl.cumsum(live, 0) - live
        for one in tl.static_range(2):
            entry = first_entry + place + one
            tl.store(columns_ptr + entry, first_column + column, mask=live > one)
            address = (first_slot + place + one) * (ROWS // 8)
            tl.store(addresses_ptr + entry, address, mask=live > one)
        tl.debug_barrier()  # what the other threads listed is read next

        offs = lane.to(tl.int64) * whole_vectors(stride_logits, True, VECTOR)
        for start in range(0, count, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            token, again = listed_columns(columns_ptr + first_entry + before, k, count)
            mine = (k < count)[:, None] & exists[None, :]
            source = logits_ptr + offs[None, :] + (token - first_column)[:, None]
            x = tl.load(source, mask=mine, other=0.0).to(tl.float32)
            bias = 0.0
            if HAS_BIAS:
                bias = tl.load(bias_ptr + token, mask=k < count, other=0.0).to(tl.float32)[:, None]
            _e, u = exponentials(x, bias, reference[None, :], ratio, log2_scale, SIGN, HAS_SOFTCAP)
            slot = slot_of(tl.where(mine, u * logit_scale, 0.0), again)
            mass += tl.sum(slot.to(tl.float32), 0)
            slot_at = slots_ptr + (first_slot + before + k).to(tl.int64)[:, None] * ROWS
            tl.store(slot_at + tl.arange(0, ROWS)[None, :], slot, mask=(k < count)[:, None])
    tl.store(at_mass, mass, mask=exists)


class PackSlots:
    """The slots of the tiles of one call: tensors stay, rows and columns change."""

    def __init__(self, inputs: Inputs, state: ScanState) -> None:
        """Takes what stays the same from tile to tile."""
        row = row_of("pack_slots", inputs.wide, inputs.labels.device)
        self.state, self.tail_block = state, row.block
        self.start = Start(
            _pack_slots_kernel,
            (
                state.slots, state.mass, state.columns, state.addresses, state.tail, state.tails,
                state.live, state.heads, state.counts, state.factor, state.rows, state.logits,
                inputs.bias,
            ),
            row,
            {
                "GROUPS": state.group_count, "HAS_BIAS": inputs.bias is not None,
                "HAS_SOFTCAP": inputs.softcap is not None,
                "SIGN": -1.0 if inputs.logit_scale < 0 else 1.0, "ROWS": COMPACT_ROWS,
                "SPAN": state.most_columns, "BLOCK_K": row.depth,
                "BLOCK_S": _COUNTED, "TAIL": row.block, "BLOCKS": _ADDED, "TILE": state.row.depth,
                "VECTOR": VECTOR,
            },
        )  # fmt: skip
        scale = float(inputs.logit_scale)
        self.last = (
            state.shape.listed, state.logits.stride(0), state.rows.shape[1], state.tail.shape[1],
            *state.numbers(inputs), scale,
        )  # fmt: skip

    def __call__(self, rows: tuple[int, int], columns: tuple[int, int], index: int) -> None:
        """Launches the slots of rows `start` to `stop` in the index-th vocabulary block."""
        (start, stop), (v0, v1) = rows, columns
        blocks, spans = cdiv(stop - start, COMPACT_ROWS), self.state.spans(v1 - v0)
        tails = cdiv(v1 - v0, self.tail_block)
        masses = self.state.mass.shape[0]
        self.start(
            masses * blocks + tails, start, stop - start, v1 - v0, v0, blocks, index,
            self.state.tiles * self.state.row.depth, spans, self.state.together, masses,
            *self.last,
        )  # fmt: skip
