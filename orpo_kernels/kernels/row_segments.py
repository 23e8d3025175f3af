"""The kept entries by vocabulary block: what a trainable head keeps from forward to backward.

    dW_v = sum_t share_t 1[v = y_t] h_t - sum_t E_tv (a_t / total_t) h_t - sum_g q_gv r_g

A row of a chunk is live in a block of 64 vocabulary columns when some kept |E| there is over
eps * total; its 64 columns are then a segment, bfloat16, 128 bytes, zeros where nothing was kept.
Segments are the slots of `gather_matmul` for the product with the rows of (a / total) h, and dW is
written once, in its own dtype, with the label entries and the tails in the epilogue.

`_seg_count_kernel` and `_pack_segments_kernel` read the kept slots of a chunk, not its logits, and
append its segments to a store of bounded capacity. Whether they fit is decided on the device, for
the chunk as a whole: one that does not fit leaves nothing behind and raises its overflow flag, and
the backward, where it waits for the device anyway, reads the flags and recomputes those chunks the
exact way. `_list_tokens_kernel` turns the store into a list by vocabulary block.

N rows in NB blocks of 64 over all chunks, B of them in this one; W blocks of 64 columns; S segments
of capacity. No atomics; every order is fixed.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.constants import COMPACT_COLUMNS, COMPACT_ROWS
from orpo_kernels.kernels.gather_matmul import gathered_product
from orpo_kernels.kernels.softmax_compact import slot_offset
from orpo_kernels.kernels.tuning import VECTOR, Device, Row, compile_options, launch

_WIDTH = 64  # columns of a segment
_LISTED = 16  # row blocks listed together
_SUMMED = 64  # segments summed together
# A slot is rounded: what was over eps before may be 2^-8 of itself under it after.
_SLACK = tl.constexpr(1.0 - 2.0**-7)


class Store(NamedTuple):
    """Segments of all chunks, on the device.

    segments (S, 64) bfloat16; live (NB, W) int64, a bit per row; starts and counts (NB, W) int32;
    first_rows (NB,) int32, row of each block; used (chunks + 1,) int32, segments before each chunk;
    overflow (chunks,) int32, 1 for a chunk that did not fit.
    """

    segments: Tensor
    live: Tensor
    starts: Tensor
    counts: Tensor
    first_rows: Tensor
    used: Tensor
    overflow: Tensor


class Lists(NamedTuple):
    """Segments of a range of the vocabulary: tokens and addresses (S,) int32, ends (W, NB) int32."""

    tokens: Tensor
    addresses: Tensor
    ends: Tensor


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


@triton.jit(
    do_not_specialize=["stride_blocks", "NB"],
    do_not_specialize_on_alignment=["live_rows_ptr", "starts_ptr", "counts_ptr"],
)
def _list_tokens_kernel(
    tokens_ptr, addresses_ptr,  # (S,) int32
    live_rows_ptr, starts_ptr, counts_ptr, stride_blocks,  # (NB, W)
    first_rows_ptr, ends_ptr,  # (NB,); (W, NB) int32
    NB,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    width = tl.program_id(0)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = block < NB
    offs = block.to(tl.int64) * stride_blocks + width
    count = tl.load(counts_ptr + offs, mask=exists, other=0)
    start = tl.load(starts_ptr + offs, mask=exists, other=0)
    bits = tl.load(live_rows_ptr + offs, mask=exists, other=0)
    first_row = tl.load(first_rows_ptr + block, mask=exists, other=0)
    end = tl.load(ends_ptr + width.to(tl.int64) * NB + block, mask=exists, other=0)

    lane = tl.arange(0, ROWS)
    over = ((bits[:, None] >> lane[None, :].to(tl.int64)) & 1).to(tl.int32)
    over = tl.where(count[:, None] > 0, over, 0)  # none of a chunk that did not fit
    rank = tl.cumsum(over, 1) - over
    out = (end - count)[:, None] + rank
    tl.store(tokens_ptr + out, first_row[:, None] + lane[None, :], mask=over != 0)
    tl.store(addresses_ptr + out, (start[:, None] + rank) * UNITS, mask=over != 0)


@triton.jit(
    do_not_specialize=["stride_out", "stride_rows", "stride_hidden", "stride_ends", "C", "H"],
    do_not_specialize_on_alignment=["order_ptr", "ends_ptr", "unit_ptr", "tail_ptr"],
)
def _weight_gradient_kernel(
    out_ptr, stride_out,  # (C, H)
    segments_ptr, addresses_ptr,  # bfloat16; (S,) int32
    rows_ptr, stride_rows, tokens_ptr,  # (N, H); (S,) int32
    order_ptr, ends_ptr, stride_ends,  # (W,) int32
    unit_ptr, tail_ptr, tail_rows_ptr,  # (1,), (G, C), (G, H) float32
    targets_ptr, target_rows_ptr, shares_ptr, label_ends_ptr,  # (M,); (W + 1,)
    hidden_ptr, stride_hidden,  # (N, H)
    C, H,
    GROUPS: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    block = tl.load(order_ptr + tl.program_id(0))
    width = H
    if not HEAD:  # as multiples, which the compiler sees
        stride_rows = stride_rows // VECTOR * VECTOR
        stride_out = stride_out // VECTOR * VECTOR
        stride_hidden = stride_hidden // VECTOR * VECTOR
        width = H // VECTOR * VECTOR
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    in_row = column < width
    begin = tl.load(ends_ptr + (block - 1).to(tl.int64) * stride_ends, mask=block > 0, other=0)
    end = tl.load(ends_ptr + block.to(tl.int64) * stride_ends)

    acc = gathered_product(
        segments_ptr, addresses_ptr, rows_ptr, stride_rows, tokens_ptr,
        begin, end, column, width, WIDTH, BLOCK_H, BLOCK_K,
    )  # fmt: skip

    acc = acc * -tl.load(unit_ptr)
    lane = tl.arange(0, WIDTH)
    token = block * WIDTH + lane
    for group in tl.static_range(GROUPS):
        q = tl.load(tail_ptr + group * C + token, mask=token < C, other=0.0)
        r = tl.load(tail_rows_ptr + group * H + column, mask=in_row, other=0.0)
        acc -= q[:, None] * r[None, :]
    # Label entries one after another, in float32: never rounded to the dtype of the slots.
    first = tl.load(label_ends_ptr + block)
    for target in range(first, tl.load(label_ends_ptr + block + 1)):
        label = tl.load(targets_ptr + target)
        row = tl.load(target_rows_ptr + target)
        share = tl.load(shares_ptr + target)
        h = tl.load(hidden_ptr + row.to(tl.int64) * stride_hidden + column, mask=in_row, other=0.0)
        acc += tl.where(token == label, share, 0.0)[:, None] * h.to(tl.float32)[None, :]

    out = out_ptr + token[:, None].to(tl.int64) * stride_out + column[None, :]
    mask = (token < C)[:, None] & in_row[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["stride_ends", "C"], do_not_specialize_on_alignment=["ends_ptr"])
def _segment_sums_kernel(
    sums_ptr,  # (C,) float32
    segments_ptr, addresses_ptr, tokens_ptr,  # bfloat16; (S,) int32
    ends_ptr, stride_ends,  # (W,) int32
    coefficients_ptr,  # (N,) float32
    C,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    begin = tl.load(ends_ptr + (block - 1).to(tl.int64) * stride_ends, mask=block > 0, other=0)
    end = tl.load(ends_ptr + block.to(tl.int64) * stride_ends)
    lane = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(begin, end, BLOCK):
        entry = start + tl.arange(0, BLOCK)
        inside = entry < end
        address = tl.load(addresses_ptr + entry, mask=inside, other=0).to(tl.int64)
        token = tl.load(tokens_ptr + entry, mask=inside, other=0)
        weight = tl.load(coefficients_ptr + token, mask=inside, other=0.0)
        offs = address[:, None] * 8 + lane[None, :]
        e = tl.load(segments_ptr + offs, mask=inside[:, None], other=0.0).to(tl.float32)
        total += tl.sum(e * weight[:, None], 0)
    column = block * WIDTH + lane
    tl.store(sums_ptr + column, total, mask=column < C)


def segment_store(
    rows: int, columns: int, chunks: int, capacity_bytes: int, device: torch.device
) -> Store:
    """An empty store.

    Args:
        rows: N, every chunk's rounded up to 64.
        columns: V.
        chunks: how many `compact_pack` will append.
        capacity_bytes: of everything in it, tables too; what they leave holds segments.
        device: of the store.

    Returns:
        The store, nothing in it.
    """
    blocks = triton.cdiv(rows, COMPACT_ROWS)
    width = triton.cdiv(columns, COMPACT_COLUMNS) * (COMPACT_COLUMNS // _WIDTH)
    tables = blocks * width * 16
    capacity = max(1, (capacity_bytes - tables) // (2 * _WIDTH))

    def ints(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=device)

    return Store(
        torch.empty((capacity, _WIDTH), dtype=torch.bfloat16, device=device),
        torch.zeros((blocks, width), dtype=torch.int64, device=device),
        ints(blocks, width), ints(blocks, width), ints(blocks), ints(chunks + 1), ints(chunks),
    )  # fmt: skip


def compact_pack(store: Store, kept: list[Tensor], chunk: int, block: int, first_row: int) -> Tensor:
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
    _, _, slots, columns, _, _, live, threshold = kept
    B, T = columns.shape[0], columns.shape[1] // COMPACT_COLUMNS
    here = slice(block, block + B)

    def run(row: Row, device: Device) -> Tensor:
        programs = triton.cdiv(T, row.block)
        counts = columns.new_empty((B, store.counts.shape[1]))
        mass = threshold.new_empty((programs, B * COMPACT_ROWS))
        options = {
            "ROWS": COMPACT_ROWS, "COLUMNS": COMPACT_COLUMNS, "TILES": row.block,
            "SPAN": slots.shape[1] // T, "WIDTH": _WIDTH, **compile_options(row, device),
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


def list_tokens(store: Store, first_column: int, columns: int) -> Lists:
    """Launches the list of the segments of a range of columns, `first_column` a multiple of 128."""
    first = first_column // _WIDTH
    width = triton.cdiv(columns, _WIDTH)
    here = slice(first, first + width)

    def run(row: Row, device: Device) -> Lists:
        NB, counts = store.counts.shape[0], store.counts[:, here]
        ends = torch.cumsum(counts.t().reshape(-1), 0, dtype=torch.int32).view(width, NB)
        tokens, addresses = ends.new_empty((2, store.segments.shape[0])).unbind(0)
        _list_tokens_kernel[(width, triton.cdiv(NB, _LISTED))](
            tokens, addresses, store.live[:, here], store.starts[:, here], counts, counts.stride(0),
            store.first_rows, ends, NB, ROWS=COMPACT_ROWS, BLOCK=_LISTED,
            UNITS=_WIDTH // VECTOR, num_warps=row.warps, enable_fp_fusion=True,
        )  # fmt: skip
        return Lists(tokens, addresses, ends)

    return launch("pack_segments", torch.bfloat16, store.segments.device, run)


class Targets(NamedTuple):
    """Label entries of a range of columns, sorted by column."""

    columns: Tensor  # (M,) int64, from the first column of the range on
    rows: Tensor  # (M,) int64
    shares: Tensor  # (M,) float32
    ends: Tensor  # (W + 1,) int32, how many lie before each edge of the blocks of 64 columns


def sort_targets(labels: Tensor, shares: Tensor, first_column: int, columns: int) -> Targets:
    """Label entries by column, in a fixed order: `labels`, `shares` (K, N), -1 for none."""
    flat, order = torch.sort(labels.reshape(-1) - first_column, stable=True)
    width = triton.cdiv(columns, _WIDTH)
    edges = torch.arange(0, width + 1, device=labels.device) * _WIDTH
    edges[-1] = columns  # entries of other ranges lie before the first edge and after the last
    ends = torch.searchsorted(flat, edges).to(torch.int32)
    rows = order % labels.shape[1]
    return Targets(flat, rows, shares.reshape(-1).index_select(0, order), ends)


def compact_weight_gradient(
    out: Tensor,  # (C, H), any floating dtype: written
    store: Store,
    lists: Lists,
    rows: Tensor,  # (N, H): coefficient times hidden, over unit
    unit: Tensor,  # (1,) float32
    tail: Tensor,  # (G, C) float32
    tail_rows: Tensor,  # (G, H) float32
    targets: Targets,
    hidden: Tensor,  # (N, H)
) -> None:
    """Launches `out = label entries - unit * kept E^T rows - tail^T tail_rows`, written once."""

    def run(row: Row, device: Device) -> None:
        C, H = out.shape
        ends = lists.ends[:, -1]
        # Heavy blocks first: the last programs to start are then the short ones.
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        order = torch.argsort(counts, descending=True, stable=True).to(torch.int32)
        _weight_gradient_kernel[(order.shape[0], triton.cdiv(H, row.block))](
            out, out.stride(0), store.segments, lists.addresses, rows, rows.stride(0), lists.tokens,
            order, ends, ends.stride(0), unit, tail, tail_rows,
            targets.columns, targets.rows, targets.shares, targets.ends,
            hidden, hidden.stride(0), C, H,
            GROUPS=tail.shape[0], HEAD=odd, WIDTH=_WIDTH, BLOCK_H=row.block, BLOCK_K=row.depth,
            VECTOR=VECTOR, **compile_options(row, device),
        )  # fmt: skip

    odd = any(n % VECTOR for n in (out.shape[1], *(t.stride(0) for t in (out, rows, hidden))))
    launch("gather_matmul_odd" if odd else "gather_matmul", rows.dtype, rows.device, run)


def compact_column_sums(store: Store, lists: Lists, coefficients: Tensor, columns: int) -> Tensor:
    """Launches `(C,)` float32 sums over rows of `coefficients (N,)` times kept E: for the bias."""

    def run(row: Row, device: Device) -> Tensor:
        sums, ends = coefficients.new_empty(columns), lists.ends[:, -1]
        _segment_sums_kernel[(ends.shape[0],)](
            sums, store.segments, lists.addresses, lists.tokens, ends, ends.stride(0), coefficients,
            columns, WIDTH=_WIDTH, BLOCK=_SUMMED, num_warps=row.warps, enable_fp_fusion=True,
        )  # fmt: skip
        return sums

    return launch("pack_segments", torch.bfloat16, store.segments.device, run)
