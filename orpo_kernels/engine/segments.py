"""The sparse strategy where kept entries are slots: a GPU's forward, and the head's gradient.

The forward is that of `sparse`, on tiles that have the room for their slots. A trainable head keeps
segments of them: of a chunk all or none, which the device decides and the host learns in the
backward, without a wait of its own. dW and db then have two ways:

    at once           every chunk is in the store, and the rows a_t h_t of all tokens fit the
                      budget: one launch writes each part of dW, in its dtype
    block by block    as `sparse_weight`, in float32: first the segments of the chunks that are in
                      the store, then the recomputed tiles of the others

m_t of dW is what the segments leave out, a little more than the slots do.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orpo_kernels.constants import COMPACT_ROWS
from orpo_kernels.engine.chunks import Plan, Rows, Sizes, spans
from orpo_kernels.engine.exact import Head, Labels
from orpo_kernels.engine.selection import is_capturing
from orpo_kernels.engine.slots import slot_cells, slot_tile
from orpo_kernels.engine.sparse import Packed, Sizing, SparseForward, Tail, even_plan
from orpo_kernels.engine.sparse_weight import SparseWeightGradient, stored_tiles
from orpo_kernels.engine.tiles import strip_bytes
from orpo_kernels.kernels.segment_store import Store, segment_store

_NO_TILE = Plan(0, 0, 0)


def _kernel(module: str, name: str) -> Callable[..., Any]:
    """A launcher that stands behind no schema: only where slots are, triton is."""
    return getattr(importlib.import_module(f"orpo_kernels.kernels.{module}"), name)  # type: ignore[no-any-return]


class SlotForward(SparseForward):
    """As `SparseForward`, of tiles that hold their slots; none of them goes the exact way."""

    def __init__(
        self, rows: Rows, head: Head, labels: Labels, sizes: Sizes, plan: Plan, tail: Tail, *,
        with_gradient: bool,
    ) -> None:  # fmt: skip
        super().__init__(
            rows, head, labels, sizes, _NO_TILE, tail, with_gradient=with_gradient, dense=False
        )
        self.plan = plan
        self.tile = labels.first.new_empty(slot_cells(plan), dtype=sizes.product_dtype)
        self._store: Store | None = None

    def finish(self, packed: Packed) -> None:
        """Says in the table which chunks are in the store."""
        store = self._segments(packed)
        starts, sizes = store.used[:-1], store.used.diff()
        here = packed.table[: sizes.shape[0]]
        here[:, 0] = starts
        here[:, 1] = torch.where(store.overflow > 0, -1, sizes)

    def _tiles(self, rows: int, columns: int, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        tile = slot_tile(self.tile, rows, columns)
        return tile, tile

    def _capacity(self, tile: Tensor) -> int | None:
        return None

    def _pack(self, kept: list[Tensor], packed: Packed, item: int, dropped: Tensor) -> Tensor:
        first_row = item * self.plan.rows
        pack = _kernel("row_segments", "compact_pack")
        mass: Tensor = pack(
            self._segments(packed), kept, item, first_row // COMPACT_ROWS, first_row
        )
        return dropped + (kept[0] - mass)

    def _segments(self, packed: Packed) -> Store:
        if self._store is None:
            self._store = _store(packed, self.sizes, self.plan.rows)
            self._store.used[:1].zero_()
        return self._store


class SegmentWeightGradient(SparseWeightGradient):
    """dW and db from segments."""

    _chunk_rows = 0
    _segment_rows: tuple[tuple[int, int], Tensor] | None = None

    def sparse_run(
        self,
        dweights: list[Tensor | None],
        dbias: Tensor | None,
        packed: Packed,
        tail: Tail,
        sized: Sizing,
        budget: int,
    ) -> None:
        """Fills the gradients that are not None; as `SparseWeightGradient.sparse_run`."""
        self._chunk_rows = even_plan(sized.plan, self.sizes.rows).rows
        chunks = list(spans(self.sizes.rows, self._chunk_rows))
        stored = stored_tiles(packed, len(chunks), sized.blocks)
        fits = sized.reserved_bytes + self._bytes_at_once() <= budget
        if not fits or not all(all(each) for each in stored):
            super().sparse_run(dweights, dbias, packed, tail, sized, budget)
            return
        self.parts = tuple(i for i, dweight in enumerate(dweights) if dweight is not None)
        # Of one vocabulary block: its E refers to the m of the whole.
        sums = self._tail_rows(packed, stored, tail, self.softmax[None], chunks)
        self._write_at_once(dweights, dbias, packed, tail.mean(), sums)

    def _bytes_at_once(self) -> int:
        """Beside what is reserved: all rows twice, sorted labels, db, a strip of wide rows."""
        sizes = self.sizes
        row_bytes = 2 * sizes.hidden_columns * sizes.compute_dtype.itemsize
        row_bytes += 64 * sizes.label_sets
        columns = 2 * sizes.vocabulary * sizes.wide_bytes
        return sizes.rows * row_bytes + columns + strip_bytes(sizes.device)

    def _write_at_once(
        self,
        dweights: list[Tensor | None],
        dbias: Tensor | None,
        packed: Packed,
        mean: Tensor,
        sums: Tensor,
    ) -> None:
        factors = self.softmax
        M, V = self.sizes.rows, self.sizes.vocabulary
        store = _store(packed, self.sizes, self._chunk_rows)
        lists = _kernel("weight_gradient", "list_tokens")(store, 0, V)
        labels, shares = self.labels.stacked(0, M), torch.stack(self.shares)
        if dbias is not None:
            dropped = torch.mv(mean.t(), sums[:, 0])
            dropped -= _kernel("weight_gradient", "compact_column_sums")(store, lists, factors, V)
            dropped.mul_(self.unit)
            share = torch.where(labels >= 0, shares, 0.0).view(-1)
            dropped.index_put_((labels.clamp(min=0).view(-1),), share, accumulate=True)
            dbias.copy_(dropped)
        if not self.parts:
            return
        targets = _kernel("weight_gradient", "sort_targets")(labels, shares, 0, V)
        tail_rows, first = sums[:, 1:] * -self.unit, 0
        for i in self.parts:
            dweight, hidden = dweights[i], self._all_rows(i)
            if dweight is None:
                continue
            rows = self._scaled_by(factors, hidden)
            width = hidden.shape[1]
            _kernel("weight_gradient", "compact_weight_gradient")(
                dweight, store, lists, rows, self.unit[None], mean,
                tail_rows[:, first : first + width], targets, hidden,
            )  # fmt: skip
            first += width

    def _add_kept(
        self,
        block: Tensor,
        bias_block: Tensor,
        packed: Packed,
        item: int,
        columns: tuple[int, int],
        factors: Tensor,
        rows: tuple[int, int],
    ) -> None:
        store = _store(packed, self.sizes, self._chunk_rows).rows(*rows)
        here, factors = (columns[0], block.shape[0]), factors[slice(*rows)]
        lists = _kernel("weight_gradient", "list_tokens")(store, *here)
        if self.head.bias is not None:
            sums = _kernel("weight_gradient", "compact_column_sums")
            bias_block -= sums(store, lists, factors, here[1])
        if not self.parts:
            return
        if self._segment_rows is None or self._segment_rows[0] != rows:
            self._segment_rows = None
            self._segment_rows = (rows, self._scaled_by(factors, self._rows_of(*rows)))
        add = _kernel("weight_gradient", "compact_weight_gradient_add")
        add(block, store, lists, self._segment_rows[1])

    def _all_rows(self, part: int) -> Tensor:
        """All rows of a part of hidden, in the GEMMs' dtype; a view where nothing moves."""
        rows, M = self.rows, self.sizes.rows
        whole = rows.parts[part]
        if rows.index is None and rows.scored is None and whole.dtype == rows.dtype:
            return whole if whole.stride(1) == 1 else whole.contiguous()
        gathered = whole.new_empty((M, whole.shape[-1]), dtype=rows.dtype)
        for i, j in spans(M, self._strip(gathered)):
            gathered[i:j] = rows.take(i, j, (part,))
        return gathered

    def _scaled_by(self, factors: Tensor, hidden: Tensor) -> Tensor:
        scaled = hidden.new_empty(hidden.shape)
        for i, j in spans(hidden.shape[0], self._strip(hidden)):
            scaled[i:j] = factors[i:j, None] * hidden[i:j]
        return scaled

    def _strip(self, rows: Tensor) -> int:
        """How many rows may be wide at once."""
        return max(1, strip_bytes(rows.device) // (12 * max(1, rows.shape[1])))


def _store(packed: Packed, sizes: Sizes, chunk_rows: int) -> Store:
    chunks = -(-sizes.rows // chunk_rows)
    return segment_store(packed.store, sizes.rows, sizes.vocabulary, chunks)


class Arriving:
    """A small tensor on its way to the host, behind what its device still has to do."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._arrived = tensor, None
        if tensor.device.type == "cuda" and not is_capturing(tensor.device):
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def get(self) -> Tensor:
        """It; no wait where the host has waited for anything later on the stream."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor
