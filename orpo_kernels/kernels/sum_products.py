"""The gradient of the head, column by column of the vocabulary, written once.

    dW_v = unit sum over slots k of column v of product_k
           + sum over rows t whose label v is of share_t h_t - sum_g q_gv rest_g

A program has lanes and a part of a panel of H. Of the heaviest columns of a range of the vocabulary,
which come first, one is split over its lanes: lane l adds entries l, l + LANES, ... of both lists,
and the lanes are added in the end. Of the others every lane has one of its own: most have few
entries or none, and what a program waits for is waited for once for all of them: where its products
lie, which do so in the order of the sums, then these. Sums are float32. Which columns are split is a
matter of their entries alone: ranges and panels do not change a bit. S products of the range, M rows
among N, K label sets, G groups, one or two. No atomics. Bytes: 4 per product and 2 (4) per label and column of H
read, dW written.
"""

import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels.elementwise import row_place, whole_vectors
from orpo_kernels.kernels.inputs import Inputs
from orpo_kernels.kernels.order_entries import Order
from orpo_kernels.kernels.start import Start, in_vectors, places
from orpo_kernels.kernels.tuning import VECTOR, cdiv, row_of


@triton.jit
def _sum(products_ptr, in_panel, stride, each, end, step, acc):
    """`acc`, plus products `each`, `each + step`, ... before `end` of every lane."""
    for _ in range(tl.max(tl.cdiv(end - each, step), 0)):
        at = each.to(tl.int64)[:, None] * stride
        acc += tl.load(products_ptr + at, mask=(each < end)[:, None] & in_panel, other=0.0)
        each += step
    return acc


