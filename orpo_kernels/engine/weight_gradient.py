"""Gradients of the head: dW and db, block by block of the vocabulary, from E kept or recomputed.

    dW_v = sum_t a_t ((1 - p_y) d_y 1[v = y_t] - e^(m - lse) E_tv) h_t

A block of dW is the sum of one GEMM per row chunk, in float32, rounded once. On a CPU, where one
chunk has all rows, its GEMM writes the block of dW itself.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.constants import LARGE, MOST_LARGE
from orpo_kernels.engine.budget import Plan, plan_backward, plan_direct, spans
from orpo_kernels.engine.gemm import matmul_into, tile_of
from orpo_kernels.engine.operands import Coefficients, Operands, Statistics
from orpo_kernels.engine.tiles import accumulate_, column_sums, softmax_collect_, softmax_grad_
from orpo_kernels.engine.tiles.collect import Entries, restore_
from orpo_kernels.engine.tiles.plain import add_at_

Span = tuple[int, int]


class HeadGradients(NamedTuple):
    """Gradients of the head, to be filled; None for what is not wanted."""

    weights: tuple[Tensor | None, ...]  # by part of the head, (V, H_i), any floating dtype
    bias: Tensor | None  # (V,)

    @property
    def parts(self) -> tuple[int, ...]:
        """The parts of the weight that are wanted."""
        return tuple(i for i, each in enumerate(self.weights) if each is not None)

    @property
    def wanted(self) -> list[Tensor]:
        """Their gradients."""
        return [each for each in self.weights if each is not None]

    @property
    def widths(self) -> list[int]:
        """Their columns."""
        return [each.shape[1] for each in self.wanted]


class Factors(NamedTuple):
    """What multiplies the rows of hidden states, (M,) each."""

    shares: list[Tensor]  # of a label's entry, by label set
    softmax: Tensor  # a e^(m - lse) / unit, of E
    unit: Tensor  # 0-dim: keeps the products inside the dtype of the GEMMs' operands

    @classmethod
    def of(cls, operands: Operands, statistics: Statistics, a: Coefficients) -> "Factors":
        """From the statistics and the coefficients of the scored rows."""
        rows, head, _, sizes, _, _ = operands
        softmax = a.total * statistics.scale
        largest = softmax.abs().amax()
        if sizes.compute_dtype == torch.float16:
            # It reaches from 6e-8 to 6.5e4: a_t h_t is scaled so that their sums stay below 3.3e4.
            reach = rows.largest_magnitude(sizes.rows).clamp(min=1.0)
            scale = max(1.0, abs(head.transform.scale)) / 2**15
            largest = softmax.abs().sum() * reach * scale
        unit = largest.clamp_(min=torch.finfo(softmax.dtype).tiny)
        return cls(statistics.label_shares(a), softmax / unit, unit)


def weight_gradient(
    operands: Operands,
    statistics: Statistics,
    a: Coefficients,
    kept: Tensor | None,
    out: HeadGradients,
    budget: int,
) -> None:
    """Fills the gradients of the head.

    Args:
        operands: the scored rows.
        statistics: of them, (M,) each.
        a: their coefficients.
        kept: (M, V) the E kept by the forward, or None: recomputed.
        out: to be filled.
        budget: bytes the workspace may take.
    """
    sizes, recompute = operands.sizes, kept is None
    shape = (sizes, budget, sum(out.widths))
    plan = plan_direct(*shape, recompute=recompute) if can_be_written(operands, out) else None
    direct = out.wanted[0] if plan is not None else None
    plan = plan or plan_backward(*shape, recompute=recompute)
    work = Work(operands, statistics, Factors.of(operands, statistics, a), out)
    work.allocate(plan, tiles=recompute, block=direct is None)
    for columns in spans(sizes.vocabulary, plan.columns):
        block, bias_block = work.block(columns, direct)
        for rows in spans(sizes.rows, plan.rows):
            if kept is None:
                probs = work.recomputed(rows, columns)
            else:
                probs = kept[slice(*rows), slice(*columns)]
            work.add(block, bias_block, probs, rows, written=direct is not None)
        work.write(block, bias_block, columns, plan.rows, written=direct is not None)


def can_be_written(operands: Operands, out: HeadGradients) -> bool:
    """Whether a GEMM could write the gradient: one part, in its dtype, on a CPU."""
    dtype, dtypes = operands.sizes.compute_dtype, [each.dtype for each in out.wanted]
    return operands.sizes.on_cpu and dtype != torch.float16 and dtypes == [dtype]


class Work:
    """Sums one block of dW and db after the other, in memory that is taken once."""

    def __init__(
        self, operands: Operands, statistics: Statistics, factors: Factors, out: HeadGradients
    ) -> None:
        self.operands, self.statistics, self.factors, self.out = operands, statistics, factors, out
        self._last: tuple[Span, Tensor] | None = None

    def allocate(self, plan: Plan, *, tiles: bool, block: bool) -> None:
        """Takes the memory: a tile to recompute logits in, a block, and a product added to it."""
        sizes, new = self.operands.sizes, self.factors.softmax.new_empty
        width = sum(self.out.widths) if block else 0
        cells = plan.rows * sizes.pitch(plan.columns) if tiles else 0
        self._tile = new(cells, dtype=sizes.product_dtype)
        self._narrow = new(cells, dtype=sizes.compute_dtype) if sizes.widens else self._tile
        partial_cells = plan.columns * width if sizes.sums_apart else 0
        self._partial = new(partial_cells, dtype=sizes.product_dtype)
        self._block, self._bias = new(plan.columns * width), new(plan.columns)

    def block(self, columns: Span, direct: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The blocks of dW (C, H) and db (C,) to be summed: zeros, but for what a GEMM writes."""
        bias_block = self.bias_block(columns).zero_()
        if direct is not None:
            return direct[slice(*columns)], bias_block
        return self.memory_of(columns).zero_(), bias_block

    def memory_of(self, columns: Span) -> Tensor:
        """The block of dW, with whatever it holds."""
        width = sum(self.out.widths)
        return tile_of(self._block, columns[1] - columns[0], width, width)

    def bias_block(self, columns: Span) -> Tensor:
        """The block of db, with whatever it holds."""
        return self._bias[: columns[1] - columns[0]]

    def recomputed(self, rows: Span, columns: Span) -> Tensor:
        """E of some rows and columns, from their logits."""
        (start, stop), (v0, v1) = rows, columns
        operands, reference = self.operands, self.statistics.reference[start:stop]
        head, sizes = operands.head, operands.sizes
        tile, narrow = (
            tile_of(each, stop - start, v1 - v0, sizes.pitch(v1 - v0))
            for each in (self._tile, self._narrow)
        )
        hidden, weight = operands.rows.take(start, stop), head.block(v0, v1)
        matmul_into(tile, hidden, weight.t())
        arguments = (tile, head.block_bias(v0, v1), operands.labels.stacked(start, stop), v0)
        if not sizes.refines:
            out = None if narrow.dtype == tile.dtype else narrow
            softmax_grad_(*arguments, reference, *head.transform, out)
            return narrow
        sums = (reference, self.statistics.scale[start:stop].reciprocal())
        _, *entries = softmax_collect_(
            *arguments, *sums, None, hidden, weight, LARGE, MOST_LARGE, *head.transform, False, True
        )
        restore_(tile, Entries(*entries))
        return narrow

    def add(
        self, block: Tensor, bias_block: Tensor, probs: Tensor, rows: Span, *, written: bool = False
    ) -> None:
        """Subtracts `probs^T (softmax * hidden)`; with `written` the block becomes just that."""
        if self.out.bias is not None:
            bias_block -= column_sums(probs, self.factors.softmax[slice(*rows)])
        if not self.out.parts:
            return
        scaled = self._scaled_rows(rows, -self.factors.unit if written else None)
        if written:
            matmul_into(block, probs.t(), scaled)
        elif self._partial.numel() == 0:
            block.addmm_(probs.t(), scaled, alpha=-1.0)
        else:
            product = tile_of(self._partial, block.shape[0], block.shape[1], block.shape[1])
            accumulate_(block, matmul_into(product, probs.t(), scaled), None, -1.0)

    def write(
        self, block: Tensor, bias_block: Tensor, columns: Span, step: int, *, written: bool = False
    ) -> None:
        """Adds the labels' entries, `step` rows at a time, and rounds a block into the results."""
        if not written:
            block.mul_(self.factors.unit)
        bias_block.mul_(self.factors.unit)
        for rows in spans(self.operands.sizes.rows, step):
            self._add_labels(block, bias_block, columns, rows)
        if not written and self.out.parts:
            pieces = torch.split(block, self.out.widths, 1)
            for dweight, piece in zip(self.out.wanted, pieces, strict=True):
                dweight[slice(*columns)].copy_(piece)
        if self.out.bias is not None:
            self.out.bias[slice(*columns)].copy_(bias_block)

    def _scaled_rows(self, rows: Span, unit: Tensor | None) -> Tensor:
        """The factors times hidden; one chunk of rows is kept for all vocabulary blocks."""
        if self._last is None or self._last[0] != rows:
            hidden = self.operands.rows.take(*rows, self.out.parts)
            factor = self.factors.softmax[slice(*rows), None]
            if unit is not None:
                factor = factor * unit
            self._last = (rows, (factor * hidden).to(hidden.dtype))
        return self._last[1]

    def _add_labels(self, block: Tensor, bias_block: Tensor, columns: Span, rows: Span) -> None:
        (v0, v1), (start, stop) = columns, rows
        operands, parts = self.operands, self.out.parts
        hidden = operands.rows.take(start, stop, parts) if parts else None
        all_labels = operands.labels.stacked(start, stop)
        for labels, shares in zip(all_labels, self.factors.shares, strict=True):
            inside = (labels >= v0) & (labels < v1)
            # On a CPU the few rows with a label here; elsewhere all, the others with 0: no sync.
            here = inside.nonzero()[:, 0] if inside.device.type == "cpu" else slice(None)
            share = torch.where(inside, shares[start:stop], 0.0)[here]
            index = (labels[here] - v0).clamp(0, v1 - v0 - 1)
            add_at_(bias_block, index, share)
            if hidden is not None:
                add_at_(block, index, share[:, None] * hidden[here])
