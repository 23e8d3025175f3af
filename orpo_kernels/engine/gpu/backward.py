"""Gradients of the head on a GPU: vocabulary outermost, all rows in one reduction if they fit.

    for a vocabulary block:         (a cast of it, if the head is of another dtype)
        for a chunk of rows:        (a gather, if not all rows are at hand)
            kept rows:              one row kernel, from E
            the others:             GEMM, one row kernel over the logits
            (a head with a bias)    column sums
            GEMM                    dW of the block, written or added

    dW_v = sum_t P_tv h_t,   P as of `kernels/weight_probs.py`, the labels' entries in it

One chunk of all rows: the GEMM writes dW in its own dtype. Several: it adds in float32, to dW
itself where that is float32, else to one block that is rounded once. float16 is scaled by `unit`.

Rows at hand for every block are worth more than a wider tile. Where they are gathered and the
budget has no room for them they lie in the end of dW, which is written last: its own blocks are
then done chunk by chunk.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from orpo_kernels.engine.gemm import add_matmul_, matmul_into
from orpo_kernels.engine.gpu.parts import (
    BlockViews,
    HeadBlocks,
    Hidden,
    spans,
    tile_pair,
    whole_pieces,
)
from orpo_kernels.engine.gpu.shapes import Sweep
from orpo_kernels.engine.weight_gradient import HeadGradients
from orpo_kernels.kernels import tuning
from orpo_kernels.kernels.coefficients import Slopes, coefficients, unit_of
from orpo_kernels.kernels.column_totals import ColumnTotals
from orpo_kernels.kernels.inputs import Inputs
from orpo_kernels.kernels.take_rows import TakeRows
from orpo_kernels.kernels.weight_probs import WeightProbs


def weight_gradient(
    inputs: Inputs,
    statistics: Tensor,
    slopes: Slopes,
    sweeps: tuple[Sweep, ...],
    kept: Tensor | None,
    out: HeadGradients,
) -> None:
    """Fills the gradients of the head.

    Args:
        inputs: as of the forward.
        statistics: (7, N) of the forward.
        slopes: of the loss.
        sweeps: ranges that cover the vocabulary, in order.
        kept: E of the first rows, as the forward filled it, or None.
        out: to be filled.
    """
    with tuning.guard(statistics.device):
        rows = coefficients(statistics, slopes, inputs.positions, inputs.logit_scale)
        unit = _unit(inputs, rows)
        totals = None
        if out.bias is not None:
            totals = statistics.new_empty((1, out.bias.shape[0]))
        for sweep in sweeps:
            _run(inputs, (rows, unit, totals), sweep, kept, out)
        if out.bias is not None and totals is not None:
            TakeRows(out.bias[None], (totals,), scale=unit)(0, 1)


def _unit(inputs: Inputs, rows: Tensor) -> Tensor | None:
    if inputs.dtype != torch.float16:
        return None
    widens = inputs.wide == torch.float32
    return unit_of(rows[4], None if widens else inputs.hidden[0], inputs.positions)


def _run(
    inputs: Inputs,
    figures: tuple[Tensor, Tensor | None, Tensor | None],
    sweep: Sweep,
    kept: Tensor | None,
    out: HeadGradients,
) -> None:
    rows, unit, totals = figures
    M = inputs.labels.shape[0]
    at_hand = sweep.rows >= M
    memory = _after(out, sweep) if sweep.in_result else None
    hidden = Hidden(inputs, min(M, sweep.rows), memory)
    tile = _Tile(inputs, sweep, rows, unit, kept)
    column_totals = None if totals is None else ColumnTotals(totals, tile.probs)
    parts = list(_parts(inputs, sweep, out, unit, summed=not at_hand))
    x = hidden.take(0, M) if at_hand else None
    for block, columns in enumerate(tile.head.blocks):
        entries = tile.entries(block)
        for start, stop in spans((0, M), sweep.rows):
            h = hidden.take(start, stop) if x is None else x
            tile.fill((start, stop), columns, entries, h)
            if column_totals is not None:
                column_totals(stop - start, *columns, adds=start > 0)
            for part in parts:
                part.add(tile.probs[: stop - start], h, columns, adds=start > 0)
        for part in parts:
            part.finish(columns)


class _Tile:
    """P of some rows and a vocabulary block: from E of the rows that keep it, or from logits."""

    def __init__(
        self, inputs: Inputs, sweep: Sweep, rows: Tensor, unit: Tensor | None, kept: Tensor | None
    ) -> None:
        M = inputs.labels.shape[0]
        self.first = 0 if kept is None else min(M, kept.shape[0])  # rows before it keep E
        self.recomputes = self.first < M
        self.head = HeadBlocks(inputs, sweep.columns, (sweep.first, sweep.last))
        most = min(M, sweep.rows)
        self.logits, self.probs = tile_pair(inputs, most, sweep.columns, apart=False)

        def from_source(source: Tensor, *, kept: bool) -> WeightProbs:
            tensors = (self.probs, source, rows, unit)
            return WeightProbs(inputs, *tensors, columns=sweep.columns, kept=kept)

        self.from_logits = from_source(self.logits, kept=False)
        self.from_kept = None if kept is None else from_source(kept, kept=True)

    def entries(self, block: int) -> BlockViews | None:
        """The block-th block of the head, where any logit is recomputed."""
        return self.head.take(block) if self.recomputes else None

    def fill(
        self, rows: tuple[int, int], columns: tuple[int, int], entries: BlockViews | None, x: Tensor
    ) -> None:
        """P of rows `start` to `stop`, whose hidden states are `x`, at the start of the tile."""
        start, stop = rows
        split = max(start, min(self.first, stop))
        if self.from_kept is not None and split > start:
            self.from_kept((start, split), 0, columns)
        if entries is not None and split < stop:
            here = slice(split - start, stop - start)
            for (c0, c1), (_, transposed) in zip(*entries, strict=True):
                matmul_into(self.logits[here, c0:c1], x[here], transposed)
            self.from_logits((split, stop), split - start, columns)


def _after(out: HeadGradients, sweep: Sweep) -> Tensor:
    """Memory of the part of dW after the range of a sweep, flat bytes."""
    (weight,) = (each for each in out.weights[:1] if each is not None)
    return weight[sweep.last :].view(-1).view(torch.uint8)


class _Part:
    """A part of dW, block by block: written or added to by GEMMs, or rounded from a sum."""

    def __init__(
        self, target: Tensor, columns: slice, block: Tensor | None, partial: Tensor | None,
        unit: Tensor | None,
    ) -> None:  # fmt: skip
        self.target, self.columns, self.block, self.partial = target, columns, block, partial
        self.rounded = None if block is None else TakeRows(target, (block,), scale=unit)

    def add(self, tile: Tensor, x: Tensor, block: tuple[int, int], *, adds: bool) -> None:
        """`dW += P^T x` of a vocabulary block, or where nothing was added yet `dW = P^T x`."""
        v0, v1 = block
        h = x if x.shape[1] == self.target.shape[1] else x[:, self.columns]
        for c0, c1 in whole_pieces(v1 - v0):
            out = self.target[v0 + c0 : v0 + c1] if self.block is None else self.block[c0:c1]
            probs = tile[:, c0:c1].t()
            if self.partial is not None:  # where a GEMM does not write float32
                matmul_into(self.partial[c0:c1], probs, h)
                out.add_(self.partial[c0:c1]) if adds else out.copy_(self.partial[c0:c1])
            elif adds:
                add_matmul_(out, probs, h)
            else:
                matmul_into(out, probs, h)

    def finish(self, block: tuple[int, int]) -> None:
        """Rounds the sum of a block into dW, where there is one."""
        if self.rounded is not None:
            v0, v1 = block
            self.rounded(0, v1 - v0, v0)


def _parts(
    inputs: Inputs, sweep: Sweep, out: HeadGradients, unit: Tensor | None, *, summed: bool
) -> Iterator[_Part]:
    wide, start = inputs.wide, 0
    for target, part in zip(out.weights, inputs.weight, strict=True):
        columns = slice(start, start + part.shape[1])
        start = columns.stop
        if target is None:
            continue
        # What a GEMM can write, and what it can add to without rounding twice.
        written = (torch.float32,) if summed else (wide, inputs.dtype)
        block = partial = None
        if unit is not None or target.dtype not in written or (summed and wide != torch.float32):
            shape = (sweep.columns, part.shape[1])
            block = target.new_empty(shape, dtype=torch.float32 if summed else wide)
            if block.dtype != wide:
                partial = target.new_empty(shape, dtype=wide)
        yield _Part(target, columns, block, partial, unit)
