"""The sparse forward of a GPU: one look at every tile of logits.

    for a chunk of rows:                 (one gather)
        for a vocabulary block:
            GEMM                         logits; of the first tile before the rows are counted
            scan                         row sums, live columns, column sums of the others
                                         (of a chunk's first block twice: first for the estimates)
            live columns                 running sums; which row blocks are dense; room in the pool
            pack                         live columns to slots; the others to the tail
            dense rows                   of dense row blocks alone: all entries times the head
        cut, gather, add                 slots of all blocks times their entries of the head
        finish, dropped                  statistics and g in their place, what was dropped
        (a head that trains) keep        slots to the store of the backward

Nothing is guessed: a row block whose columns have no room, or that would drop over a fifth of its
mass, is done the exact way, tile by tile. That is slower than the exact loop: where it is more than
a quarter of the row blocks of the first tile, the call is left to that loop. The host waits for
this tile, a 16th of what might be scored at most, and for nothing else; while a graph is captured
not even for that, and no call is left. Shapes are those of `engine/gpu/plan.py`: the whole
vocabulary in one block, or many.
"""

import functools
from typing import NamedTuple

from torch import Tensor

from orpo_kernels.constants import COMPACT_ROWS
from orpo_kernels.engine.gemm import matmul_into
from orpo_kernels.engine.gpu.call import inputs_of
from orpo_kernels.engine.gpu.parts import HeadBlocks, Hidden, TileViews, spans
from orpo_kernels.engine.gpu.shapes import pitch
from orpo_kernels.engine.host_copy import HostCopy, is_capturing
from orpo_kernels.engine.operands import Operands
from orpo_kernels.engine.sparse.tail import Tail
from orpo_kernels.engine.tile_loop import Results
from orpo_kernels.kernels import tuning
from orpo_kernels.kernels.dense_rows import DenseRows
from orpo_kernels.kernels.finish_rows import FinishRows
from orpo_kernels.kernels.gather_slots import GatherSlots
from orpo_kernels.kernels.inputs import Inputs, Sums, Tiles
from orpo_kernels.kernels.keep_slots import KeepSlots
from orpo_kernels.kernels.label_terms import label_terms
from orpo_kernels.kernels.live_columns import LiveColumns
from orpo_kernels.kernels.pack_slots import PackSlots
from orpo_kernels.kernels.scan import LOOKED, Scan
from orpo_kernels.kernels.scan_state import ScanState, scan_state
from orpo_kernels.kernels.slot_store import ScanShape, SlotStore
from orpo_kernels.kernels.tail_rows import DroppedRows, tail_product

MOST_DENSE = 0.25
"""Of the row blocks of the first tile: with more of them dense the exact loop is faster."""

_FIRST_SHARE = 16  # the first tile, which may be in vain, is at most one in so many logits
_FIRST_ROWS = 256  # or so many rows, a step of them: for fewer a GEMM reads the head as long
_WHOLE_ROWS = 256  # of the largest output tile of a GEMM