@triton.jit(
    do_not_specialize=[
        "first_rank", "split", "last_rank", "first_product", "M", "V", "H", "first_column", "panel",
        "stride_out", "stride_products", "stride_rest", "period", "stride_slice", "stride_row",
    ],
    do_not_specialize_on_alignment=[
        "columns_ptr", "ends_ptr", "targets_ptr", "label_ends_ptr",
        "coefficients_ptr", "index_ptr", "mean_ptr", "rest_ptr", "unit_ptr",
    ],
)  # fmt: skip
def _sum_products_kernel(
    out_ptr,  # (V, H)
    products_ptr,  # (S, W) float32
    columns_ptr, ends_ptr,  # (V,) int64: the heavy ones first; (V + 1,) int32
    targets_ptr, label_ends_ptr,  # (K M,) int64, (V + 1,) int32
    coefficients_ptr,  # (5, M) float32, of which the third and fourth are shares
    hidden_ptr,  # (N, H)
    index_ptr,  # (M,) int64
    mean_ptr, rest_ptr,  # (G, V), (G, H) float32
    unit_ptr,  # (1,) float32
    first_rank, split, last_rank, first_product, M, V, H, first_column, panel, stride_out,
    stride_products, stride_rest, period, stride_slice, stride_row,
    GROUPS: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_UNIT: tl.constexpr,
    ALIGNED: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    parts = tl.cdiv(panel, BLOCK)
    item = tl.program_id(0) // parts
    lane = tl.arange(0, LANES)
    is_split = first_rank + item < split
    rank = tl.where(is_split, first_rank + item, split + (first_rank + item - split) * LANES + lane)
    exists = rank < last_rank
    v = tl.load(columns_ptr + rank, mask=exists, other=0)
    step = tl.where(is_split, LANES, 1)
    skipped = tl.where(is_split, lane, 0)
    writes = exists & (skipped == 0)
    column = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    in_panel = column < whole_vectors(panel, ALIGNED, VECTOR)
    wide = whole_vectors(first_column, ALIGNED, VECTOR) + column

    each = tl.load(ends_ptr + v) + skipped
    end = tl.load(ends_ptr + v + 1, mask=exists, other=0)
    label = tl.load(label_ends_ptr + v) + skipped
    label_end = tl.load(label_ends_ptr + v + 1, mask=exists, other=0)

    q = tl.load(mean_ptr + v, mask=writes, other=0.0)  # on its way meanwhile
    if GROUPS == 2:
        second_q = tl.load(mean_ptr + V + v, mask=writes, other=0.0)

    acc = tl.zeros((LANES, BLOCK), tl.float32)
    stride = whole_vectors(stride_products, True, VECTOR)
    acc = _sum(
        products_ptr + column[None, :], in_panel[None, :], stride, each - first_product,
        end - first_product, step, acc,
    )  # fmt: skip
    if HAS_UNIT:
        acc *= tl.load(unit_ptr)

    target = tl.load(targets_ptr + label, mask=label < label_end, other=0).to(tl.int32)
    for _ in range(tl.max(tl.cdiv(label_end - label, step), 0)):
        inside = label < label_end
        row = target % M
        share = coefficients_ptr + (2 + target // M) * M + row
        share = tl.load(share, mask=inside, other=0.0)
        position = row.to(tl.int64)
        if HAS_INDEX:
            position = tl.load(index_ptr + row, mask=inside, other=0)
        place = row_place(position, period, stride_slice, stride_row, ALIGNED, VECTOR)
        h = hidden_ptr + place[:, None] + wide[None, :]
        h = tl.load(h, mask=inside[:, None] & in_panel[None, :], other=0.0)
        label += step
        target = tl.load(targets_ptr + label, mask=label < label_end, other=0).to(tl.int32)
        acc += share[:, None] * h.to(tl.float32)

    rest = tl.load(rest_ptr + wide, mask=in_panel, other=0.0)
    acc -= q[:, None] * rest[None, :]
    if GROUPS == 2:
        rest = tl.load(rest_ptr + stride_rest + wide, mask=in_panel, other=0.0)
        acc -= second_q[:, None] * rest[None, :]
    if is_split:
        acc = tl.broadcast_to(tl.sum(acc, 0)[None, :], (LANES, BLOCK))
    out = out_ptr + v[:, None] * whole_vectors(stride_out, ALIGNED, VECTOR) + wide[None, :]
    mask = writes[:, None] & in_panel[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=mask)


class SumProducts:
    """Panels of one part of the gradient of the head."""

    def __init__(
        self,
        out: Tensor,  # (V, H), or its rows up to the end of the range
        products: Tensor,  # (S, W) float32, of a range of the vocabulary
        order: Order,
        inputs: Inputs,
        hidden: Tensor,  # (N, H), or (B, T, H) with N = B T
        coefficients: Tensor,  # (5, M) float32
        tail: tuple[Tensor, Tensor],  # q (G, V), and of `given_back` (G, H) float32
        unit: Tensor | None,  # (1,) float32
    ) -> None:
        """Takes what stays the same from panel to panel."""
        row = row_of("sum_products", hidden.dtype, hidden.device)
        self.row = row
        self.start = Start(
            _sum_products_kernel,
            (
                out, products, order.columns, order.ends, order.targets, order.label_ends,
                coefficients, hidden, inputs.positions, *tail, unit,
            ),
            row,
            {
                "GROUPS": tail[0].shape[0], "HAS_INDEX": inputs.positions is not None,
                "HAS_UNIT": unit is not None,
                "ALIGNED": in_vectors(out, hidden, products), "LANES": row.depth,
                "BLOCK": row.block, "VECTOR": VECTOR,
            },
        )  # fmt: skip
        self.first = (inputs.labels.shape[0], tail[0].shape[1], hidden.shape[-1])
        self.last = (
            out.stride(0), products.stride(0), tail[1].stride(0), *places(hidden)
        )  # fmt: skip

    def __call__(self, ranks: tuple[int, int, int], product: int, first: int, last: int) -> None:
        """Launches columns `first` to `last` of H, whose products are there.

        `ranks`: of the columns of the range by work, where they begin, the first that is not split,
        where they end; `product` is the first of its products.
        """
        begin, split, end = ranks
        parts = cdiv(last - first, self.row.block)
        items = split - begin + cdiv(end - split, self.row.depth)
        self.start(items * parts, *ranks, product, *self.first, first, last - first, *self.last)
