"""dW and db from kept entries that are lists; the formulae are those of this package's docstring.

One vocabulary block at a time, summed in float32: the tail's rank-1 term first, then the kept
entries of every row chunk, or where these are not in the store the recomputed tile, whose rows have
no tail in this block; the labels' entries last. On a CPU, where one chunk has all rows, a row of
the gradient is summed in cache and written once.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from orpo_kernels.engine.budget import Plan, plan_backward, spans
from orpo_kernels.engine.host_copy import is_capturing
from orpo_kernels.engine.operands import Operands
from orpo_kernels.engine.sparse.plan import SparsePlan
from orpo_kernels.engine.sparse.tail import Packed, Tail
from orpo_kernels.engine.tiles import column_sums, compact_weight_gradient
from orpo_kernels.engine.weight_gradient import Span, Work

_BLOCK_BYTES_CPU = 2**23  # a float32 block of dW that stays in cache from its first to last term


class Kept(NamedTuple):
    """What a sparse forward left for the backward, and how its rows refer to it."""

    packed: Packed  # `per_block` of the scored rows only, (blocks, 2, M)
    tail: Tail
    plan: SparsePlan
    chunks: list[Span]  # of the forward
    stored: list[list[bool]]  # by chunk and block: whether its entries are in the store
    factors: Tensor  # (blocks, M): of the E of a block, as `Factors.softmax` is of the last one

    @classmethod
    def of(
        cls, operands: Operands, packed: Packed, tail: Tail, plan: SparsePlan, work: Work
    ) -> "Kept":
        """Waits for the device, to learn what is in the store."""
        sizes = operands.sizes
        chunks = list(spans(sizes.rows, plan.tile.even(sizes.rows).rows))
        moved = torch.exp(packed.per_block[:, 0] - work.statistics.reference)
        stored = stored_tiles(packed, len(chunks), plan.blocks)
        return cls(packed, tail, plan, chunks, stored, work.factors.softmax * moved)


class AddsKept(Protocol):
    """Adds the kept entries of a chunk, in some columns of a block, to dW and db."""

    def __call__(
        self, block: Tensor, bias_block: Tensor, item: int, columns: Span, rows: Span, /
    ) -> None:
        """`rows` is the chunk, `columns` are counted from the first of vocabulary block `item`."""


def sparse_weight_gradient(work: Work, kept: Kept, budget: int) -> None:
    """Fills the gradients of the head from lists.

    Args:
        work: rows, factors and what is to be filled.
        kept: from the forward.
        budget: bytes the workspace may take.
    """
    lists, results = ListsOfEntries(work, kept), work.out.wanted
    q, u = kept.tail.mean(), tail_rows(work, kept, kept.factors)
    plan = allocated(work, kept, budget)
    written: list[Span] = []
    if work.operands.sizes.on_cpu and len(kept.chunks) == len(results) == 1:
        columns = kept.plan.tile.columns
        blocks = spans(work.operands.sizes.vocabulary, columns)
        written = [b for b, there in zip(blocks, kept.stored[0], strict=True) if there]
        for b0, b1 in written:
            bias_block = lists.write(results[0][b0:b1], b0 // columns, (q[:, b0:b1], u))
            work.write(results[0][b0:b1], bias_block, (b0, b1), plan.rows, written=True)
    sum_by_blocks(work, kept, plan, lists.add, (q, u), done=written)


def allocated(work: Work, kept: Kept, budget: int) -> Plan:
    """The plan of a gradient that is summed by blocks; takes its memory."""
    plan = plan_backward(
        work.operands.sizes, budget, sum(work.out.widths), recompute=True,
        reserved=kept.plan.reserved_bytes,
    )  # fmt: skip
    work.allocate(plan, tiles=True, block=True)
    return plan


def sum_by_blocks(
    work: Work,
    kept: Kept,
    plan: Plan,
    add_kept: AddsKept,
    tail: tuple[Tensor, Tensor],
    done: list[Span],
) -> None:
    """One vocabulary block after the other, but for those that are done: summed, rounded once."""
    sizes, (q, u) = work.operands.sizes, tail
    width = sum(work.out.widths)
    for b, (b0, b1) in enumerate(spans(sizes.vocabulary, kept.plan.tile.columns)):
        if (b0, b1) in done:
            continue
        step = plan.columns
        if all(each[b] for each in kept.stored) and sizes.device.type == "cpu":
            step = max(64, min(step, _BLOCK_BYTES_CPU // (4 * max(1, width))))
        for v0, v1 in ((b0 + i, b0 + j) for i, j in spans(b1 - b0, step)):
            block, bias_block = work.memory_of((v0, v1)), work.bias_block((v0, v1))
            torch.mm(q[:, v0:v1].t(), u[:, 1:], out=block)
            torch.mv(q[:, v0:v1].t(), u[:, 0], out=bias_block)
            for i, rows in enumerate(kept.chunks):
                if kept.stored[i][b]:
                    item = i * kept.plan.blocks + b
                    add_kept(block, bias_block, item, (v0 - b0, v1 - b0), rows)
                else:
                    _add_recomputed(work, block, bias_block, (v0, v1), rows, plan.rows)
            work.write(block, bias_block, (v0, v1), plan.rows)


def _add_recomputed(
    work: Work, block: Tensor, bias_block: Tensor, columns: Span, rows: Span, step: int
) -> None:
    for i, j in spans(rows[1] - rows[0], step):
        here = (rows[0] + i, rows[0] + j)
        work.add(block, bias_block, work.recomputed(here, columns), here)


class ListsOfEntries:
    """Kept entries that are lists, times the rows of hidden states."""

    def __init__(self, work: Work, kept: Kept) -> None:
        self._work, self._kept = work, kept
        self._last: tuple[Span, Tensor] | None = None

    def write(self, block: Tensor, item: int, tail: tuple[Tensor, Tensor]) -> Tensor:
        """Writes the block of the only chunk, and the tail; returns the block of the bias."""
        (q, u), work, packed = tail, self._work, self._kept.packed
        entries, factors = (packed.store, packed.table, item, 0), self._kept.factors[item]
        unit = work.factors.unit
        rows = self._rows((0, work.operands.sizes.rows))
        compact_weight_gradient(block, *entries, factors * unit, rows, q, u[:, 1:] * unit)
        bias_block = torch.mv(q.t(), u[:, 0])
        if work.out.bias is not None:
            ones = torch.ones_like(factors)[:, None]
            compact_weight_gradient(bias_block[:, None], *entries, factors, ones)
        return bias_block

    def add(self, block: Tensor, bias_block: Tensor, item: int, columns: Span, rows: Span) -> None:
        """As `AddsKept`."""
        packed = self._kept.packed
        factors = self._kept.factors[item % self._kept.plan.blocks, slice(*rows)]
        entries = (packed.store, packed.table, item, columns[0], factors)
        if self._work.out.bias is not None:
            ones = torch.ones_like(factors)[:, None]
            compact_weight_gradient(bias_block[:, None], *entries, ones)
        if self._work.out.parts:
            compact_weight_gradient(block, *entries, self._rows(rows))

    def _rows(self, rows: Span) -> Tensor:
        """Hidden states of a chunk; the last chunk's are kept for the next vocabulary block."""
        if self._last is None or self._last[0] != rows:
            parts = self._work.out.parts
            self._last = (rows, self._work.operands.rows.take(*rows, parts))
        return self._last[1]


