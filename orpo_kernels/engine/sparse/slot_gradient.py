"""dW and db of a GPU, from the slots that the forward kept.

    once                        lists of slots and labels by column; the tail's rows
    for a panel of H:
        slot products           kept slots times rows of hidden states
        sum products            dW of the panel, written

    dW_v = sum_t share_t 1[v = y_t] h_t - sum_t softmax_t slot_tv h_t - sum_g q_gv rest_g

All rows or none: where a row block kept nothing (it is dense, or found no room in the store), dW is
the exact loop's. Parts of it made in two ways would have to be rounded one by one, and they cancel:
chosen answers against rejected ones. Which it is the host learns from a table that is copied to it
behind the forward; while a CUDA graph is captured it cannot be read, and dW is exact. db is the
same with a column of ones for the hidden states.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.constants import COMPACT_ROWS
from orpo_kernels.engine.budget import spans
from orpo_kernels.engine.gpu import backward
from orpo_kernels.engine.gpu.call import inputs_of, slopes_of
from orpo_kernels.engine.gpu.card import Card, card_of
from orpo_kernels.engine.gpu.model import Job
from orpo_kernels.engine.gpu.plan import plan_backward
from orpo_kernels.engine.operands import Operands
from orpo_kernels.engine.problem import Problem
from orpo_kernels.engine.scoring import is_capturing
from orpo_kernels.engine.sparse.plan import panel_columns
from orpo_kernels.engine.sparse.tail import Packed, Tail
from orpo_kernels.engine.weight_gradient import HeadGradients
from orpo_kernels.kernels import tuning
from orpo_kernels.kernels.coefficients import Slopes, coefficients, unit_of
from orpo_kernels.kernels.given_back import given_back
from orpo_kernels.kernels.inputs import Inputs
from orpo_kernels.kernels.order_entries import Order, order_entries
from orpo_kernels.kernels.slot_products import SlotProducts
from orpo_kernels.kernels.slot_store import SlotStore
from orpo_kernels.kernels.sum_products import SumProducts


class Kept(NamedTuple):
    """What the gradient of the kept rows is made of."""

    store: SlotStore
    order: Order
    rows: Tensor  # (5, M) float32: of `coefficients`
    unit: Tensor | None  # (1,) float32
    mean: Tensor  # (G, V) float32: q


@dataclass(frozen=True)
class Sizing:
    """What a gradient may take: sizes of the scored rows, bytes without the store, the card."""

    job: Job
    budget: int
    card: Card


def head_gradient(  # noqa: PLR0913 - what `engine/run.py` has of a call
    problem: Problem,
    operands: Operands,
    statistics: Tensor,
    dlogps: Tensor,
    tail: Tail,
    packed: Packed,
    table: Tensor,
    sizing: tuple[Job, int],
    out: HeadGradients,
) -> None:
    """Fills the gradients of the head; `table` is that of `packed` where the host can read it."""
    blocks = -(-operands.sizes.rows // COMPACT_ROWS)
    counts = kept_blocks(table[:blocks]) if packed.store.shape[0] > 0 else [-1] * blocks
    weight_gradient(
        inputs_of(operands), statistics, slopes_of(problem, dlogps), tail,
        SlotStore.of(packed.store, packed.table), counts,
        Sizing(*sizing, card_of(statistics.device)), out,
    )  # fmt: skip


def kept_blocks(table: Tensor) -> list[int]:
    """Slots of every row block, -1 where it has none and is recomputed; of a table on the host."""
    if is_capturing(table.device):
        return [-1] * table.shape[0]
    counts: list[int] = table[:, 1].tolist()
    return counts


def weight_gradient(
    inputs: Inputs,
    statistics: Tensor,
    slopes: Slopes,
    tail: Tail,
    store: SlotStore,
    counts: list[int],
    sizing: Sizing,
    out: HeadGradients,
) -> None:
    """Fills the gradients of the head.

    Args:
        inputs: as of the forward.
        statistics: (8, N) of the forward.
        slopes: of the loss.
        tail: of the scored rows.
        store: what the forward kept.
        counts: of its row blocks, by `kept_blocks`.
        sizing: of the call.
        out: to be filled.
    """
    with tuning.guard(statistics.device):
        if min(counts) < 0:
            plan = plan_backward(sizing.job, sizing.budget, sizing.card)
            backward.weight_gradient(inputs, statistics, slopes, plan.sweeps, None, out)
            return
        count = sum(counts)
        kept = _kept(inputs, statistics, slopes, tail.mean(), store, count)
        width = panel_columns(sizing.job, sizing.budget, tail.sums.shape[0], count)
        products = kept.rows.new_empty((max(1, count), width))
        for target, hidden in _targets(inputs, out):
            groups = (tail.groups, tail.sums.shape[0])
            rest = given_back(hidden, inputs, statistics, kept.rows, *groups)
            from_slots(target, hidden, inputs, kept, rest, products)


def from_slots(
    target: Tensor,  # (V, H)
    hidden: Tensor,  # (N, H), or (B, T, H) with N = B T
    inputs: Inputs,
    kept: Kept,
    rest: Tensor,  # (G, H)
    products: Tensor,  # (S, W) float32: memory
) -> None:
    """Fills one part of dW, panel by panel."""
    multiply = SlotProducts(products, kept.store, inputs, hidden, kept.rows, kept.unit)
    tail = (kept.mean, rest)
    add = SumProducts(target, products, kept.order, inputs, hidden, kept.rows, tail, kept.unit)
    for panel in spans(target.shape[1], products.shape[1]):
        multiply(*panel)
        add(*panel)


def _kept(
    inputs: Inputs, statistics: Tensor, slopes: Slopes, mean: Tensor, store: SlotStore,
    count: int,
) -> Kept:  # fmt: skip
    labels = inputs.labels[None]
    if inputs.second is not None:
        labels = torch.stack((inputs.labels, inputs.second))
    rows = coefficients(statistics, slopes, inputs.positions, inputs.logit_scale)
    unit = None
    if inputs.dtype == torch.float16:
        unit = unit_of(rows[4], None, inputs.positions)
    order = order_entries(store.columns[:count], labels, mean.shape[1])
    return Kept(store, order, rows, unit, mean)


def _targets(inputs: Inputs, out: HeadGradients) -> Iterator[tuple[Tensor, Tensor]]:
    """What is wanted, and the rows it is made of."""
    for target, hidden in zip(out.weights, inputs.hidden, strict=True):
        if target is not None:
            yield target, hidden
    if out.bias is not None:
        rows = inputs.hidden[0].shape[:-1].numel()
        yield out.bias[:, None], out.bias.new_ones((1, 1)).expand(rows, 1)
