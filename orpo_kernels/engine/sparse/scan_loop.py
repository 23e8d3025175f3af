"""The sparse forward of a GPU for a head that is not trained: one look at every tile of logits.

    for a chunk of rows:                 (one gather)
        for a vocabulary block:
            GEMM                         logits
            scan                         row sums, live columns, column sums of the others
                                         (of a chunk's first block twice: first for the estimates)
            live columns                 running sums; which row blocks are dense; room in the pool
            pack                         live columns to slots; the others to the tail
            dense rows                   of dense row blocks alone: all entries times the head
        cut, gather, add                 slots of all blocks times their entries of the head
        finish, dropped                  statistics and g in their place, what was dropped

Nothing waits for the device, and nothing is guessed: a row block whose columns have no room, or
that would drop over a fifth of its mass, is done the exact way, tile by tile. Shapes are those of
`engine/gpu/plan.py`: the whole vocabulary in one block, or many.
"""

from torch import Tensor

from orpo_kernels.engine.gemm import matmul_into
from orpo_kernels.engine.gpu.call import inputs_of
from orpo_kernels.engine.gpu.parts import HeadBlocks, Hidden, TileViews, spans
from orpo_kernels.engine.gpu.shapes import pitch
from orpo_kernels.engine.operands import Operands
from orpo_kernels.engine.sparse.tail import Tail
from orpo_kernels.engine.tile_loop import Results
from orpo_kernels.kernels import tuning
from orpo_kernels.kernels.dense_rows import DenseRows
from orpo_kernels.kernels.finish_rows import FinishRows
from orpo_kernels.kernels.gather_slots import GatherSlots
from orpo_kernels.kernels.inputs import Sums, Tiles
from orpo_kernels.kernels.label_terms import label_terms
from orpo_kernels.kernels.live_columns import LiveColumns
from orpo_kernels.kernels.pack_slots import PackSlots
from orpo_kernels.kernels.scan import LOOKED, Scan
from orpo_kernels.kernels.scan_state import scan_state
from orpo_kernels.kernels.segment_store import ScanShape
from orpo_kernels.kernels.tail_rows import DroppedRows, tail_product


def forward(
    operands: Operands, shape: ScanShape, tail: Tail, out: Results
) -> tuple[Tensor, Tensor]:
    """Fills the results, g without its tail, and adds what is dropped to `tail.sums`.

    Args:
        operands: the scored rows.
        shape: of the tiles.
        tail: of these rows.
        out: to be filled; the last row of statistics is `m_t` over the mass beside the labels.

    Returns:
        (1,) int64, how many entries were kept, and (G, H + r) float32, q W.
    """
    inputs = inputs_of(operands)
    with tuning.guard(inputs.labels.device):
        sums = label_terms(inputs)
        hidden, head = Hidden(inputs, shape.rows), HeadBlocks(inputs, shape.columns)
        state = scan_state(inputs, shape, tail.groups, tail.sums, pitch(shape.columns), LOOKED)
        scan, live = Scan(inputs, state, tail.eps), LiveColumns(inputs, state, sums)
        pack = PackSlots(inputs, state)
        dense = [DenseRows(inputs, state, part) for part in range(len(inputs.weight))]
        gather = GatherSlots(inputs, state, len(head.blocks))
        finish = FinishRows(inputs, sums, Sums(state.sums, None), out.statistics, (out.g, out.g_r))
        dropped = DroppedRows(inputs, state, sums, out.statistics[7])
        views = TileViews(Tiles(state.logits, None, shape.columns))
        for rows in spans((0, inputs.labels.shape[0]), shape.rows):
            x = hidden.take(*rows)
            for block, columns in enumerate(head.blocks):
                entries = head.take(block)
                pieces = views.of(rows, entries.edges)
                for (logits, _), (_, transposed) in zip(pieces, entries.operands, strict=True):
                    matmul_into(logits, x, transposed)
                scan(rows, columns)
                live(rows, columns, block)
                pack(rows, columns, block)
                for part in dense:
                    part(rows, columns)
            gather(rows[1] - rows[0])
            finish(*rows, 0, 1)
            dropped(*rows)
        product = tail_product(inputs.weight, tail.sums, inputs.dtype)
        return state.entries.sum(0, keepdim=True), product
