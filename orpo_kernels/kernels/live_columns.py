"""From a look at a tile to what is kept of it: running sums of the rows, room for the live columns.

    ref, s      <- running reference (base 2, whole numbers) and sum of the exponentials of a row
    estimate    <- log2 of that sum and the labels' exponentials: at most what it will be in the end
    a row block is dense, and keeps the whole tile, when its columns have no room or are more than
    the exact way costs, or when what it would have dropped so far is over a share of its mass

What is dropped is counted against estimates, which are never too high: the mass that 64 rows give
back as an average is at most that share, whatever the logits.

The reference moves only when the sum passes 2^12 of it (of float16 products less, where the scale
of the logits is over 8): slots that refer to it are then multiplied by `factor`, a power of two,
which rounds nothing. One program for 64 rows; each adds the counts of
all blocks before it, in one order. No atomics, and nothing for the host to wait for.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.constants import COMPACT_ROWS
from orpo_kernels.kernels.elementwise import log_add
from orpo_kernels.kernels.inputs import Inputs
from orpo_kernels.kernels.scan import NEVER, SPANS, WHOLE, add_spans
from orpo_kernels.kernels.scan_state import ScanState, product_dtype
from orpo_kernels.kernels.start import Start
from orpo_kernels.kernels.tuning import cdiv, row_of

MOST_LOST = 0.2
"""Mass of a row block that is given back as an average, at most, as a share of all of it."""

MOST_LIVE = 4
"""One in so many columns of a tile is kept, at most; with more, multiplying all of them is as fast."""

_LIMIT = 12  # powers of two that a sum may be over its reference
_REACH = 15  # and that float16 takes of it, times the scale
_LEAST = tl.constexpr(100.0)  # 2^-126 is the smallest normal number
_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_COUNTED = (16, 64)  # counts a program looks at together: row blocks, spans
_LOWEST = tl.constexpr(-1e30)  # a reference where there is nothing yet


@triton.jit(
    do_not_specialize=["M"],
    do_not_specialize_on_alignment=["rows_ptr", "state_ptr", "labels_ptr", "second_ptr"],
)
def _first_estimate_kernel(
    rows_ptr,  # (4, M) float32
    state_ptr,  # (2 + 2 K, M) float32
    labels_ptr, second_ptr,  # (M,) int64
    M,
    HAS_SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = row < M
    label = tl.load(labels_ptr + row, mask=exists, other=-1)
    z = tl.load(state_ptr + 2 * M + row, mask=exists, other=0.0)
    if HAS_SECOND:
        second = tl.load(second_ptr + row, mask=exists, other=-1)
        z2 = tl.load(state_ptr + 4 * M + row, mask=exists, other=0.0)
        z = tl.where(second >= 0, log_add(z, z2), z)
    z = tl.where(label >= 0, tl.maximum(z * _LOG2_E, _LOWEST), NEVER)
    tl.store(rows_ptr + row, z, mask=exists)
    tl.store(rows_ptr + M + row, z * 0.0 + _LOWEST, mask=exists)
    tl.store(rows_ptr + 2 * M + row, z, mask=exists)
    tl.store(rows_ptr + 3 * M + row, z * 0.0, mask=exists)


@triton.jit
def _rows_of(rows_ptr, state_ptr, exists, M):
    """Of rows: the labels' exponentials, reference and sum so far, what was looked at."""
    labels = tl.load(rows_ptr + 2 * M, mask=exists, other=NEVER)
    old = tl.load(rows_ptr + M, mask=exists, other=_LOWEST)
    s = tl.load(state_ptr + M, mask=exists, other=0.0)
    return labels, old, s, tl.load(rows_ptr + 3 * M, mask=exists, other=0.0)


