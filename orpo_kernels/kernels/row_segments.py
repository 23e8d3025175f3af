"""The kept entries by vocabulary block: what a trainable head keeps from forward to backward.

A row of a chunk is live in a block of 64 vocabulary columns when some kept |E| there is over
eps * total; its 64 columns are then a segment, bfloat16, 128 bytes, zeros where nothing was kept.
Segments are the slots of the product that makes dW (`weight_gradient`).

`_seg_count_kernel` and `_pack_segments_kernel` read the kept slots of a chunk, not its logits, and
append its segments to a store of bounded capacity. Whether they fit is decided on the device, for
the chunk as a whole: one that does not fit leaves nothing behind and raises its overflow flag, and
the backward, where it waits for the device anyway, reads the flags and recomputes those chunks the
exact way.

N rows in NB blocks of 64 over all chunks, B of them in this one; W blocks of 64 columns; S segments
of capacity. No atomics; every order is fixed. Bytes: the slots twice, the segments once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.constants import COMPACT_COLUMNS, COMPACT_ROWS
from orpo_kernels.kernels.segment_store import SEGMENT_COLUMNS, SegmentStore, Slots
from orpo_kernels.kernels.softmax_compact import slot_offset
from orpo_kernels.kernels.tuning import Device, Row, compile_options, launch

# A slot is rounded: what was over eps before may be 2^-8 of itself under it after.
_SLACK = tl.constexpr(1.0 - 2.0**-7)


@triton.jit
def _kept_tile(
    slots_ptr, stride_slots, live_ptr, block, tile, half, T,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SPAN: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Kept E of 64 columns, (WIDTH, ROWS) float32: half 0 or 1 of a tile, 0 where dropped."""
    column = tl.arange(0, WIDTH)
    live_ptr += (block.to(tl.int64) * T + tile) * COLUMNS
    live = tl.load(live_ptr + half * WIDTH + column).to(tl.int32)
    before = 0
    if half == 1:
        before = tl.sum(tl.load(live_ptr + column).to(tl.int32), 0)
    position = before + tl.cumsum(live, 0) - live
    start = slot_offset(position, block, tile, stride_slots, ROWS, SPAN)
    offs = start[:, None] + tl.arange(0, ROWS)[None, :]
    return tl.load(slots_ptr + offs, mask=(live != 0)[:, None], other=0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=["stride_slots", "R", "T"],
    do_not_specialize_on_alignment=["live_rows_ptr", "threshold_ptr"],
)
def _seg_count_kernel(
    live_rows_ptr,  # (B, W) int64
    counts_ptr,  # (B, W) int32
    slots_ptr, stride_slots, live_ptr,  # bfloat16; (B, T COLUMNS) int8
    threshold_ptr,  # (R,) float32
    R, T,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    stride_slots = stride_slots // COLUMNS * COLUMNS
    lane = tl.arange(0, ROWS)
    row = block * ROWS + lane
    threshold = tl.load(threshold_ptr + row, mask=row < R, other=float("inf")) * _SLACK
    first = tl.program_id(0) * TILES
    for tile in range(first, tl.minimum(first + TILES, T)):
        for half in tl.static_range(2):
            e = _kept_tile(
                slots_ptr, stride_slots, live_ptr, block, tile, half, T, ROWS, COLUMNS, SPAN, WIDTH
            )
            over = tl.max(tl.abs(e), 0) > threshold
            out = (block.to(tl.int64) * T + tile) * 2 + half
            tl.store(live_rows_ptr + out, tl.sum(over.to(tl.int64) << lane.to(tl.int64), 0))
            tl.store(counts_ptr + out, tl.sum(over.to(tl.int32), 0))


@triton.jit(
    do_not_specialize=["stride_slots", "T", "chunk", "first_row", "capacity"],
    do_not_specialize_on_alignment=[
        "starts_ptr", "kept_counts_ptr", "first_rows_ptr", "live_rows_ptr",
    ],
)  # fmt: skip
def _pack_segments_kernel(
    segments_ptr, starts_ptr, kept_counts_ptr,  # (S, WIDTH) bfloat16; (B, W) int32
    first_rows_ptr, used_ptr, overflow_ptr,  # (B,); (chunks + 1,); (chunks,) int32
    mass_ptr,  # (programs of a row block, B ROWS) float32
    slots_ptr, stride_slots, live_ptr,  # bfloat16; (B, T COLUMNS) int8
    live_rows_ptr, counts_ptr, ends_ptr,  # (B, W)
    T, chunk, first_row, capacity,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, SPAN: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    blocks = tl.num_programs(1)
    stride_slots = stride_slots // COLUMNS * COLUMNS
    lane = tl.arange(0, ROWS)
    used = tl.load(used_ptr + chunk)
    total = tl.load(ends_ptr + blocks.to(tl.int64) * T * 2 - 1)
    fits = total <= capacity - used
    first = tl.program_id(0) * TILES
    if first == 0:
        tl.store(first_rows_ptr + block, first_row + block * ROWS)
        if block == 0:
            tl.store(used_ptr + chunk + 1, used + tl.where(fits, total, 0))
            tl.store(overflow_ptr + chunk, 1 - fits.to(tl.int32))

    mass = tl.zeros((ROWS,), tl.float32)
    for tile in range(first, tl.minimum(first + TILES, T)):
        for half in tl.static_range(2):
            e = _kept_tile(
                slots_ptr, stride_slots, live_ptr, block, tile, half, T, ROWS, COLUMNS, SPAN, WIDTH
            )
            entry = (block.to(tl.int64) * T + tile) * 2 + half
            count = tl.load(counts_ptr + entry)
            start = used + tl.load(ends_ptr + entry) - count
            tl.store(starts_ptr + entry, start)
            tl.store(kept_counts_ptr + entry, tl.where(fits, count, 0))
            over = ((tl.load(live_rows_ptr + entry) >> lane.to(tl.int64)) & 1).to(tl.int32)
            mass += tl.where(over != 0, tl.sum(e, 0), 0.0)
            segment = start + tl.cumsum(over, 0) - over
            offs = segment[:, None].to(tl.int64) * WIDTH + tl.arange(0, WIDTH)[None, :]
            stored = (over != 0) & (tl.where(fits, segment, capacity) < capacity)
            tl.store(segments_ptr + offs, tl.trans(e).to(tl.bfloat16), mask=stored[:, None])
    tl.store(mass_ptr + (tl.program_id(0).to(tl.int64) * blocks + block) * ROWS + lane, mass)


def pack_segments(
    store: SegmentStore, kept: Slots, chunk: int, block: int, first_row: int
) -> Tensor:
    """Launches the packing of a chunk: appends its segments, or raises its overflow flag.

    Args:
        store: of `segment_store`; chunks are packed in order.
        kept: of `softmax_compact`, of the whole vocabulary.
        chunk: number of this chunk.
        block: row blocks before it.
        first_row: rows before it.

    Returns:
        (R,) float32 sum of the packed E per row: the mass of dW, whose rows keep a little less
        than those of dhidden. Meaningless for a chunk that did not fit.
    """
    slots, columns, live, threshold = kept.slots, kept.columns, kept.live, kept.threshold
    B, T = columns.shape[0], columns.shape[1] // COMPACT_COLUMNS
    here = slice(block, block + B)

    def run(row: Row, device: Device) -> Tensor:
        programs = triton.cdiv(T, row.block)
        counts = columns.new_empty((B, store.counts.shape[1]))
        mass = threshold.new_empty((programs, B * COMPACT_ROWS))
        options = {
            "ROWS": COMPACT_ROWS, "COLUMNS": COMPACT_COLUMNS, "TILES": row.block,
            "SPAN": slots.shape[1] // T, "WIDTH": SEGMENT_COLUMNS, **compile_options(row, device),
        }  # fmt: skip
        _seg_count_kernel[(programs, B)](
            store.live[here], counts, slots, slots.stride(0), live, threshold,
            threshold.shape[0], T, **options,
        )  # fmt: skip
        ends = torch.cumsum(counts.view(-1), 0, dtype=torch.int32)
        _pack_segments_kernel[(programs, B)](
            store.segments, store.starts[here], store.counts[here], store.first_rows[here],
            store.used, store.overflow, mass, slots, slots.stride(0), live,
            store.live[here], counts, ends, T, chunk, first_row, store.segments.shape[0], **options,
        )  # fmt: skip
        return mass.sum(0)[: threshold.shape[0]]

    return launch("pack_segments", torch.bfloat16, slots.device, run)
