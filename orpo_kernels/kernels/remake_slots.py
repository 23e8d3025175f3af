"""The slots of a head that trains, made again in the backward: the store has their columns alone.

    slot_k[t] = E_tv r_tv scale / 2^reference_t,   z_t = h_t W_v,  v = column k of 64 rows; of a
                column listed twice, the second has what rounding left of the first

as `pack_slots` made them of the forward's logits, of the same operands in 16 bits and float32 sums.
The order of these sums is another, so a slot may be rounded otherwise where it lies between two
numbers. A program has 64 rows and some of their columns, whose rows of the head are gathered. NB
row blocks, S slots, M rows among N. Bytes: 2 H per slot and, from the second-level cache, H of
hidden states; 128 per slot written.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.constants import COMPACT_ROWS
from orpo_kernels.kernels.elementwise import row_place, whole_vectors
from orpo_kernels.kernels.inputs import LANGUAGE_DTYPE, Inputs, pair
from orpo_kernels.kernels.pack_slots import listed_columns, slot_of
from orpo_kernels.kernels.scan import exponentials
from orpo_kernels.kernels.scan_state import exponents
from orpo_kernels.kernels.slot_store import SlotStore
from orpo_kernels.kernels.start import Start, in_vectors, places
from orpo_kernels.kernels.tuning import VECTOR, cdiv, row_for_head

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _add_product(
    acc, weight_ptr, token, stride_weight, hidden_ptr, place, exists, size,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_H: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """`acc` (BLOCK_K, ROWS), plus gathered rows of a part of the head times rows of that of hidden."""
    width = whole_vectors(size, ALIGNED, VECTOR)
    weight_ptr += token.to(tl.int64)[:, None] * whole_vectors(stride_weight, ALIGNED, VECTOR)
    hidden_ptr += place[None, :]
    for start in range(0, width, BLOCK_H):
        column = start + tl.arange(0, BLOCK_H)
        inside = column < width
        w = tl.load(weight_ptr + column[None, :], mask=inside[None, :], other=0.0)
        mask = inside[:, None] & exists[None, :]
        h = tl.load(hidden_ptr + column[:, None], mask=mask, other=0.0)
        acc = tl.dot(w.to(DTYPE), h.to(DTYPE), acc)
    return acc


@triton.jit(
    do_not_specialize=[
        "M", "tiles", "H", "r", "stride_weight", "stride_weight_r", "period", "stride_slice",
        "stride_row", "period_r", "stride_slice_r", "stride_row_r", "ratio", "log2_scale",
        "logit_scale",
    ],
    do_not_specialize_on_alignment=[
        "columns_ptr", "table_ptr", "coefficients_ptr", "labels_ptr", "second_ptr", "index_ptr",
        "bias_ptr",
    ],
)  # fmt: skip
def _remake_slots_kernel(
    slots_ptr,  # (S, ROWS) bfloat16
    columns_ptr,  # (S,) int32
    table_ptr,  # (NB, 2) int64
    coefficients_ptr,  # (5, M) float32, of which the first is m
    labels_ptr, second_ptr, index_ptr,  # (M,) int64
    bias_ptr,  # (V,)
    weight_ptr, weight_r_ptr,  # (V, H), (V, r)
    hidden_ptr, hidden_r_ptr,  # (N, H), (N, r)
    M, tiles, H, r, stride_weight, stride_weight_r, period, stride_slice, stride_row, period_r,
    stride_slice_r, stride_row_r, ratio, log2_scale, logit_scale,
    HAS_SECOND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_INDEX: tl.constexpr, LOW_RANK: tl.constexpr, SIGN: tl.constexpr, DTYPE: tl.constexpr,
    WIDE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0) // tiles
    count = tl.load(table_ptr + 2 * block + 1)
    start = tl.program_id(0) % tiles * BLOCK_K
    if start >= count:
        return
    first = tl.load(table_ptr + 2 * block)
    k = start + tl.arange(0, BLOCK_K)
    token, again = listed_columns(columns_ptr + first, k, count)
    lane = tl.arange(0, ROWS)
    row = block * ROWS + lane
    exists = row < M
    position = row.to(tl.int64)
    if HAS_INDEX:
        position = tl.load(index_ptr + row, mask=exists, other=0)

    acc = tl.zeros((BLOCK_K, ROWS), tl.float32)
    place = row_place(position, period, stride_slice, stride_row, ALIGNED, VECTOR)
    acc = _add_product(
        acc, weight_ptr, token, stride_weight, hidden_ptr, place, exists, H, DTYPE, ALIGNED, BLOCK_H,
        VECTOR,
    )  # fmt: skip
    if LOW_RANK:
        place = row_place(position, period_r, stride_slice_r, stride_row_r, ALIGNED, VECTOR)
        acc = _add_product(
            acc, weight_r_ptr, token, stride_weight_r, hidden_r_ptr, place, exists, r, DTYPE,
            ALIGNED, BLOCK_H, VECTOR,
        )  # fmt: skip
    x = acc.to(WIDE).to(tl.float32)  # as the forward's GEMM wrote it

    is_label = token[:, None] == tl.load(labels_ptr + row, mask=exists, other=-1)[None, :]
    if HAS_SECOND:
        is_label |= token[:, None] == tl.load(second_ptr + row, mask=exists, other=-1)[None, :]
    x = tl.where(is_label, SIGN * float("-inf"), x)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + token, mask=k < count, other=0.0).to(tl.float32)[:, None]
    # Whole numbers to base 2, which m is to base e.
    reference = tl.load(coefficients_ptr + row, mask=exists, other=0.0) * _LOG2_E
    reference = tl.floor(reference + 0.5)
    _e, u = exponentials(x, bias, reference[None, :], ratio, log2_scale, SIGN, HAS_SOFTCAP)
    slot = slot_of(tl.where(exists[None, :], u * logit_scale, 0.0), again)
    out = slots_ptr + (first + k)[:, None] * ROWS + lane[None, :]
    tl.store(out, slot, mask=(k < count)[:, None])


def remake_slots(
    store: SlotStore,  # without slots
    inputs: Inputs,
    coefficients: Tensor,  # (5, M) float32
    counts: list[int],  # slots of every row block, of the table of the store
) -> SlotStore:
    """Launches all slots; takes the memory of those there are."""
    slots = store.columns.new_empty((max(1, sum(counts)), COMPACT_ROWS), dtype=torch.bfloat16)
    weight, weight_r = pair(inputs.weight)
    hidden, hidden_r = pair(inputs.hidden)
    aligned = in_vectors(*inputs.weight, *inputs.hidden)
    row, options = row_for_head("remake_slots" if aligned else "remake_slots_odd", weight)
    tiles = cdiv(max(counts), row.block)
    constants: dict[str, Any] = {
        **inputs.options, "HAS_INDEX": inputs.positions is not None,
        "LOW_RANK": weight_r is not None, "SIGN": -1.0 if inputs.logit_scale < 0 else 1.0,
        "DTYPE": LANGUAGE_DTYPE[inputs.dtype], "WIDE": LANGUAGE_DTYPE[inputs.wide],
        "ALIGNED": aligned, "ROWS": COMPACT_ROWS,
        "BLOCK_K": row.block, "BLOCK_H": row.depth, "VECTOR": VECTOR,
    }  # fmt: skip
    start = Start(
        _remake_slots_kernel,
        (
            slots, store.columns, store.table, coefficients, inputs.labels, inputs.second,
            inputs.positions, inputs.bias, weight, weight_r, hidden, hidden_r,
        ),
        row, constants, options,
    )  # fmt: skip
    low_rank = (0, 0) if weight_r is None else (weight_r.shape[1], weight_r.stride(0))
    of_rank = (1, 0, 0) if hidden_r is None else places(hidden_r)
    if tiles:
        start(
            len(counts) * tiles, inputs.labels.shape[0], tiles, weight.shape[1], low_rank[0],
            weight.stride(0), low_rank[1], *places(hidden), *of_rank, *exponents(inputs),
            float(inputs.logit_scale),
        )  # fmt: skip
    return store._replace(slots=slots)
