"""A tile of logits to the entries of its softmax worth keeping, stored over the logits themselves.

    E_rc = exp(z_rc - reference_r) d_rc,  0 in the columns of labels     u_rc = E_rc / total_r
    column c is kept for 64 rows together when some |u_rc| > eps;  the others are the tail:
    tail_gc += sum over rows r of group g of u_rc, c dropped

R rows in B blocks of 64, C columns in T tiles of 128, G groups of rows (1 or 2), K label sets. A
kept column is a slot: 64 bfloat16 values, 128 bytes. The slots of a tile lie in the tile's own
memory, which always has the room: no capacity, no second pass, no atomics, nothing to wait for.

`_softmax_compact_kernel` reads every logit once and does nothing per row but with a softcap, where
the sum of the E is not known otherwise. `_list_columns_kernel` then reads what was kept, a few
percent of it: sorted lists of column and address per row block, and the sum of the kept E per row.
Float32 arithmetic; partial sums of row blocks and of tiles are added in a fixed order. Bytes: the
tile once, the slots twice; beside it 4 G / 64 + 1 / 64 + 8 / 64 per logit for sums, mask and lists.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.constants import COMPACT_COLUMNS, COMPACT_ROWS
from orpo_kernels.kernels.elementwise import transform
from orpo_kernels.kernels.segment_store import Slots
from orpo_kernels.kernels.tuning import VECTOR, Device, Row, compile_options, launch

_LOG2_E = tl.constexpr(1.4426950408889634)
_SLOTS = 32  # slots summed together per row


@triton.jit
def slot_offset(position, block, tile, stride, ROWS: tl.constexpr, SPAN: tl.constexpr):
    """Where slot `position` of a tile starts, in elements of ROWS per slot and rows of `stride`.

    SPAN: bfloat16 values a row of the tile has room for, a multiple of ROWS.
    """
    PER_ROW: tl.constexpr = SPAN // ROWS
    row = block.to(tl.int64) * ROWS + position // PER_ROW
    return row * stride + tl.cast(tile, tl.int64) * SPAN + position % PER_ROW * ROWS


@triton.jit
def _row_figures(reference_ptr, total_ptr, groups_ptr, row, R, GROUPS: tl.constexpr):
    """Of rows: the reference, and 1 / total, negative in the second group.

    By sign, because a second row vector would not fit the registers. Of rows that are not there, or
    have nothing but their label, every E is 0.
    """
    total = tl.load(total_ptr + row, mask=row < R, other=0.0)
    reference = tl.load(reference_ptr + row, mask=total > 0, other=float("inf"))
    share = tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)
    if GROUPS == 2:
        group = tl.load(groups_ptr + row, mask=row < R, other=0)
        share = tl.where(group == 1, -share, share)
    return reference, share


@triton.jit
def _store_tails(
    tail_ptr, u, live, block, column, pitch, GROUPS: tl.constexpr, SIGN: tl.constexpr
):  # fmt: skip
    """Column sums of a tile by group, 0 where kept; `u` as `_row_figures` signs it."""
    out = tail_ptr + block.to(tl.int64) * GROUPS * pitch + column
    sums = tl.where(live, 0.0, tl.sum(tl.abs(u), 0))
    if GROUPS == 2:
        difference = tl.where(live, 0.0, tl.sum(u, 0))
        tl.store(out, (SIGN * 0.5) * (sums + difference))
        tl.store(out + pitch, (SIGN * 0.5) * (sums - difference))
    else:
        tl.store(out, SIGN * sums)


@triton.jit(
    do_not_specialize=[
        "stride_slots", "stride_logits", "stride_labels", "R", "C", "T", "first_column",
    ],
    do_not_specialize_on_alignment=["labels_ptr", "reference_ptr", "total_ptr", "groups_ptr"],
)  # fmt: skip
def _softmax_compact_kernel(
    slots_ptr, stride_slots,  # bfloat16, over the logits
    live_ptr,  # (B, T COLUMNS) int8
    counts_ptr,  # (B, T) int32
    tail_ptr,  # (B, G, T COLUMNS) float32
    sums_ptr,  # (programs of a row block, B ROWS) float32, with a softcap
    logits_ptr, stride_logits,  # (R, C)
    bias_ptr,  # (C,)
    labels_ptr, stride_labels,  # (K, R) int64
    reference_ptr, total_ptr,  # (R,) float32
    groups_ptr,  # (R,) integers, with two groups
    R, C, T, first_column,
    eps, logit_scale, log2_scale, softcap,
    GROUPS: tl.constexpr, LABEL_SETS: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, SIGN: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr,
    SPAN: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    stride_slots = stride_slots // COLUMNS * COLUMNS
    stride_logits = stride_logits // COLUMNS * COLUMNS
    lane = tl.arange(0, ROWS)
    row = block * ROWS + lane
    reference, share = _row_figures(reference_ptr, total_ptr, groups_ptr, row, R, GROUPS)
    logits_ptr += block.to(tl.int64) * ROWS * stride_logits
    begin = tl.program_id(0) * TILES
    end = tl.minimum(begin + TILES, T)

    # Once per row instead of a comparison per logit: a label's own logit gets E = 0.
    excluded = tl.full((ROWS,), SIGN * float("-inf"), tl.float32).to(logits_ptr.dtype.element_ty)
    for label_set in tl.static_range(LABEL_SETS):
        label = tl.load(labels_ptr + label_set * stride_labels + row, mask=row < R, other=-1)
        label -= first_column
        mine = (row < R) & (label >= begin * COLUMNS) & (label < tl.minimum(end * COLUMNS, C))
        tl.store(logits_ptr + lane * stride_logits + label, excluded, mask=mine)
    tl.debug_barrier()

    # A row that is not there reads the last one, whose padding is read too, whatever it holds:
    # masked loads would be narrow, or need registers for their zeros.
    offs = tl.minimum(lane, R - 1 - block * ROWS)[:, None] * stride_logits
    offs = offs + tl.arange(0, COLUMNS)[None, :]
    row_sum = tl.zeros((ROWS,), tl.float32)
    for tile in range(begin, end):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        x = tl.load(logits_ptr + tl.cast(tile, tl.int64) * COLUMNS + offs).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
        # exp2: exp would spend four instructions on results that are not normal numbers.
        if HAS_SOFTCAP:
            saturated = tl.abs(x) == float("inf")  # where the slope is 0
            x = tl.where(saturated, 0.0, x)
            z, slope = transform(x, logit_scale, softcap, HAS_SOFTCAP)
            e = tl.exp2((z - reference[:, None]) * _LOG2_E) * tl.abs(slope)
            e = tl.where(saturated, 0.0, e)
        else:
            e = tl.exp2((x * logit_scale - reference[:, None]) * _LOG2_E + log2_scale)
        if RAGGED:
            e = tl.where((column < C)[None, :], e, 0.0)

        u = e * share[:, None]
        live = tl.max(tl.abs(u), 0) > eps
        count = live.to(tl.int32)
        position = tl.cumsum(count, 0) - count
        tl.store(live_ptr + block.to(tl.int64) * T * COLUMNS + column, live.to(tl.int8))
        tl.store(counts_ptr + block * T + tile, tl.sum(count, 0))
        _store_tails(tail_ptr, u, live, block, column, T * COLUMNS, GROUPS, SIGN)
        if HAS_SOFTCAP:
            row_sum += tl.sum(e, 1)

        # Every logit of the tile has been read by now, whichever thread's it was.
        tl.debug_barrier()
        start = slot_offset(position, block, tile, stride_slots, ROWS, SPAN)
        slot = tl.trans((SIGN * e).to(tl.bfloat16))
        tl.store(slots_ptr + start[:, None] + lane[None, :], slot, mask=live[:, None])

    if HAS_SOFTCAP:
        blocks = tl.num_programs(1)
        tl.store(sums_ptr + (tl.program_id(0).to(tl.int64) * blocks) * ROWS + row, SIGN * row_sum)


@triton.jit(do_not_specialize=["stride_slots", "T"])
def _list_columns_kernel(
    columns_ptr, addresses_ptr,  # (B, T COLUMNS) int32
    mass_ptr,  # (programs of a row block, B ROWS) float32
    slots_ptr, stride_slots,  # bfloat16
    live_ptr,  # (B, T COLUMNS) int8
    ends_ptr,  # (B, T) int32
    T,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr, SPAN: tl.constexpr,
    SLOTS: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1)
    stride_slots = stride_slots // COLUMNS * COLUMNS
    first = block.to(tl.int64) * T * COLUMNS
    lane = tl.arange(0, ROWS)
    mass = tl.zeros((ROWS,), tl.float32)

    for tile in range(tl.program_id(0) * TILES, tl.minimum((tl.program_id(0) + 1) * TILES, T)):
        column = tile * COLUMNS + tl.arange(0, COLUMNS)
        live = tl.load(live_ptr + first + column).to(tl.int32)
        count = tl.sum(live, 0)
        position = tl.cumsum(live, 0) - live
        end = tl.load(ends_ptr + block * T + tile)
        address = slot_offset(position, block, tile, stride_slots, ROWS, SPAN) // VECTOR
        out = first + (end - count) + position
        tl.store(columns_ptr + out, column, mask=live != 0)
        tl.store(addresses_ptr + out, address.to(tl.int32), mask=live != 0)

        for start in range(0, count, SLOTS):
            slot = start + tl.arange(0, SLOTS)
            offs = slot_offset(slot, block, tile, stride_slots, ROWS, SPAN)[:, None] + lane[None, :]
            mine = (slot < count)[:, None]
            mass += tl.sum(tl.load(slots_ptr + offs, mask=mine, other=0.0).to(tl.float32), 0)

    blocks = tl.num_programs(1)
    tl.store(mass_ptr + (tl.program_id(0).to(tl.int64) * blocks + block) * ROWS + lane, mass)


def _room(logits: Tensor) -> Tensor:
    """The tile and the padding it owns, (64 B, 128 T), or an error that says what is missing."""
    (R, C), pitch = logits.shape, logits.stride(0)
    rows = triton.cdiv(R, COMPACT_ROWS) * COMPACT_ROWS
    columns = triton.cdiv(C, COMPACT_COLUMNS) * COMPACT_COLUMNS
    last = logits.storage_offset() + (rows - 1) * pitch + columns
    has = logits.untyped_storage().nbytes() // logits.element_size()
    aligned = logits.data_ptr() % 16 == 0 and pitch % COMPACT_COLUMNS == 0
    if not aligned or pitch < columns or has < last:
        raise ValueError(
            f"logits (R, C) = {(R, C)} must have rows of a multiple of {COMPACT_COLUMNS} elements, "
            f"at least {columns}, start on 16 bytes and own {rows} such rows: the kept entries are "
            f"stored over them; got rows of {pitch} in a storage of {has} elements, of which "
            f"{last} are needed"
        )
    return logits.as_strided((rows, columns), (pitch, 1))


def softmax_compact(
    logits: Tensor,  # (R, C), overwritten with its padding
    bias: Tensor | None,  # (C,)
    labels: Tensor,  # (K, R)
    first_column: int,
    reference: Tensor,  # (R,) float32
    total: Tensor,  # (R,) float32
    eps: float,
    logit_scale: float,
    softcap: float | None,
    groups: Tensor,  # (R,) integers in [0, G), or -1
    tail: Tensor,  # (G, C) float32, added to
) -> Slots:
    """Launches the compaction. A row of no group, -1, keeps and drops nothing.

    Returns:
        The kept entries; their slots take the memory of `logits`.

    Raises:
        ValueError: `logits` has not the room (see `COMPACT_ROWS`, `COMPACT_COLUMNS`), or G is
            neither 1 nor 2.
    """
    room = _room(logits)
    G = tail.shape[0]
    if G not in (1, 2):
        raise ValueError(f"tail must be (1, C) or (2, C), got {tuple(tail.shape)}")
    bias = None if bias is None else bias.contiguous()
    labels, groups = labels.contiguous(), groups.contiguous()
    reference, total = reference.contiguous(), torch.where(groups >= 0, total, 0.0)

    def run(row: Row, device: Device) -> Slots:
        R, C = logits.shape
        B, T = room.shape[0] // COMPACT_ROWS, room.shape[1] // COMPACT_COLUMNS
        new, programs = reference.new_empty, triton.cdiv(T, row.block)
        slots = room.view(torch.bfloat16)
        live = new((B, T * COMPACT_COLUMNS), dtype=torch.int8)
        counts = new((B, T), dtype=torch.int32)
        tails, sums = new((B, G, live.shape[1])), new((programs, B * COMPACT_ROWS))
        options = {
            "ROWS": COMPACT_ROWS, "COLUMNS": COMPACT_COLUMNS, "TILES": row.block,
            "SPAN": COMPACT_COLUMNS * logits.element_size() // slots.element_size(),
        }  # fmt: skip
        _softmax_compact_kernel[(programs, B)](
            slots, slots.stride(0), live, counts, tails, sums, room, room.stride(0), bias,
            labels, labels.stride(0), reference, total, groups, R, C, T, first_column,
            eps, logit_scale, math.log2(abs(logit_scale)), 1.0 if softcap is None else softcap,
            GROUPS=G, LABEL_SETS=labels.shape[0], HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None, SIGN=-1.0 if logit_scale < 0 else 1.0, RAGGED=C % COMPACT_COLUMNS != 0,
            **options, **compile_options(row, device),
        )  # fmt: skip
        tail.add_(tails.sum(0)[:, :C])
        row_sums = sums.sum(0)[:R] if softcap is not None else new(0)
        ends = torch.cumsum(counts, 1, dtype=torch.int32)
        columns, addresses = new((2, *live.shape), dtype=torch.int32).unbind(0)
        _list_columns_kernel[(programs, B)](
            columns, addresses, sums, slots, slots.stride(0), live, ends, T,
            SLOTS=_SLOTS, VECTOR=VECTOR, num_warps=2, enable_fp_fusion=True, **options,
        )  # fmt: skip
        mass, rows = sums.sum(0)[:R], COMPACT_ROWS * B
        entries = ends[:, -1].sum() * COMPACT_ROWS - ends[-1:, -1] * (rows - R)
        return Slots(mass, row_sums, entries, slots, columns, addresses, ends, live, eps * total)

    kernel = "softmax_compact" if softcap is None else "softmax_compact_softcap"
    return launch(kernel, logits.dtype, logits.device, run)
