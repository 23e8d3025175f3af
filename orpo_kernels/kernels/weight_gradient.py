"""dW of the sparse gradient, from the segments of `row_segments`, written once or added.

    dW_v = sum_t share_t 1[v = y_t] h_t - sum_t E_tv (a_t / total_t) h_t - sum_g q_gv r_g

V rows in W blocks of 64, N tokens, H columns, G groups, S segments, NB blocks of 64 tokens. E as
kept; r_g = sum over t of group g of a_t m_t h_t. `_list_tokens_kernel` turns the store into a list
by vocabulary block; `_weight_gradient_kernel` is the product of `gather_matmul` over it, float32
accumulators for all tokens, with the tails and, one by one in float32, the label entries in its
epilogue: no float32 (V, H) buffer, whatever dtype dW has. Where some chunks were done the exact way
it adds the product to a float32 block instead. No atomics; every order is fixed.
Bytes: dW once; segments and rows of hidden from the second-level cache.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.constants import COMPACT_ROWS
from orpo_kernels.kernels.gather_matmul import gathered_product, is_odd, slot_language_dtype
from orpo_kernels.kernels.segment_store import SEGMENT_COLUMNS, SegmentStore
from orpo_kernels.kernels.tuning import VECTOR, Device, Row, compile_options, launch

_SUMMED = 64  # segments summed together


class Lists(NamedTuple):
    """Segments of a range of the vocabulary: tokens and addresses (S,) int32, ends (W, NB) int32."""

    tokens: Tensor
    addresses: Tensor
    ends: Tensor


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
    GROUPS: tl.constexpr, ADDS: tl.constexpr, DTYPE: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK_H: tl.constexpr,
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

    token = block * WIDTH + tl.arange(0, WIDTH)
    out = out_ptr + token[:, None].to(tl.int64) * stride_out + column[None, :]
    mask = (token < C)[:, None] & in_row[None, :]
    # Before the product, whose accumulator they become: after it there are no registers for them.
    acc = -tl.load(out, mask=mask, other=0.0) if ADDS else tl.zeros((WIDTH, BLOCK_H), tl.float32)

    acc = gathered_product(
        segments_ptr, addresses_ptr, rows_ptr, stride_rows, tokens_ptr,
        begin, end, column, width, acc, DTYPE, WIDTH, BLOCK_K,
    )  # fmt: skip

    if ADDS:
        acc = -acc
    else:
        acc = acc * -tl.load(unit_ptr)
        # Label entries one after another, in float32: never rounded to the dtype of the slots.
        first = tl.load(label_ends_ptr + block)
        for target in range(first, tl.load(label_ends_ptr + block + 1)):
            label = tl.load(targets_ptr + target)
            row = tl.load(target_rows_ptr + target)
            share = tl.load(shares_ptr + target)
            h = hidden_ptr + row.to(tl.int64) * stride_hidden + column
            h = tl.load(h, mask=in_row, other=0.0).to(tl.float32)
            acc += tl.where(token == label, share, 0.0)[:, None] * h[None, :]

        for group in tl.static_range(GROUPS):
            q = tl.load(tail_ptr + group * C + token, mask=token < C, other=0.0)
            r = tl.load(tail_rows_ptr + group * H + column, mask=in_row, other=0.0)
            acc -= q[:, None] * r[None, :]
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


def list_tokens(store: SegmentStore, first_column: int, columns: int) -> Lists:
    """Launches the list of the segments of a range of columns, `first_column` a multiple of 128."""
    first = first_column // SEGMENT_COLUMNS
    width = triton.cdiv(columns, SEGMENT_COLUMNS)
    here = slice(first, first + width)

    def run(row: Row, device: Device) -> Lists:
        NB, counts = store.counts.shape[0], store.counts[:, here]
        ends = torch.cumsum(counts.t().reshape(-1), 0, dtype=torch.int32).view(width, NB)
        tokens, addresses = ends.new_empty((2, store.segments.shape[0])).unbind(0)
        _list_tokens_kernel[(width, triton.cdiv(NB, row.block))](
            tokens, addresses, store.live[:, here], store.starts[:, here], counts, counts.stride(0),
            store.first_rows, ends, NB, ROWS=COMPACT_ROWS, BLOCK=row.block,
            UNITS=SEGMENT_COLUMNS // VECTOR, num_warps=row.warps, enable_fp_fusion=True,
        )  # fmt: skip
        return Lists(tokens, addresses, ends)

    return launch("list_tokens", torch.bfloat16, store.segments.device, run)


class Targets(NamedTuple):
    """Label entries of a range of columns, sorted by column."""

    columns: Tensor  # (M,) int64, from the first column of the range on
    rows: Tensor  # (M,) int64
    shares: Tensor  # (M,) float32
    ends: Tensor  # (W + 1,) int32, how many lie before each edge of the blocks of 64 columns


def sort_targets(labels: Tensor, shares: Tensor, first_column: int, columns: int) -> Targets:
    """Label entries by column, in a fixed order: `labels`, `shares` (K, N), -1 for none."""
    flat, order = torch.sort(labels.reshape(-1) - first_column, stable=True)
    width = triton.cdiv(columns, SEGMENT_COLUMNS)
    edges = torch.arange(0, width + 1, device=labels.device) * SEGMENT_COLUMNS
    edges[-1] = columns  # entries of other ranges lie before the first edge and after the last
    ends = torch.searchsorted(flat, edges).to(torch.int32)
    rows = order % labels.shape[1]
    return Targets(flat, rows, shares.reshape(-1).index_select(0, order), ends)


def segment_weight_gradient(
    out: Tensor,  # (C, H), any floating dtype: written
    store: SegmentStore,
    lists: Lists,
    rows: Tensor,  # (N, H): coefficient times hidden, over unit
    unit: Tensor,  # (1,) float32
    tail: Tensor,  # (G, C) float32
    tail_rows: Tensor,  # (G, H) float32
    targets: Targets,
    hidden: Tensor,  # (N, H)
) -> None:
    """Launches `out = label entries - unit * kept E^T rows - tail^T tail_rows`, written once.

    `rows` are rounded like the weight of `slot_matmul`; the label entries are float32.

    Raises:
        ValueError: columns of `out`, `rows` or `hidden` lie apart.
    """
    tail, tail_rows = tail.contiguous(), tail_rows.contiguous()
    epilogue = (
        unit, tail, tail_rows, targets.columns, targets.rows, targets.shares, targets.ends,
        hidden, hidden.stride(0),
    )  # fmt: skip
    odd = is_odd(out, rows, hidden)
    kernel = "weight_gradient_odd" if odd else "weight_gradient"
    _launch(kernel, out, store, lists, rows, (*epilogue, tail.shape[0], odd))


def segment_weight_gradient_add(
    out: Tensor,  # (C, H) float32
    store: SegmentStore,
    lists: Lists,
    rows: Tensor,  # (N, H)
) -> None:
    """Launches `out -= kept E^T rows`, of the tokens in `lists`; `rows` as above.

    Raises:
        ValueError: columns of `out` or `rows` lie apart.
    """
    odd = is_odd(out, rows)
    kernel = "weight_gradient_odd" if odd else "weight_gradient_add"
    _launch(kernel, out, store, lists, rows, (*[None] * 8, 0, 0, odd))


def _launch(
    kernel: str,
    out: Tensor,
    store: SegmentStore,
    lists: Lists,
    rows: Tensor,
    options: tuple[Any, ...],
) -> None:
    *epilogue, groups, odd = options

    def run(row: Row, device: Device) -> None:
        C, H = out.shape
        ends = lists.ends[:, -1]
        # Heavy blocks first: the last programs to start are then the short ones.
        counts = torch.diff(ends, prepend=ends.new_zeros(1))
        order = torch.argsort(counts, descending=True, stable=True).to(torch.int32)
        _weight_gradient_kernel[(order.shape[0], triton.cdiv(H, row.block))](
            out, out.stride(0), store.segments, lists.addresses, rows, rows.stride(0), lists.tokens,
            order, ends, ends.stride(0), *epilogue, C, H,
            GROUPS=groups, ADDS=groups == 0, DTYPE=slot_language_dtype(rows.dtype), HEAD=odd, WIDTH=SEGMENT_COLUMNS, BLOCK_H=row.block,
            BLOCK_K=row.depth, VECTOR=VECTOR, **compile_options(row, device),
        )  # fmt: skip

    launch(kernel, rows.dtype, rows.device, run)


def segment_column_sums(
    store: SegmentStore, lists: Lists, coefficients: Tensor, columns: int
) -> Tensor:
    """Launches `(C,)` float32 sums over rows of `coefficients (N,)` times kept E: for the bias."""

    def run(row: Row, device: Device) -> Tensor:
        sums, ends = coefficients.new_empty(columns), lists.ends[:, -1]
        _segment_sums_kernel[(ends.shape[0],)](
            sums, store.segments, lists.addresses, lists.tokens, ends, ends.stride(0), coefficients,
            columns, WIDTH=SEGMENT_COLUMNS, BLOCK=_SUMMED, num_warps=row.warps, enable_fp_fusion=True,
        )  # fmt: skip
        return sums

    return launch("list_tokens", torch.bfloat16, store.segments.device, run)
