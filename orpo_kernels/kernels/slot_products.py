"""Kept slots times the rows of hidden states: what the gradient of the head is the sum of.

    product_k = - sum over rows t of the block of slot k of (softmax_t / unit) slot_k[t] h_t

A row of products for each slot, the columns of a *panel* of H; `sum_products` adds those of one
vocabulary column, which lie one after the other. 64 rows meet the slots of their block, which do so
too, in the order of their columns: nothing is gathered but hidden states. A program has 64 rows, a
part of the panel and an 8th of the slots; of these, those of a range of the vocabulary. Operands are
16-bit, sums float32. NB row blocks, S slots of the store, R of the range, M rows among N, W columns
of the panel. Bytes: the slots once per part of the panel, 4 W per slot of the range written.
"""

import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.constants import COMPACT_ROWS
from orpo_kernels.kernels.elementwise import row_place, whole_vectors
from orpo_kernels.kernels.inputs import LANGUAGE_DTYPE, Inputs
from orpo_kernels.kernels.scan_state import product_dtype
from orpo_kernels.kernels.slot_store import SlotStore
from orpo_kernels.kernels.start import Start, in_vectors, places
from orpo_kernels.kernels.tuning import VECTOR, cdiv, row_of

_PIECES = 8  # programs that share the slots of a row block


@triton.jit(
    do_not_specialize=[
        "begin", "end", "M", "H", "first_column", "panel", "stride_products", "period",
        "stride_slice", "stride_row",
    ],
    do_not_specialize_on_alignment=[
        "table_ptr", "places_ptr", "coefficients_ptr", "index_ptr", "unit_ptr",
    ],
)  # fmt: skip
def _slot_products_kernel(
    products_ptr,  # (R, W) float32
    slots_ptr,  # (S, ROWS) bfloat16
    table_ptr,  # (NB, 2) int64
    places_ptr,  # (S,) int32, ascending in a row block
    coefficients_ptr,  # (5, M) float32, of which the second is softmax
    hidden_ptr,  # (N, H)
    index_ptr,  # (M,) int64
    unit_ptr,  # (1,) float32
    begin, end, M, H, first_column, panel, stride_products, period, stride_slice, stride_row,
    HAS_INDEX: tl.constexpr, HAS_UNIT: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, PIECES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(panel, BLOCK_H)
    part = tl.program_id(0) % parts
    piece = tl.program_id(0) // parts % PIECES
    block = tl.program_id(0) // (parts * PIECES)
    count = tl.load(table_ptr + 2 * block + 1)
    share = tl.cdiv(count, PIECES)
    last = tl.minimum(count, piece * share + share)
    if piece * share >= last:
        return
    first = tl.load(table_ptr + 2 * block)
    lowest = tl.load(places_ptr + first + piece * share)
    highest = tl.load(places_ptr + first + last - 1)
    if (lowest >= end) | (highest < begin):
        return

    lane = tl.arange(0, ROWS)
    row = block * ROWS + lane
    exists = row < M
    softmax = tl.load(coefficients_ptr + M + row, mask=exists, other=0.0)
    if HAS_UNIT:
        softmax = softmax / tl.load(unit_ptr)
    position = row.to(tl.int64)
    if HAS_INDEX:
        position = tl.load(index_ptr + row, mask=exists, other=0)
    place = row_place(position, period, stride_slice, stride_row, ALIGNED, VECTOR)
    column = part * BLOCK_H + tl.arange(0, BLOCK_H)
    wide = whole_vectors(first_column, ALIGNED, VECTOR) + column
    mask = exists[:, None] & (wide < whole_vectors(H, ALIGNED, VECTOR))[None, :]
    h = tl.load(hidden_ptr + place[:, None] + wide[None, :], mask=mask, other=0.0).to(DTYPE)

    out_column = (column < whole_vectors(panel, ALIGNED, VECTOR))[None, :]
    stride = whole_vectors(stride_products, True, VECTOR)
    for start in range(piece * share, last, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        to = tl.load(places_ptr + first + k, mask=k < last, other=-1)
        slot = slots_ptr + (first + k)[:, None] * ROWS + lane[None, :]
        a = tl.load(slot, mask=(k < last)[:, None], other=0.0).to(tl.float32) * -softmax[None, :]
        product = tl.dot(a.to(DTYPE), h)
        out = products_ptr + (to - begin).to(tl.int64)[:, None] * stride + column[None, :]
        tl.store(out, product, mask=((to >= begin) & (to < end))[:, None] & out_column)


class SlotProducts:
    """Panels of the products with one matrix of rows."""

    def __init__(
        self,
        products: Tensor,  # (R, W) float32, rows on 16 bytes
        store: SlotStore,
        ordered: Tensor,  # (S,) int32: places of the products
        inputs: Inputs,
        hidden: Tensor,  # (N, H), or (B, T, H) with N = B T
        coefficients: Tensor,  # (5, M) float32
        unit: Tensor | None,  # (1,) float32
    ) -> None:
        """Takes what stays the same from panel to panel."""
        row = row_of("slot_products", hidden.dtype, hidden.device)
        self.blocks = cdiv(inputs.labels.shape[0], COMPACT_ROWS)
        self.row, self.width = row, hidden.shape[-1]
        self.start = Start(
            _slot_products_kernel,
            (
                products, store.slots, store.table, ordered, coefficients, hidden,
                inputs.positions, unit,
            ),
            row,
            {
                "HAS_INDEX": inputs.positions is not None, "HAS_UNIT": unit is not None,
                "DTYPE": LANGUAGE_DTYPE[product_dtype(inputs)],
                "ALIGNED": in_vectors(hidden, products), "ROWS": COMPACT_ROWS, "PIECES": _PIECES,
                "BLOCK_K": row.depth, "BLOCK_H": row.block, "VECTOR": VECTOR,
            },
        )  # fmt: skip
        self.numbers = (products.stride(0), *places(hidden))
        self.rows = inputs.labels.shape[0]

    def __call__(self, products: tuple[int, int], first: int, last: int) -> None:
        """Launches columns `first` to `last` of H of some products, to the start of their rows."""
        parts = cdiv(last - first, self.row.block)
        self.start(
            self.blocks * _PIECES * parts, *products, self.rows, self.width, first, last - first,
            *self.numbers,
        )  # fmt: skip