def tail_rows(work: Work, kept: Kept, factors: Tensor) -> Tensor:
    """Minus the sum over the rows of each group of `a m`, and of `a m h`: (G, 1 + H)."""
    rows, parts, groups = work.operands.rows, work.out.parts, kept.tail.groups
    sums = kept.tail.sums.new_zeros((kept.tail.sums.shape[0], 1 + sum(work.out.widths)))
    for i, (start, stop) in enumerate(kept.chunks if kept.packed.store.shape[0] > 0 else []):
        dropped = kept.packed.per_block[:, 1, start:stop] * factors[:, start:stop]
        mass = torch.zeros_like(factors[0, start:stop])
        for there, each in zip(kept.stored[i], dropped, strict=True):
            if there:  # a mask would have to be copied to the device, which waits for it
                mass += each
        hidden = rows.take(start, stop, parts) if parts else None
        for group, row in enumerate(sums):
            of_group = torch.where(groups[start:stop] == group, mass, 0.0)
            row[0] -= of_group.sum()
            if hidden is not None:
                row[1:] -= column_sums(hidden, of_group)
    return sums


def stored_tiles(packed: Packed, chunks: int, blocks: int) -> list[list[bool]]:
    """By chunk and block, whether its kept entries are in the store; waits for the device."""
    if packed.store.shape[0] == 0 or is_capturing(packed.store.device):
        return [[False] * blocks] * chunks
    fits: list[bool] = (packed.table[: chunks * blocks, 1] >= 0).tolist()
    return [fits[i * blocks : (i + 1) * blocks] for i in range(chunks)]
