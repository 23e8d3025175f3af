"""The exact forward on a GPU: few launches, each started cheaply, in memory taken once a call.

    for a group of rows:            one gather
        for a vocabulary block:     (a cast of it, if the head is of another dtype)
            for a tile:             GEMM, one row kernel, GEMM
        finish                      statistics and g, written in their place

The formulae are those of `tile_loop.py`; logits and slopes of all labels come from one launch.
What row kernels need is made ready behind the first product: until then the device may be idle.

Two kinds of tile. *Blocks* of at most 8,192 columns, whose rows are held in registers and read once
(`kernels/softmax_block.py`): products are summed in the epilogue of the GEMM, relative to a maximum
that seldom moves, and P takes the place of the float32 logits. *The whole vocabulary*
(`kernels/softmax_rows.py`): one product per group, no sum. A group has as many rows as a tile, or
more where a block of the head is a copy that several tiles should share.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.engine.gemm import add_matmul_, matmul_into
from orpo_kernels.engine.gpu import folded
from orpo_kernels.engine.gpu.parts import (
    BlockViews,
    HeadBlocks,
    Hidden,
    TileViews,
    spans,
    sums_of,
    tile_pair,
)
from orpo_kernels.engine.gpu.plan import ForwardPlan
from orpo_kernels.engine.gpu.shapes import MOST_HELD, Shape
from orpo_kernels.engine.tile_loop import Results
from orpo_kernels.kernels import tuning
from orpo_kernels.kernels.finish_rows import FinishRows
from orpo_kernels.kernels.inputs import Inputs, Sums, Tiles
from orpo_kernels.kernels.label_terms import label_terms
from orpo_kernels.kernels.softmax_block import SoftmaxBlock
from orpo_kernels.kernels.softmax_rows import SoftmaxRows

_LIMIT = 8.0  # nats: P <= 2981
_LIMIT_FLOAT16 = 3.0  # so that P times a slope of up to 3,000 stays finite


def forward(inputs: Inputs, plan: ForwardPlan, kept: Tensor | None, out: Results) -> None:
    """Fills the results, and `kept` (M', V) with E of the first M' rows.

    Args:
        inputs: the scored rows, the head and the labels.
        plan: shapes of the tiles of rows that keep E, and of the others'.
        kept: in the GEMMs' dtype, its rows padded to whole vectors; None for none.
        out: to be filled.
    """
    M, first = inputs.labels.shape[0], 0
    state = functools.cache(lambda: label_terms(inputs))
    with tuning.guard(inputs.labels.device):
        if kept is not None and plan.kept_shape is not None:
            first = min(M, kept.shape[0])
            _run(inputs, plan.kept_shape, out, state, (0, first), kept)
        if first == M:
            return
        if plan.folded:
            folded.forward(inputs, plan.shape, out.statistics, state, (first, M))
        else:
            _run(inputs, plan.shape, out, state, (first, M), None)


def _run(
    inputs: Inputs,
    shape: Shape,
    out: Results,
    state: Callable[[], Tensor],
    rows: tuple[int, int],
    kept: Tensor | None,
) -> None:
    with_g, count = out.g.shape[0] > 0, rows[1] - rows[0]
    shape = Shape(min(shape.group, count), min(shape.rows, count), shape.columns)
    tiles = _tiles(inputs, shape, kept, stores=with_g or kept is not None)
    sums = sums_of(inputs, shape.group) if with_g else None
    hidden, head = Hidden(inputs, shape.group), HeadBlocks(inputs, shape.columns)
    apart = sums is not None and sums.partial is not None
    views = TileViews(tiles)
    row_kernels = functools.cache(lambda: _RowKernels.of(inputs, state(), tiles, sums, out))
    for start, stop in spans(rows, shape.group):
        lanes = _lanes(hidden.take(start, stop), sums, (start, stop), shape.rows)
        for block, columns in enumerate(head.blocks):
            entries = head.take(block)
            for lane in lanes:
                pieces = views.of(lane.rows, entries.edges)
                for (logits, _), (_, transposed) in zip(pieces, entries.operands, strict=True):
                    matmul_into(logits, lane.hidden, transposed)
                row_kernels().softmax(lane.rows, lane.first, columns, block)
                if lane.sums is not None:
                    _sum(lane.sums, block == 0, pieces, entries)
        row_kernels().finish(start, stop, 0, len(head.blocks) - apart)


class _RowKernels(NamedTuple):
    """What is launched beside the GEMMs: for a tile, and to end a group of rows."""

    softmax: SoftmaxBlock | SoftmaxRows
    finish: FinishRows

    @classmethod
    def of(
        cls, inputs: Inputs, state: Tensor, tiles: Tiles, sums: Sums | None, out: Results
    ) -> "_RowKernels":
        """Of one call."""
        return cls(
            _softmax(inputs, state, tiles, sums),
            FinishRows(inputs, state, sums, out.statistics, (out.g, out.g_r)),
        )


class _Lane(NamedTuple):
    """Rows of a group that share a tile: their rows, the first of them in the group, operands."""

    rows: tuple[int, int]
    first: int
    hidden: Tensor
    sums: Sums | None


def _lanes(hidden: Tensor, sums: Sums | None, group: tuple[int, int], rows: int) -> list[_Lane]:
    lanes = []
    for i, j in spans(group, rows):
        here = slice(i - group[0], j - group[0])
        its = None
        if sums is not None:
            partial = None if sums.partial is None else sums.partial[here]
            its = Sums(sums.total[here], partial)
        lanes.append(_Lane((i, j), here.start, hidden[here], its))
    return lanes


def _sum(
    sums: Sums, first: bool, pieces: tuple[tuple[Tensor, Tensor], ...], entries: BlockViews
) -> None:
    """Adds P W of a tile, or begins with it; where it is summed apart its last product begins."""
    out = sums.total if sums.partial is None else sums.partial
    begins = first or sums.partial is not None
    for (_, probs), (w, _) in zip(pieces, entries.operands, strict=True):
        if begins:
            matmul_into(out, probs, w)
        else:
            add_matmul_(out, probs, w)
        begins = False


def _tiles(inputs: Inputs, shape: Shape, kept: Tensor | None, *, stores: bool) -> Tiles:
    held = shape.columns <= MOST_HELD
    if kept is not None and kept.dtype == inputs.wide:
        return Tiles(kept, kept, shape.columns, logits_of_all_rows=True, probs_of_all_rows=True)
    apart = stores and not held and kept is None
    logits, probs = tile_pair(inputs, shape.rows, shape.columns, apart=apart)
    if kept is not None:
        return Tiles(logits, kept, shape.columns, probs_of_all_rows=True)
    return Tiles(logits, probs if stores else None, shape.columns)


def _softmax(
    inputs: Inputs, state: Tensor, tiles: Tiles, sums: Sums | None
) -> SoftmaxBlock | SoftmaxRows:
    """The row kernel of the tiles."""
    limit = _LIMIT_FLOAT16 if inputs.dtype == torch.float16 else _LIMIT
    if tiles.columns <= MOST_HELD:
        return SoftmaxBlock(inputs, state, tiles, sums, limit)
    in_place = tiles.probs is not None and tiles.probs.dtype == tiles.logits.dtype
    return SoftmaxRows(inputs, state, tiles, limit, one_look=not in_place)
