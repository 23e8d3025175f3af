"""dW and db of a GPU: from segments, the kept entries regrouped by vocabulary block.

Two ways:

    at once           every chunk is in the store, and the rows a_t h_t of all tokens fit the
                      budget: one launch writes each part of dW, in its dtype
    block by block    as from lists, in float32: first the segments of the chunks that are in the
                      store, then the recomputed tiles of the others
"""

import torch
from torch import Tensor

from orpo_kernels.engine.budget import spans, strip_bytes
from orpo_kernels.engine.operands import in_rows
from orpo_kernels.engine.sparse.slot_loop import store_of
from orpo_kernels.engine.sparse.weight_gradient import Kept, allocated, sum_by_blocks, tail_rows
from orpo_kernels.engine.weight_gradient import Span, Work
from orpo_kernels.kernels import launcher
from orpo_kernels.kernels.segment_store import SegmentStore


def segment_weight_gradient(work: Work, kept: Kept, budget: int) -> None:
    """Fills the gradients of the head from segments; as `sparse_weight_gradient`."""
    fits = kept.plan.reserved_bytes + _bytes_at_once(work) <= budget
    if fits and all(all(each) for each in kept.stored):
        # Of one vocabulary block: its E refers to the m of the whole.
        sums = tail_rows(work, kept, work.factors.softmax[None])
        _write_at_once(work, kept, kept.tail.mean(), sums)
        return
    tail = (kept.tail.mean(), tail_rows(work, kept, kept.factors))
    plan = allocated(work, kept, budget)
    sum_by_blocks(work, kept, plan, Segments(work, kept).add, tail, done=[])


def _bytes_at_once(work: Work) -> int:
    """Beside what is reserved: all rows twice, sorted labels, db, a strip of wide rows."""
    sizes = work.operands.sizes
    row_bytes = 2 * sizes.hidden_columns * sizes.compute_dtype.itemsize
    row_bytes += 64 * sizes.label_sets
    columns = 2 * sizes.vocabulary * sizes.wide_bytes
    return sizes.rows * row_bytes + columns + strip_bytes(sizes.device)


def _write_at_once(work: Work, kept: Kept, mean: Tensor, sums: Tensor) -> None:
    factors, unit = work.factors.softmax, work.factors.unit
    sizes, out = work.operands.sizes, work.out
    M, V = sizes.rows, sizes.vocabulary
    store = _store(work, kept)
    lists = launcher("weight_gradient", "list_tokens")(store, 0, V)
    labels, shares = work.operands.labels.stacked(0, M), torch.stack(work.factors.shares)
    if out.bias is not None:
        dropped = torch.mv(mean.t(), sums[:, 0])
        dropped -= launcher("weight_gradient", "segment_column_sums")(store, lists, factors, V)
        dropped.mul_(unit)
        share = torch.where(labels >= 0, shares, 0.0).view(-1)
        dropped.index_put_((labels.clamp(min=0).view(-1),), share, accumulate=True)
        out.bias.copy_(dropped)
    if not out.parts:
        return
    targets = launcher("weight_gradient", "sort_targets")(labels, shares, 0, V)
    rows, first = sums[:, 1:] * -unit, 0
    for part, dweight, width in zip(out.parts, out.wanted, out.widths, strict=True):
        hidden = _all_rows(work, part)
        launcher("weight_gradient", "segment_weight_gradient")(
            dweight, store, lists, _scaled_by(factors, hidden), unit[None], mean,
            rows[:, first : first + width], targets, hidden,
        )  # fmt: skip
        first += width


class Segments:
    """Segments of the chunks that are in the store, times the rows of hidden states."""

    def __init__(self, work: Work, kept: Kept) -> None:
        self._work, self._kept = work, kept
        self._last: tuple[Span, Tensor] | None = None

    def add(self, block: Tensor, bias_block: Tensor, item: int, columns: Span, rows: Span) -> None:
        """As `AddsKept`."""
        store = _store(self._work, self._kept).rows(*rows)
        factors = self._kept.factors[item % self._kept.plan.blocks, slice(*rows)]
        here = (columns[0], block.shape[0])
        lists = launcher("weight_gradient", "list_tokens")(store, *here)
        if self._work.out.bias is not None:
            sums = launcher("weight_gradient", "segment_column_sums")
            bias_block -= sums(store, lists, factors, here[1])
        if not self._work.out.parts:
            return
        if self._last is None or self._last[0] != rows:
            self._last = None  # the memory of the last ones, before that of these is taken
            hidden = self._work.operands.rows.take(*rows, self._work.out.parts)
            self._last = (rows, _scaled_by(factors, hidden))
        add = launcher("weight_gradient", "segment_weight_gradient_add")
        add(block, store, lists, self._last[1])


def _store(work: Work, kept: Kept) -> SegmentStore:
    sizes = work.operands.sizes
    return store_of(kept.packed, sizes, kept.plan.tile.even(sizes.rows).rows)


def _all_rows(work: Work, part: int) -> Tensor:
    """All rows of a part of hidden, in the GEMMs' dtype; a view where nothing moves."""
    rows, M = work.operands.rows, work.operands.sizes.rows
    whole = rows.parts[part]
    if rows.index is None and rows.scored is None and whole.dtype == rows.dtype:
        return in_rows(whole)
    gathered = whole.new_empty((M, whole.shape[-1]), dtype=rows.dtype)
    for i, j in spans(M, _strip(gathered)):
        gathered[i:j] = rows.take(i, j, (part,))
    return gathered


def _scaled_by(factors: Tensor, hidden: Tensor) -> Tensor:
    scaled = hidden.new_empty(hidden.shape)
    for i, j in spans(hidden.shape[0], _strip(hidden)):
        scaled[i:j] = factors[i:j, None] * hidden[i:j]
    return scaled


def _strip(rows: Tensor) -> int:
    """How many rows may be wide at once."""
    return max(1, strip_bytes(rows.device) // (12 * max(1, rows.shape[1])))
