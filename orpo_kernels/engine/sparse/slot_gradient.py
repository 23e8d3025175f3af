"""dW and db of a GPU, from the slots that the forward kept.

    before it is known how many lists of labels and of slots, coefficients, the tail's rows
    (where the store has columns alone) slots made again
    for a range of the vocabulary:
        for a panel of H:
            slot products       kept slots times rows of hidden states
            sum products        dW of the range and the panel, written

    dW_v = sum_t share_t 1[v = y_t] h_t - sum_t softmax_t slot_tv h_t - sum_g q_gv rest_g

The products of a range lie in what of dW comes after it, which is not written yet, or in what the
budget leaves: so a range is half of what is left, and the last has the budget. Ranges are a matter
of sizes, panels of the slots that a range has; no bit depends on either.

All rows or none: where a row block kept nothing (it is dense, or found no room in the store), dW is
the exact loop's, and so where a range keeps so much that its products have no room. Parts of it
made in two ways would have to be rounded one by one, and they cancel: chosen answers against
rejected ones. Which it is the host learns from numbers that are copied to it behind the lists, the
one wait: what does not depend on it is started before, so that the device has something to do until
the host has read it. While a CUDA graph is captured it cannot be read, and dW is exact. db is the
same with a column of ones for the hidden states.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.constants import COMPACT_ROWS
from orpo_kernels.engine.budget import spans
from orpo_kernels.engine.gpu import backward
from orpo_kernels.engine.gpu.call import inputs_of, slopes_of
from orpo_kernels.engine.gpu.card import card_of
from orpo_kernels.engine.gpu.model import Job
from orpo_kernels.engine.gpu.plan import plan_backward
from orpo_kernels.engine.host_copy import HostCopy, is_capturing
from orpo_kernels.engine.operands import Operands
from orpo_kernels.engine.problem import Problem
from orpo_kernels.engine.sparse.plan import (
    gradient_bytes,
    panel_columns,
    planned_edges,
)
from orpo_kernels.engine.sparse.tail import Tail
from orpo_kernels.engine.weight_gradient import HeadGradients
from orpo_kernels.kernels import tuning
from orpo_kernels.kernels.coefficients import Slopes, coefficients, unit_of
from orpo_kernels.kernels.given_back import given_back
from orpo_kernels.kernels.inputs import Inputs
from orpo_kernels.kernels.order_entries import Listed, Order, label_lists, order_entries
from orpo_kernels.kernels.remake_slots import remake_slots
from orpo_kernels.kernels.slot_products import SlotProducts
from orpo_kernels.kernels.slot_store import SlotStore
from orpo_kernels.kernels.sum_products import SumProducts

_ALIGNMENT = 16  # bytes


class Kept(NamedTuple):
    """What dW from slots is made of, but for their number and order."""

    store: SlotStore
    rows: Tensor  # (5, M) float32: of `coefficients`
    unit: Tensor | None  # (1,) float32
    mean: Tensor  # (G, V) float32: q

    @classmethod
    def of(
        cls, inputs: Inputs, statistics: Tensor, slopes: Slopes, tail: Tail, store: SlotStore
    ) -> "Kept":
        """Launches all of it."""
        rows = coefficients(statistics, slopes, inputs.positions, inputs.logit_scale)
        unit = None
        if inputs.dtype == torch.float16:
            unit = unit_of(rows[4], None, inputs.positions)
        return cls(store, rows, unit, tail.mean())


class Part(NamedTuple):
    """A part of dW that is wanted."""

    target: Tensor  # (V, H)
    hidden: Tensor  # (N, H), or (B, T, H) with N = B T
    rest: Tensor  # (G, H): of `given_back`


def head_gradient(
    problem: Problem,
    operands: Operands,
    statistics: Tensor,
    dlogps: Tensor,
    tail: Tail,
    store: SlotStore | None,
    sizing: tuple[Job, int],
    out: HeadGradients,
) -> None:
    """Fills the gradients of the head.

    Args:
        problem: of the call.
        operands: the scored rows.
        statistics: (8, N) of the forward.
        dlogps: (K, ...).
        tail: of the scored rows.
        store: of the forward, or None.
        sizing: sizes of the scored rows, and bytes without the store.
        out: to be filled.
    """
    inputs, slopes, (job, budget) = inputs_of(operands), slopes_of(problem, dlogps), sizing
    with tuning.guard(statistics.device):
        if store is not None and not is_capturing(statistics.device):
            rows = -(-operands.sizes.rows // COMPACT_ROWS)
            sizes = Sizing(_lending(job, out), budget, tail.sums.shape[0], store)
            edges = planned_edges(sizes.job, *sizes.planned, card_of(statistics.device))
            count = store.table[:rows, 1].clamp(min=0).sum()
            order = order_entries(store.columns, count, _label_lists(inputs, job), edges)
            figures = HostCopy(torch.cat((store.table[:rows, 1], order.figures)))
            # What the device does until the host has read them.
            kept = Kept.of(inputs, statistics, slopes, tail, store)
            parts = _parts(inputs, statistics, kept.rows, tail, out)
            found = figures.get()
            counts = kept_blocks(found[:rows])
            if min(counts) >= 0:
                ranges, room = ranges_of(edges, found[rows:]), sizes.room(sum(counts))
                if from_slots(parts, inputs, kept, order, ranges, room, counts):
                    return
            del kept, order, parts  # the exact loop has the whole budget
        plan = plan_backward(job, budget, card_of(statistics.device))
        backward.weight_gradient(inputs, statistics, slopes, plan.sweeps, None, out)


def _label_lists(inputs: Inputs, job: Job) -> Listed:
    labels = inputs.labels[None]
    if inputs.second is not None:
        labels = torch.stack((inputs.labels, inputs.second))
    return label_lists(labels, job.vocabulary)


class Sizing(NamedTuple):
    """What the budget leaves beside the store: for how many slots, for their products."""

    job: Job
    budget: int
    groups: int
    store: SlotStore

    def room(self, slots: int) -> int:
        """Bytes of products, of so many slots."""
        remade = slots if self.store.slots is None else 0
        return self.budget - gradient_bytes(
            self.job, self.groups, self.store.columns.shape[0], remade
        )

    @property
    def planned(self) -> tuple[int, int]:
        """Slots the store has room for, and bytes of products of as many."""
        capacity = self.store.columns.shape[0]
        return capacity, self.room(capacity)


def _lending(job: Job, out: HeadGradients) -> Job:
    """Of the part of dW that lends its memory: the largest, where it is one piece."""
    largest = max(out.wanted, key=lambda each: each.shape[1], default=None)
    if largest is None or not largest.is_contiguous():
        return replace(job, in_result=False)
    columns, item = largest.shape[1], largest.element_size()
    return replace(job, columns=columns, result_item=item, in_result=True)


def kept_blocks(counts: Tensor) -> list[int]:
    """Slots of every row block, -1 where it has none in the store; of a table on the host."""
    found: list[int] = counts.tolist()
    return found


class Range(NamedTuple):
    """A range of the vocabulary: its columns, likewise those by work, and products."""

    first: int
    last: int
    split: int  # columns by work from the first to this one are split
    product: int
    end: int

    @property
    def slots(self) -> int:
        """How many."""
        return self.end - self.product


def ranges_of(edges: Sequence[int], figures: Tensor) -> list[Range]:
    """All of them, from the figures of `Order` on the host."""
    known, count = figures.tolist(), len(edges) - 1
    pairs = zip(
        itertools.pairwise(edges), known[count:], itertools.pairwise([0, *known[:count]]),
        strict=True,
    )  # fmt: skip
    return [Range(*columns, split, *products) for columns, split, products in pairs]


class Scratch:
    """Memory of products: what of a part of dW is not written yet, or the budget's."""

    def __init__(self, parts: list[Part], room: int) -> None:
        """`room` bytes of the budget, taken when they are needed."""
        largest = max((part.target for part in parts), key=lambda target: target.nbytes)
        self.lender = largest if largest.is_contiguous() else None
        self.room, self.own = room, largest.new_empty(0, dtype=torch.float32)
        flat = (self.own if self.lender is None else self.lender).view(-1).view(torch.uint8)
        self.bytes = flat[-flat.data_ptr() % _ALIGNMENT :]

    def _first(self, part: Part, last: int) -> int:
        """Of the bytes no one needs while the columns of a part up to `last` are summed."""
        if part.target is not self.lender:
            return 0
        return -(-last * part.target.stride(0) * part.target.itemsize // _ALIGNMENT) * _ALIGNMENT

    def panel(self, part: Part, each: Range) -> int:
        """Columns of a panel of the products of a range, 0 where these have no room."""
        room = max(self.room, self.bytes.shape[0] - self._first(part, each.last))
        return panel_columns(part.target.shape[1], each.slots, room)

    def products(self, part: Part, each: Range, width: int) -> Tensor:
        """(R, W) float32 of a range and so wide a panel."""
        shape = (max(1, each.slots), width)
        first, size = self._first(part, each.last), 4 * shape[0] * width
        if first + size <= self.bytes.shape[0]:
            return self.bytes[first : first + size].view(torch.float32).view(shape)
        if 4 * self.own.shape[0] < size:
            self.own = self.own.new_empty(0)  # the one before goes first
            self.own = self.own.new_empty(size // 4)
        return self.own[: size // 4].view(shape)


def from_slots(
    parts: list[Part], inputs: Inputs, kept: Kept, order: Order, ranges: list[Range], room: int,
    counts: list[int],
) -> bool:  # fmt: skip
    """Fills parts of dW from slots; says no where the products of a range have no room.

    `room`: bytes beside all that is there and slots that are made again; `counts`: slots of every
    row block.
    """
    scratch = Scratch(parts, room)
    # That which lends its memory comes last.
    parts = sorted(parts, key=lambda part: part.target is scratch.lender)
    panels = [[scratch.panel(part, each) for each in ranges] for part in parts]
    if not all(itertools.chain(*panels)):
        return False
    if kept.store.slots is None:
        kept = kept._replace(store=remake_slots(kept.store, inputs, kept.rows, counts))
    for part, widths in zip(parts, panels, strict=True):
        for each, width in zip(ranges, widths, strict=True):
            _fill(part, inputs, kept, order, each, scratch.products(part, each, width))
    return True


def _fill(
    part: Part, inputs: Inputs, kept: Kept, order: Order, each: Range, products: Tensor
) -> None:
    """Some columns of the vocabulary of a part."""
    target, hidden, rest = part
    rows = (inputs, hidden, kept.rows)
    multiply = SlotProducts(products, kept.store, order.places, *rows, kept.unit)
    out = target[: each.last]  # what comes after it may be the products
    add = None
    for panel in spans(target.shape[1], products.shape[1]):
        if each.slots:
            multiply((each.product, each.end), *panel)
        # Made ready while the device multiplies.
        add = add or SumProducts(out, products, order, *rows, (kept.mean, rest), kept.unit)
        add((each.first, each.split, each.last), each.product, *panel)


def _parts(
    inputs: Inputs, statistics: Tensor, rows: Tensor, tail: Tail, out: HeadGradients
) -> list[Part]:
    """What is wanted, the rows it is made of, and what these give back."""
    wanted = list(zip(out.weights, inputs.hidden, strict=True))
    if out.bias is not None:
        count = inputs.hidden[0].shape[:-1].numel()
        wanted.append((out.bias[:, None], out.bias.new_ones((1, 1)).expand(count, 1)))
    groups = (tail.groups, tail.sums.shape[0])
    return [
        Part(target, hidden, given_back(hidden, inputs, statistics, rows, *groups))
        for target, hidden in wanted
        if target is not None
    ]