def first_rows(candidates: int, vocabulary: int, shape: ScanShape) -> int:
    """Rows of the first tile, whichever of the candidates are scored."""
    share = candidates * vocabulary // (_FIRST_SHARE * shape.columns)
    return min(candidates, shape.rows, max(_FIRST_ROWS, share // _FIRST_ROWS * _FIRST_ROWS))


def chunks(rows: int, first: int, shape: ScanShape) -> list[tuple[int, int]]:
    """(start, stop) of the first chunk, and of equal ones, in whole output tiles of a GEMM."""
    first = min(rows, first)
    count = -(-(rows - first) // shape.rows)
    equal = -(-(rows - first) // max(1, count))
    unit = COMPACT_ROWS if shape.rows % _WHOLE_ROWS or equal <= _WHOLE_ROWS else _WHOLE_ROWS
    return [(0, first), *spans((first, rows), max(1, -(-equal // unit) * unit))]


class _Begun(NamedTuple):
    """What the first product took, and what the others take."""

    shape: ScanShape
    first: int
    hidden: Hidden
    head: HeadBlocks
    views: TileViews
    x: Tensor  # (first, H + r) rows of hidden
    logits: Tensor

    def multiply(self, rows: tuple[int, int], x: Tensor, block: int) -> None:
        """Launches the logits of some rows in a vocabulary block."""
        entries = self.head.take(block)
        pieces = self.views.of(rows, entries.edges)
        for (tile, _), (_, transposed) in zip(pieces, entries.operands, strict=True):
            matmul_into(tile, x, transposed)


class Prepared:
    """The first product, started before the host knows how many candidates are scored."""

    def __init__(self, candidates: Operands, shape: ScanShape) -> None:
        """For tiles of this shape. Launches rows and logits of the first."""
        inputs, memory = inputs_of(candidates), (shape.rows, pitch(shape.columns))
        sizes = candidates.sizes
        first = first_rows(sizes.rows, sizes.vocabulary, shape)
        hidden, head = Hidden(inputs, shape.rows), HeadBlocks(inputs, shape.columns)
        logits = inputs.labels.new_empty(memory, dtype=inputs.wide)
        views = TileViews(Tiles(logits, None, shape.columns))
        with tuning.guard(logits.device):
            x = hidden.take(0, first)
            begun = _Begun(shape, first, hidden, head, views, x, logits)
            begun.multiply((0, first), x, 0)
        self._begun = [begun]

    def hand_over(self) -> _Begun:
        """All of it, once: what takes it frees the memory when it ends."""
        return self._begun.pop()


def forward(
    operands: Operands, prepared: Prepared, tail: Tail, out: Results, store: SlotStore | None = None
) -> tuple[Tensor, Tensor | None] | None:
    """Fills the results, g without its tail, and adds what is dropped to `tail.sums`.

    Args:
        operands: the scored rows.
        prepared: of the candidates among which they are the first.
        tail: of these rows.
        out: to be filled; the last row of statistics is `m_t` over the mass beside the labels.
        store: for the slots of a head that trains, or None.

    Returns:
        (M / 64,) int64, entries kept of every row block, and (G, H + r) float32, q W, where g is
        wanted. None, and nothing is filled but the sums, where the logits are too flat.
    """
    begun = prepared.hand_over()
    shape, logits, head = begun.shape, begun.logits, begun.head
    with tuning.guard(logits.device):
        parts = chunks(operands.sizes.rows, begun.first, shape)
        largest = max(stop - start for start, stop in parts)
        shape = shape._replace(rows=-(-largest // COMPACT_ROWS) * COMPACT_ROWS)
        # Made behind the first product, with which the device is busy meanwhile.
        launches = functools.cache(
            lambda: _Launches.of(
                inputs_of(operands), logits, shape, tail, out, store, len(head.blocks)
            )
        )
        looks = not is_capturing(logits.device)
        for chunk, rows in enumerate(parts):
            x = begun.x[: rows[1]] if chunk == 0 else begun.hidden.take(*rows)
            for block, columns in enumerate(head.blocks):
                if chunk > 0 or block > 0:
                    begun.multiply(rows, x, block)
                on = launches()
                on.scan(rows, columns)
                on.live(rows, columns, block)
                dense_blocks = HostCopy(on.live.dense(rows[1] - rows[0])) if looks else None
                on.pack(rows, columns, block)  # which the device does while the host waits
                if dense_blocks is not None and _too_many(dense_blocks.get()):
                    return None
                looks = False
                for part in on.dense:
                    part(rows, columns)
            on = launches()
            if on.gather is not None:
                on.gather(rows[1] - rows[0])
            on.finish(*rows, 0, 1)
            on.dropped(*rows)
            if on.keep is not None:
                on.keep(*rows, chunk)
        product = None
        if out.wants_g:
            product = tail_product(operands.head.parts, tail.sums, operands.head.dtype)
        return launches().state.entries, product


class _Launches(NamedTuple):
    """The kernels of one call, in the order in which a tile and then a chunk starts them."""

    state: ScanState
    scan: Scan
    live: LiveColumns
    pack: PackSlots
    dense: list[DenseRows]
    gather: GatherSlots | None
    finish: FinishRows
    dropped: DroppedRows
    keep: KeepSlots | None

    @classmethod
    def of(
        cls, inputs: Inputs, logits: Tensor, shape: ScanShape, tail: Tail, out: Results,
        store: SlotStore | None, blocks: int,
    ) -> "_Launches":  # fmt: skip
        """With the state of all rows, and the labels' terms, which are launched."""
        sums = label_terms(inputs)
        state = scan_state(inputs, logits, shape, tail.groups, tail.sums, LOOKED)
        products = range(len(inputs.weight) if out.wants_g else 0)
        total = Sums(state.sums, None) if out.wants_g else None
        return cls(
            state,
            Scan(inputs, state, tail.eps),
            LiveColumns(inputs, state, sums),
            PackSlots(inputs, state),
            [DenseRows(inputs, state, part) for part in products],
            GatherSlots(inputs, state, blocks) if out.wants_g else None,
            FinishRows(inputs, sums, total, out.statistics, (out.g, out.g_r)),
            DroppedRows(inputs, state, sums, out.statistics[7]),
            None if store is None else KeepSlots(state, store, blocks),
        )


def _too_many(dense: Tensor) -> bool:
    return int(dense.sum()) > MOST_DENSE * dense.numel()
