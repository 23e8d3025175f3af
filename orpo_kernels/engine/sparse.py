"""The sparse strategy: the probabilities over eps as they are, the others by their average.

    u_tv = E_tv e^m / e^lse          the entry of the softmax gradient; E, m as in `exact`
    K_t  contains every v with u_tv > eps;  k_tv = u_tv as the backend rounds it
    m_t  = sum_v u_tv - sum_{K_t} k_tv                       the mass that is dropped
    q_g  = the dropped u_tv, summed over the rows of group g and normalised
    dhidden_t = a_t (share W[y] - sum_{K_t} k_tv W_v - m_t q_g W)
    dW_v = sum_t (a_t share 1[v = y_t] - a_t k_tv) h_t - sum_g q_gv sum_{t in g} a_t m_t h_t

One pass over the logits and no second GEMM. What is dropped is given back, so that the gradient's
error sums to 0 over the rows of a group: groups are rows whose a_t share a sign. u <= eps where
dropped, hence the root of the sum of dropped u^2 is at most sqrt(eps m_t): the certificate.

Forward as in `exact`, row chunks x vocabulary blocks. K_t is chosen by the sum that is known so far
(the label's exponential in it from the start), which is at most the final one: a superset. A tile
with more live entries than pay off is done the exact way, as is the rest of its chunk; that too is
a superset. Between forward and backward of a trainable head the kept entries of each tile stay in a
store of fixed size. The backward recomputes, the exact way, the tiles that are not in it.

Row 7 of `statistics` (8, N) is m_t over the mass beside the labels; 0 to 6 as in `exact`.
`blocks` (vocabulary blocks, 2, N): the m that E of this block refers to, and the E dropped in it.
"""

import contextlib
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.engine.chunks import (
    Columns,
    Plan,
    Rows,
    Sizes,
    matmul_into,
    plan_backward,
    plan_forward,
    plan_sparse,
    spans,
)
from orpo_kernels.engine.collect import LARGE, MOST
from orpo_kernels.engine.compact import compact_matmul, compact_pack, softmax_compact
from orpo_kernels.engine.exact import Arguments, Forward, Head, Labels, LabelTerms
from orpo_kernels.engine.slots import plan_slots, segment_bytes
from orpo_kernels.engine.tiles import (
    column_sums,
    csr_matmul_,
    softmax_compact_online_,
    softmax_stats,
)

_STORE_SHARE = 8  # of the budget
_STORE_ROW_BYTES = 2**15  # no more than this for a row: short batches take less
_STORE_ROW_BYTES_CPU = 2**11  # entries, not blocks of them: a row keeps about 50, 400 bytes
_MAX_EXPONENT = 80.0  # exp of it is finite in float32
_MANY_ROWS = 8192  # more than any chunk has


class Sizing(NamedTuple):
    """How the budget is divided: nothing here depends on which rows are scored, it can be traced.

    `reserved_bytes` are taken beside a tile, in the forward and in the backward.
    """

    plan: Plan
    dense: Plan  # of a step that goes the exact way from the start
    blocks: int
    items: int  # tiles, at most
    store_bytes: int
    reserved_bytes: int
    slots: bool  # `engine/slots.py`


def sizing(
    sizes: Sizes, groups: int, budget: int, *, trainable: bool, slots: bool = False
) -> Sizing:
    """The shapes of `sizes.rows` rows, scored or not, in `groups` groups.

    A trainable head whose kept entries have no room is left a store of 0 bytes: its backward
    recomputes every tile.

    Raises:
        ValueError: the budget is too small for one tile, forward or backward.
    """
    store, lists = 0, 0
    if trainable and slots:
        store, lists = segment_bytes(sizes, budget)
    elif trainable:
        row_bytes = _STORE_ROW_BYTES_CPU if sizes.on_cpu else _STORE_ROW_BYTES
        store = min(budget // _STORE_SHARE, sizes.rows * row_bytes) // 16 * 16
    if store > 0:
        with contextlib.suppress(ValueError):
            return _sizing(sizes, groups, budget, (store, lists), trainable, slots)
    return _sizing(sizes, groups, budget, (0, 0), trainable, slots)


def _sizing(
    sizes: Sizes, groups: int, budget: int, stored: tuple[int, int], trainable: bool, slots: bool
) -> Sizing:
    many, (store, lists) = replace(sizes, rows=_MANY_ROWS), stored
    # Sums of the tail, and those of one tile at most once more.
    reserved = 2 * groups * (sizes.vocabulary + sizes.hidden_columns) * sizes.wide_bytes + store
    record = 2 * sizes.rows * sizes.wide_bytes if store > 0 else 0
    if slots:
        plan = plan_slots(many, budget, (reserved, record), groups, packs=store > 0)
        dense = plan_forward(many, budget - reserved - record, with_gradient=True)
    else:
        plan = plan_sparse(many, budget, (reserved, record), live_share(sizes.device))
        dense = plan
    blocks = -(-sizes.vocabulary // plan.columns)
    if trainable:
        reserved += blocks * record + lists
        rows = plan.rows * (2 if slots else 1)  # of a chunk, and scaled
        reserved += rows * sizes.hidden_columns * sizes.compute_dtype.itemsize
        plan_backward(many, budget, sizes.hidden_columns, recompute=True, reserved=reserved)
    items = blocks * -(-sizes.rows // plan.rows)
    return Sizing(plan, dense, blocks, items, store, reserved, slots)


def even_plan(plan: Plan, rows: int) -> Plan:
    """For `rows` rows, in chunks of one size."""
    chunks = max(1, -(-rows // plan.rows))
    even = max(1, -(-rows // chunks))
    return replace(plan, rows=-(-even // plan.row_block) * plan.row_block)


def live_share(device: torch.device) -> float:
    """Kept entries of a tile, at most, as a share of it; over it the exact way is faster.

    A CPU adds kept entries one by one, at a twentieth of the rate of a 16-bit GEMM.
    """
    return 1 / 32 if device.type == "cpu" else 1 / 4


@dataclass(frozen=True)
class Tail:
    """What is dropped: entries up to `eps`, and their sums by group."""

    eps: float
    groups: Tensor  # (M,) int64, of the scored rows
    sums: Tensor  # (G, V)

    def mean(self) -> Tensor:
        """The vectors q (G, V): each sums to 1, or is 0 where nothing was dropped."""
        total = self.sums.sum(1, keepdim=True)
        return self.sums * torch.where(total > 0, 1.0 / total, 0.0)

    def product(self, columns: Columns, step: int) -> Tensor:
        """The rows q W (G, H), from entries of the head that are not rounded."""
        parts = [self.sums.new_zeros((self.sums.shape[0], w.shape[1])) for w in columns.parts]
        for v0, v1 in spans(self.sums.shape[1], step):
            for total, weight in zip(parts, columns.parts, strict=True):
                total += column_sums(weight[v0:v1], self.sums[:, v0:v1])
        mass = self.sums.sum(1, keepdim=True)
        return torch.cat(parts, 1) * torch.where(mass > 0, 1.0 / mass, 0.0)


@dataclass(frozen=True)
class Packed:
    """The kept entries between forward and backward, by tile: chunk x block, block the faster."""

    store: Tensor  # (bytes,) uint8
    table: Tensor  # (items, 2) int64
    blocks: Tensor  # (blocks, 2, N)


class SparseForward(Forward):
    """The forward over the scored rows: statistics, g without its tail, and what is kept."""

    def __init__(
        self, rows: Rows, head: Head, labels: Labels, sizes: Sizes, plan: Plan, tail: Tail, *,
        with_gradient: bool, dense: bool,
    ) -> None:  # fmt: skip
        super().__init__(rows, head, labels, sizes, plan, with_gradient=with_gradient, keep=False)
        self.tail, self.dense = tail, dense
        self.kept_entries = labels.first.new_zeros(1)

    def sparse_chunk(
        self, start: int, stop: int, packed: Packed | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Rows `start` to `stop`.

        Args:
            start: first row.
            stop: one past the last.
            packed: receives the kept entries, for a trainable head.

        Returns:
            statistics (8, R); g (R, H) or None, without the tail, `statistics[7] * q_g W`; with
            `packed` this chunk's rows (blocks, 2, R) of `packed.blocks`.
        """
        hidden, labels = self.rows.take(start, stop), self.labels.stacked(start, stop)
        label_terms = self._label_terms(hidden, labels)
        label_lse = _label_lse(label_terms, labels)
        row_max = hidden.new_full((stop - start,), torch.finfo(self.wide).min, dtype=self.wide)
        sums = (row_max, torch.zeros_like(row_max))
        all_dropped = torch.zeros_like(row_max)
        accumulator, dense = None, self.dense
        record: list[Tensor] = []
        if self.with_gradient:
            accumulator = hidden.new_zeros(hidden.shape, dtype=self.wide)
        for v0, v1 in spans(self.sizes.vocabulary, self.plan.columns):
            weight = self.head.columns.block(v0, v1)
            tile, narrow = self._tiles(stop - start, v1 - v0, None)
            matmul_into(tile, hidden, weight.t())
            arguments = (tile, self.head.block_bias(v0, v1), labels, v0)
            operands, groups = (hidden, weight), self.tail.groups[start:stop]
            rescale, dropped, kept = self._take(
                arguments, sums, (label_terms.z, label_lse), groups, operands, narrow, accumulator,
                dense=dense,
            )  # fmt: skip
            dense = not kept
            self.kept_entries += tile.numel() if dense else kept[2]
            all_dropped.mul_(rescale).add_(dropped)
            if packed is not None:
                item = start // self.plan.rows * packed.blocks.shape[0] + len(record)
                record.append(torch.stack((row_max, self._pack(kept, packed, item, dropped))))
        statistics, g = self._finish(label_terms, *sums, accumulator)
        share = torch.where(sums[1] > 0, all_dropped / sums[1], 0.0)
        blocks = torch.stack(record) if packed is not None else None
        return torch.cat((statistics, share[None])), g, blocks

    def _take(
        self, arguments: Arguments, sums: tuple[Tensor, Tensor], label: tuple[Tensor, Tensor],
        groups: Tensor, operands: tuple[Tensor, Tensor], narrow: Tensor,
        accumulator: Tensor | None, *, dense: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
        """Takes a tile in: what all before it is rescaled by, its dropped E, its kept entries.

        Of a tile with too many of these, taken in the exact way as is a `dense` one, none are
        returned and nothing is dropped. `label`: logit of the first, log-sum-exp of both.
        """
        if not dense and self.sizes.on_cpu:
            return self._compact_online(arguments, sums, label[1], groups, operands, accumulator)
        if not dense:
            rescale, dropped, kept = self._compact(arguments, sums, label[1], groups)
            if kept:
                if accumulator is not None:
                    accumulator.mul_(rescale[:, None])
                    compact_matmul(accumulator, kept, operands[1])
                return rescale, dropped, kept
        rescale, _ = self._add_tile(arguments, sums, label[0], operands, narrow, accumulator)
        return rescale, torch.zeros_like(rescale), []

    def _compact_online(
        self, arguments: Arguments, sums: tuple[Tensor, Tensor], label_lse: Tensor,
        groups: Tensor, operands: tuple[Tensor, Tensor], accumulator: Tensor | None,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
        """One look at the tile, which decides the form, on a CPU."""
        tile, _, _, first_column = arguments
        refines = self.sizes.refines
        rescale, *entries, dropped = softmax_compact_online_(
            *arguments, *sums, label_lse, *(operands if refines else (None, None)), self.tail.eps,
            LARGE if refines else math.inf, MOST, self.head.logit_scale, self.head.softcap, groups,
            self.tail.sums[:, first_column : first_column + tile.shape[1]],
            max(1, int(tile.shape[1] * live_share(tile.device))),
        )  # fmt: skip
        dense = dropped.numel() < rescale.numel()
        if accumulator is not None:
            if dense:
                before = rescale if first_column > 0 else None
                self._accumulate(accumulator, before, tile, operands[1])
            elif first_column > 0:
                accumulator.mul_(rescale[:, None])
            csr_matmul_(accumulator, *entries, operands[1])
        if dense:
            return rescale, torch.zeros_like(rescale), []
        offsets, columns, values = entries
        count = torch.full((1,), values.numel(), dtype=torch.int64)
        return rescale, dropped, [dropped, dropped[:0], count, offsets.int(), columns, values]

    def _compact(
        self, arguments: Arguments, sums: tuple[Tensor, Tensor], label_lse: Tensor, groups: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Two looks at the tile, elsewhere; without kept entries it is as it was."""
        (row_max, sum_exp), (tile, _, _, first_column) = sums, arguments
        scale, softcap = self.head.logit_scale, self.head.softcap
        block_max, block_sum, _ = softmax_stats(*arguments, scale, softcap)
        new_max = torch.maximum(row_max, block_max)
        rescale = torch.exp(row_max - new_max)
        block_sum = block_sum * torch.exp(block_max - new_max)
        new_sum = sum_exp * rescale + block_sum
        beside = torch.exp((label_lse - new_max).clamp(max=_MAX_EXPONENT))
        kept = softmax_compact(
            *arguments, new_max, new_sum + beside, self.tail.eps, scale, softcap, groups,
            self.tail.sums[:, first_column : first_column + tile.shape[1]], self._capacity(tile),
        )  # fmt: skip
        if kept:
            row_max.copy_(new_max)
            sum_exp.copy_(new_sum)
            all_of_it = block_sum * scale if softcap is None else kept[1]
            block_sum = all_of_it - kept[0]
        return rescale, block_sum, kept

    def _capacity(self, tile: Tensor) -> int | None:
        """How many entries of a tile may be kept."""
        return int(tile.numel() * live_share(tile.device))

    def _pack(self, kept: list[Tensor], packed: Packed, item: int, dropped: Tensor) -> Tensor:
        """Stores the entries kept of a tile; the E that is dropped for who reads the store."""
        compact_pack(kept, packed.store, packed.table, item)
        return dropped


def _label_lse(label: LabelTerms, labels: Tensor) -> Tensor:
    """Log of the sum of the labels' exponentials, -inf for a row without."""
    lse = torch.where(labels[0] >= 0, label.z, -torch.inf)
    if label.second is None:
        return lse
    z, _, distinct = label.second
    return torch.logaddexp(lse, torch.where(distinct, z, -torch.inf))
