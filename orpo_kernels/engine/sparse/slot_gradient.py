"""dW and db of a GPU, from the slots that the forward kept.

    before it is known how many coefficients, lists of labels by column, the tail's rows
    for a panel of H:
        slot products           kept slots times rows of hidden states
        (the first time)        lists of slots by column, made while the device multiplies
        sum products            dW of the panel, written

    dW_v = sum_t share_t 1[v = y_t] h_t - sum_t softmax_t slot_tv h_t - sum_g q_gv rest_g

All rows or none: where a row block kept nothing (it is dense, or found no room in the store), dW is
the exact loop's. Parts of it made in two ways would have to be rounded one by one, and they cancel:
chosen answers against rejected ones. Which it is the host learns from a table that is copied to it
behind the forward, the one wait: what does not depend on it is started before, so that the device
has something to do until the host has read it. While a CUDA graph is captured it cannot be read,
and dW is exact. db is the same with a column of ones for the hidden states.
"""

from collections.abc import Iterator
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
from orpo_kernels.engine.host_copy import HostCopy
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
from orpo_kernels.kernels.order_entries import Listed, label_lists, order_entries
from orpo_kernels.kernels.slot_products import SlotProducts
from orpo_kernels.kernels.slot_store import SlotStore
from orpo_kernels.kernels.sum_products import SumProducts


class Kept(NamedTuple):
    """What dW from slots is made of, but for their number and order."""

    store: SlotStore
    labels: Listed
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
        labels = inputs.labels[None]
        if inputs.second is not None:
            labels = torch.stack((inputs.labels, inputs.second))
        mean = tail.mean()
        return cls(store, label_lists(labels, mean.shape[1]), rows, unit, mean)


class Part(NamedTuple):
    """A part of dW that is wanted."""

    target: Tensor  # (V, H)
    hidden: Tensor  # (N, H), or (B, T, H) with N = B T
    rest: Tensor  # (G, H): of `given_back`


def head_gradient(  # noqa: PLR0913 - what `engine/run.py` has of a call
    problem: Problem,
    operands: Operands,
    statistics: Tensor,
    dlogps: Tensor,
    tail: Tail,
    packed: Packed,
    table: HostCopy,
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
        packed: of the forward.
        table: that of `packed`, on its way to the host.
        sizing: sizes of the scored rows, and bytes without the store.
        out: to be filled.
    """
    inputs, slopes, (job, budget) = inputs_of(operands), slopes_of(problem, dlogps), sizing
    with tuning.guard(statistics.device):
        if packed.store.shape[0] > 0 and not is_capturing(statistics.device):
            store = SlotStore.of(packed.store, packed.table)
            kept = Kept.of(inputs, statistics, slopes, tail, store)
            parts = list(_parts(inputs, statistics, kept.rows, tail, out))
            counts = kept_blocks(table.get()[: -(-operands.sizes.rows // COMPACT_ROWS)])
            if min(counts) >= 0:
                width = panel_columns(job, budget, tail.sums.shape[0], sum(counts))
                from_slots(parts, inputs, kept, sum(counts), width)
                return
            del kept, parts  # the exact loop has the whole budget
        plan = plan_backward(job, budget, card_of(statistics.device))
        backward.weight_gradient(inputs, statistics, slopes, plan.sweeps, None, out)


def kept_blocks(table: Tensor) -> list[int]:
    """Slots of every row block, -1 where it has none in the store; of a table on the host."""
    counts: list[int] = table[:, 1].tolist()
    return counts


def from_slots(parts: list[Part], inputs: Inputs, kept: Kept, count: int, width: int) -> None:
    """Fills parts of dW from so many slots, in panels of so many columns."""
    products = kept.rows.new_empty((max(1, count), width))
    order = None
    for target, hidden, rest in parts:
        multiply = SlotProducts(products, kept.store, inputs, hidden, kept.rows, kept.unit)
        add = None
        for panel in spans(target.shape[1], width):
            multiply(*panel)
            # All that follows the wait but the first products: the device has these to do.
            order = order or order_entries(kept.store.columns[:count], kept.labels)
            add = add or SumProducts(
                target, products, order, inputs, hidden, kept.rows, (kept.mean, rest), kept.unit
            )
            add(*panel)


def _parts(
    inputs: Inputs, statistics: Tensor, rows: Tensor, tail: Tail, out: HeadGradients
) -> Iterator[Part]:
    """What is wanted, the rows it is made of, and what these give back."""
    wanted = list(zip(out.weights, inputs.hidden, strict=True))
    if out.bias is not None:
        count = inputs.hidden[0].shape[:-1].numel()
        wanted.append((out.bias[:, None], out.bias.new_ones((1, 1)).expand(count, 1)))
    for target, hidden in wanted:
        if target is not None:
            groups = (tail.groups, tail.sums.shape[0])
            yield Part(target, hidden, given_back(hidden, inputs, statistics, rows, *groups))