@triton.jit
def _earlier(heads_ptr, ends_ptr, used_ptr, lost_ptr, block, blocks, allocated, index):
    """Of the blocks of the vocabulary before: slots, entries, what was lost, had a sum."""
    later = index > 0  # of a chunk's first block nothing was written before
    used = tl.load(used_ptr + index % 2, mask=later, other=0)
    entry = tl.load(ends_ptr + index % 2 * allocated + block, mask=later, other=0)
    lost = tl.load(lost_ptr + block, mask=later, other=0.0)
    had_sum = tl.load(heads_ptr + block, mask=later, other=0)
    had_sum += tl.load(heads_ptr + 3 * blocks + block, mask=later, other=0)
    return used, entry, lost, had_sum


@triton.jit
def _counts_of(
    counts_ptr, first, start, blocks, spans, BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Counts of some row blocks and spans."""
    other, span = first + tl.arange(0, BLOCK_B), start + tl.arange(0, BLOCK_S)
    inside = (other < blocks)[:, None] & (span < spans)[None, :]
    return tl.load(counts_ptr + other[:, None] * spans + span[None, :], mask=inside, other=0)


@triton.jit
def _ends_of(ends_ptr, first, blocks, index, allocated, BLOCK_B: tl.constexpr):
    """Entries of the lists of some row blocks before this tile."""
    other = first + tl.arange(0, BLOCK_B)
    there = other < tl.where(index > 0, blocks, 0)
    return tl.load(ends_ptr + index % 2 * allocated + other, mask=there, other=0)


@triton.jit
def _room(
    counts_ptr, ends_ptr, counts, ends, block, blocks, allocated, index, spans, most, listed,
    BLOCK_B: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Slots and columns of this block, whether its list takes them; slots before it, and of all.

    Of `counts` and `ends` the first are given; each next is loaded before the last is looked at.
    """
    each = tl.arange(0, BLOCK_B)
    before, everything, mine, mine_live, fits = 0, 0, 0, 0, 0
    for first in range(0, blocks, BLOCK_B):
        other, end = first + each, ends
        ends = _ends_of(ends_ptr, first + BLOCK_B, blocks, index, allocated, BLOCK_B)
        count = tl.zeros((BLOCK_B,), tl.int32)
        live = count
        for start in range(0, spans, BLOCK_S):
            both, following = counts, start + BLOCK_S
            counts = _counts_of(
                counts_ptr, tl.where(following < spans, first, first + BLOCK_B),
                tl.where(following < spans, following, 0), blocks, spans, BLOCK_B, BLOCK_S,
            )  # fmt: skip
            count += tl.sum(both % WHOLE, 1)
            live += tl.sum(both // WHOLE, 1)
        takes = (live <= most) & (end + count <= listed)
        taken = tl.where(takes, count, 0)
        before += tl.sum(tl.where(other < block, taken, 0), 0)
        everything += tl.sum(taken, 0)
        mine += tl.sum(tl.where(other == block, count, 0), 0)
        mine_live += tl.sum(tl.where(other == block, live, 0), 0)
        fits += tl.sum(tl.where((other == block) & takes, 1, 0), 0)
    return mine, mine_live, fits, before, everything


@triton.jit
def _some(values_ptr, start, count, BLOCK: tl.constexpr):
    each = start + tl.arange(0, BLOCK)
    return tl.load(values_ptr + each, mask=each < count, other=0.0)


@triton.jit
def _reference(old, s, top, total, LIMIT: tl.constexpr):
    """The reference of rows with sums s, and total of this tile; what brings both sums to it."""
    higher = tl.where(total > 0, tl.maximum(old, top), old)
    both = s * tl.exp2(old - higher) + total * tl.exp2(tl.where(total > 0, top - higher, 0.0))
    log_sum = higher + tl.log2(tl.where(both > 0, both, 1.0))
    # Beside a label that is certain a sum may be too small for its own reference.
    found = tl.floor(tl.maximum(log_sum, higher - _LEAST))
    reference = tl.where((both > 0) & (log_sum > old + LIMIT), found, old)
    factor = tl.where(s > 0, tl.exp2(old - reference), 1.0)
    return reference, factor, tl.exp2(tl.where(total > 0, top - reference, 0.0))


@triton.jit
def _estimate(reference, s, labels):
    """log2 of the exponentials so far, those of the labels among them."""
    known = tl.where(s > 0, reference + tl.log2(tl.where(s > 0, s, 1.0)), labels)
    higher = tl.maximum(known, labels)
    lower = tl.where(s > 0, tl.minimum(known, labels), _LOWEST)
    return higher + tl.log2(1.0 + tl.exp2(lower - higher))


@triton.jit(
    do_not_specialize=[
        "first_row", "R", "C", "index", "spans", "M", "most", "listed", "capacity", "allocated",
        "most_lost",
    ],
    do_not_specialize_on_alignment=[
        "heads_ptr", "ends_ptr", "used_ptr", "lost_ptr", "rows_ptr", "state_ptr", "factor_ptr",
        "entries_ptr", "partial_ptr", "counts_ptr", "losses_ptr",
    ],
)  # fmt: skip
def _live_columns_kernel(
    heads_ptr,  # (5, B) int32: is dense, first entry, first slot, had a sum, moved
    ends_ptr, used_ptr,  # (2, B), (2,) int32
    lost_ptr,  # (B,) float32
    rows_ptr,  # (4, M) float32: estimate, reference, labels, looked at
    state_ptr,  # (2 + 2 K, M) float32: reference (natural), sum
    factor_ptr,  # (R,) float32
    entries_ptr,  # (M / ROWS,) int64
    partial_ptr,  # (2 or 3, S, R) float32
    counts_ptr, losses_ptr,  # (B, S) int32, float32
    first_row, R, C, index, spans, M, most, listed, capacity, allocated, most_lost,
    HAS_SOFTCAP: tl.constexpr, LIMIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_S: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    blocks = tl.num_programs(0)
    lane = block * ROWS + tl.arange(0, ROWS)
    exists = lane < R
    rows_ptr += first_row + lane
    state_ptr += first_row + lane
    losses_ptr += block * spans
    # Everything is on its way before anything waits, which takes longer than to compute it.
    labels, old, s, looked = _rows_of(rows_ptr, state_ptr, exists, M)
    counts = _counts_of(counts_ptr, 0, 0, blocks, spans, BLOCK_B, BLOCK_S)
    ends = _ends_of(ends_ptr, 0, blocks, index, allocated, BLOCK_B)
    some = _some(losses_ptr, 0, spans, BLOCK_S)
    used, first_entry, lost, had_sum = _earlier(
        heads_ptr, ends_ptr, used_ptr, lost_ptr, block, blocks, allocated, index
    )
    entries_ptr += first_row // ROWS + block
    kept = tl.load(entries_ptr)
    zero = tl.zeros((ROWS,), tl.float32)
    top, total, sloped = add_spans(
        partial_ptr, lane, exists, R, spans, zero + _LOWEST, zero, zero, HAS_SOFTCAP, SPANS
    )

    mine, live, fits, before, everything = _room(
        counts_ptr, ends_ptr, counts, ends, block, blocks, allocated, index, spans, most, listed,
        BLOCK_B, BLOCK_S,
    )  # fmt: skip
    loses = tl.sum(some, 0)
    for start in range(BLOCK_S, spans, BLOCK_S):
        loses += tl.sum(_some(losses_ptr, start, spans, BLOCK_S), 0)
    scored = labels < NEVER
    count = tl.sum(scored.to(tl.float32), 0)
    first_slot = used + before
    fits = tl.where(first_slot + mine <= capacity, fits, 0)
    fits = tl.where(lost + loses <= most_lost * count, fits, 0)
    if not HAS_SOFTCAP:
        sloped = total
    reference, factor, share = _reference(old, s, top, total, LIMIT)
    s = s * factor + total * share
    looked = looked * factor + tl.where(fits > 0, sloped * share, 0.0)

    tl.debug_barrier()  # several warps read the figures of a row, one writes them
    tl.store(rows_ptr, tl.where(scored, _estimate(reference, s, labels), NEVER), mask=exists)
    tl.store(rows_ptr + M, reference, mask=exists)
    tl.store(rows_ptr + 3 * M, looked, mask=exists)
    tl.store(state_ptr, reference * _LN_2, mask=exists)
    tl.store(state_ptr + M, s, mask=exists)
    tl.store(factor_ptr + lane, factor, mask=exists)
    tl.store(heads_ptr + block, 1 - fits)
    tl.store(heads_ptr + blocks + block, first_entry)
    tl.store(heads_ptr + 2 * blocks + block, first_slot)
    tl.store(heads_ptr + 3 * blocks + block, tl.where(had_sum > 0, 1, 0))
    tl.store(heads_ptr + 4 * blocks + block, tl.max((exists & (factor != 1.0)).to(tl.int32), 0))
    following = 1 - index % 2
    tl.store(ends_ptr + following * allocated + block, first_entry + mine * fits)
    tl.store(lost_ptr + block, tl.where(fits > 0, lost + loses, lost))
    if block == 0:
        tl.store(used_ptr + following, tl.minimum(used + everything, capacity))
    kept += tl.where(fits > 0, live, C).to(tl.int64) * tl.minimum(R - block * ROWS, ROWS)
    tl.store(entries_ptr, kept)


def _limit(inputs: Inputs) -> int:
    """`_LIMIT`, or what float16 has room for."""
    if product_dtype(inputs) != torch.float16:
        return _LIMIT
    return max(1, min(_LIMIT, _REACH - math.ceil(math.log2(abs(inputs.logit_scale)))))


class LiveColumns:
    """What is kept, tile by tile of one call."""

    def __init__(self, inputs: Inputs, state: ScanState, sums: Tensor) -> None:
        """Takes what stays the same; `sums` (2 + 2 K, M) float32 as `label_terms` gives it.

        Launches the first estimates, from the labels.
        """
        row = row_of("live_columns", inputs.wide, sums.device)
        M = sums.shape[1]
        first = Start(
            _first_estimate_kernel, (state.rows, sums, inputs.labels, inputs.second), row,
            {"HAS_SECOND": inputs.second is not None, "BLOCK": row.block},
        )  # fmt: skip
        first(cdiv(M, row.block), M)
        self.start = Start(
            _live_columns_kernel,
            (
                state.heads, state.ends, state.used, state.lost, state.rows, sums, state.factor,
                state.entries, state.partial, state.counts, state.losses,
            ),
            row,
            {
                "HAS_SOFTCAP": inputs.softcap is not None, "LIMIT": _limit(inputs),
                "ROWS": COMPACT_ROWS, "BLOCK_B": _COUNTED[0], "BLOCK_S": _COUNTED[1], "SPANS": SPANS,
            },
        )  # fmt: skip
        self.state, self.last = state, (
            state.shape.listed, state.shape.slots, state.heads.shape[1], MOST_LOST,
        )  # fmt: skip

    def dense(self, rows: int) -> Tensor:
        """Of the tile launched last, of so many rows: (B,) int32, 1 for a dense row block."""
        return self.state.heads.view(-1)[: cdiv(rows, COMPACT_ROWS)]

    def __call__(self, rows: tuple[int, int], columns: tuple[int, int], index: int) -> None:
        """Launches the lists of rows `start` to `stop` in the index-th vocabulary block."""
        (start, stop), (v0, v1) = rows, columns
        blocks = cdiv(stop - start, COMPACT_ROWS)
        self.start(
            blocks, start, stop - start, v1 - v0, index, self.state.spans(v1 - v0),
            self.state.rows.shape[1], (v1 - v0) // MOST_LIVE, *self.last,
        )  # fmt: skip
