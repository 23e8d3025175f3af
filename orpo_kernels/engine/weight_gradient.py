"""Gradients of the head: dW and db, block by block of the vocabulary, from E kept or recomputed.

    dW_v = sum_t a_t ((1 - p_y) d_y 1[v = y_t] - e^(m - lse) E_tv) h_t

A block of dW is the sum of one GEMM per row chunk, in float32, rounded once. On a CPU, where one
chunk has all rows, its GEMM writes the block of dW itself.
"""

import torch
from torch import Tensor

from orpo_kernels.engine.chunks import (
    Plan,
    Rows,
    Sizes,
    largest_magnitude,
    matmul_into,
    plan_backward,
    plan_direct,
    row_pitch,
    shaped,
    spans,
    tile_of,
)
from orpo_kernels.engine.collect import LARGE, MOST, restore
from orpo_kernels.engine.exact import Coefficients, Head, Labels
from orpo_kernels.engine.tiles import accumulate_, column_sums, softmax_collect_, softmax_grad_


def label_shares(statistics: Tensor, a: Coefficients) -> list[Tensor]:
    """What multiplies h in dW[label], (M,) per label set: `d (a (1 - p) - a_other p)`."""
    _, _, _, first_logp, second_logp, first_slope, second_slope = statistics
    if a.second is None:
        return [-a.first * torch.expm1(first_logp) * first_slope]
    first = -a.first * torch.expm1(first_logp) - a.second * torch.exp(first_logp)
    second = -a.second * torch.expm1(second_logp) - a.first * torch.exp(second_logp)
    return [first * first_slope, second * second_slope]


class WeightGradient:
    """dW and db, one vocabulary block at a time: a block is summed in float32 and rounded once."""

    def __init__(
        self,
        rows: Rows,
        head: Head,
        labels: Labels,
        sizes: Sizes,
        statistics: Tensor,
        a: Coefficients,
    ) -> None:
        self.rows, self.head, self.labels, self.sizes = rows, head, labels, sizes
        self.statistics = statistics
        self.shares = label_shares(statistics, a)
        softmax = a.total * statistics[1]
        largest = softmax.abs().amax()
        if sizes.compute_dtype == torch.float16:
            # It reaches from 6e-8 to 6.5e4: a_t h_t is scaled so that their sums stay below 3.3e4.
            reach = largest_magnitude(rows, sizes.rows).clamp(min=1.0)
            largest = softmax.abs().sum() * reach * (max(1.0, abs(head.logit_scale)) / 2**15)
        self.unit = largest.clamp_(min=torch.finfo(softmax.dtype).tiny)
        self.softmax = softmax / self.unit
        self.parts: tuple[int, ...] = ()
        self.direct: Tensor | None = None
        self._scaled: tuple[tuple[int, int], Tensor] | None = None

    def run(
        self, dweights: list[Tensor | None], dbias: Tensor | None, kept: Tensor | None, budget: int
    ) -> None:
        """Fills the gradients that are not None.

        Args:
            dweights: per weight part (V, H_i), any floating dtype, or None.
            dbias: (V,) or None.
            kept: (M, V) the E kept by the forward, or None: recomputed.
            budget: bytes the workspace may take.
        """
        self.parts = tuple(i for i, dweight in enumerate(dweights) if dweight is not None)
        widths = [self.head.columns.parts[i].shape[1] for i in self.parts]
        sizes, recompute = (self.sizes, budget, sum(widths)), kept is None
        plan = None
        if self._can_be_written(present(dweights)):
            plan = plan_direct(*sizes, recompute=recompute)
        self.direct = None if plan is None else present(dweights)[0]
        plan = plan or plan_backward(*sizes, recompute=recompute)
        buffers = self._buffers(plan, 0 if self.direct is not None else sum(widths), kept)
        for v0, v1 in spans(self.sizes.vocabulary, plan.columns):
            block = self._block(v0, v1, buffers, sum(widths))
            bias_block = buffers["bias"][: v1 - v0].zero_()
            for rows in spans(self.sizes.rows, plan.rows):
                probs = self._probs(rows, (v0, v1), kept, buffers)
                if dbias is not None:
                    bias_block -= column_sums(probs, self.softmax[slice(*rows)])
                self._add(block, probs, buffers["partial"], rows)
            self._write(block, bias_block, (v0, v1), dweights, dbias, plan.rows)

    def _write(
        self,
        block: Tensor,
        bias_block: Tensor,
        columns: tuple[int, int],
        dweights: list[Tensor | None],
        dbias: Tensor | None,
        step: int,
    ) -> None:
        """Adds the labels' entries, `step` rows at a time, and rounds a block into the results."""
        if self.direct is None:
            block.mul_(self.unit)
        bias_block.mul_(self.unit)
        for rows in spans(self.sizes.rows, step):
            self._add_labels(block, bias_block, columns, rows)
        if self.direct is None:
            widths = [each.shape[1] for each in present(dweights)]
            pieces = torch.split(block, widths, 1)
            for dweight, piece in zip(present(dweights), pieces, strict=False):
                dweight[slice(*columns)].copy_(piece)
        if dbias is not None:
            dbias[slice(*columns)].copy_(bias_block)

    def _can_be_written(self, dweights: list[Tensor]) -> bool:
        """Whether a GEMM could write the gradient: one part, in its dtype, on a CPU."""
        dtype, dtypes = self.sizes.compute_dtype, [each.dtype for each in dweights]
        return self.sizes.on_cpu and dtype != torch.float16 and dtypes == [dtype]

    def _block(self, v0: int, v1: int, buffers: dict[str, Tensor], width: int) -> Tensor:
        if self.direct is not None:
            return self.direct[v0:v1]
        return shaped(buffers["block"], v1 - v0, width).zero_()

    def _buffers(self, plan: Plan, width: int, kept: Tensor | None) -> dict[str, Tensor]:
        sizes, new = self.sizes, self.softmax.new_empty
        cells = plan.rows * row_pitch(plan.columns, sizes.device) if kept is None else 0
        tile = new(cells, dtype=sizes.product_dtype)
        partial_cells = plan.columns * width if sizes.sums_apart else 0
        return {
            "tile": tile,
            "narrow": new(cells, dtype=sizes.compute_dtype) if sizes.widens else tile,
            "partial": new(partial_cells, dtype=sizes.product_dtype),
            "block": new(plan.columns * width),
            "bias": new(plan.columns),
        }

    def _probs(
        self,
        rows: tuple[int, int],
        columns: tuple[int, int],
        kept: Tensor | None,
        buffers: dict[str, Tensor],
    ) -> Tensor:
        """E of some rows and columns, kept by the forward or recomputed."""
        (start, stop), (v0, v1) = rows, columns
        if kept is not None:
            return kept[start:stop, v0:v1]
        tile = tile_of(buffers["tile"], stop - start, v1 - v0)
        narrow = tile_of(buffers["narrow"], stop - start, v1 - v0)
        hidden, weight = self.rows.take(start, stop), self.head.columns.block(v0, v1)
        matmul_into(tile, hidden, weight.t())
        arguments = (
            tile, self.head.block_bias(v0, v1), self.labels.stacked(start, stop), v0,
        )  # fmt: skip
        options, reference = (self.head.logit_scale, self.head.softcap), self.statistics[0]
        if self.sizes.refines:
            sums = (reference[start:stop], self.statistics[1, start:stop].reciprocal())
            _, *entries = softmax_collect_(
                *arguments, *sums, None, hidden, weight, LARGE, MOST, *options, False, True
            )
            restore(tile, (entries[0], entries[1], entries[2]))
        else:
            out = None if narrow.dtype == tile.dtype else narrow
            softmax_grad_(*arguments, reference[start:stop], *options, out)
        return narrow

    def _add(self, block: Tensor, probs: Tensor, partial: Tensor, rows: tuple[int, int]) -> None:
        if not self.parts:
            return
        scaled = self._scaled_rows(rows)
        if self.direct is not None:
            matmul_into(block, probs.t(), scaled)
        elif partial.numel() == 0:
            block.addmm_(probs.t(), scaled, alpha=-1.0)
        else:
            product = matmul_into(shaped(partial, *block.shape), probs.t(), scaled)
            accumulate_(block, product, None, -1.0)

    def _scaled_rows(self, rows: tuple[int, int]) -> Tensor:
        """The coefficients times hidden; one chunk of rows is kept for all vocabulary blocks."""
        if self._scaled is None or self._scaled[0] != rows:
            start, stop = rows
            hidden = self.rows.take(start, stop, self.parts)
            factor = self.softmax[start:stop, None]
            if self.direct is not None:
                factor = factor * -self.unit
            self._scaled = (rows, (factor * hidden).to(hidden.dtype))
        return self._scaled[1]

    def _add_labels(
        self, block: Tensor, bias_block: Tensor, columns: tuple[int, int], rows: tuple[int, int]
    ) -> None:
        (v0, v1), (start, stop) = columns, rows
        hidden = self.rows.take(start, stop, self.parts) if self.parts else None
        for labels, shares in zip(self.labels.stacked(start, stop), self.shares, strict=True):
            inside = (labels >= v0) & (labels < v1)
            # On a CPU the few rows with a label here; elsewhere all, the others with 0: no sync.
            here = inside.nonzero()[:, 0] if inside.device.type == "cpu" else slice(None)
            share = torch.where(inside, shares[start:stop], 0.0)[here]
            index = (labels[here] - v0).clamp(0, v1 - v0 - 1)
            _index_add(bias_block, index, share)
            if hidden is not None:
                _index_add(block, index, share[:, None] * hidden[here])


def present(tensors: list[Tensor | None]) -> list[Tensor]:
    """The tensors that are there, in order."""
    return [tensor for tensor in tensors if tensor is not None]


def _index_add(target: Tensor, index: Tensor, values: Tensor) -> None:
    # Deterministic on both: serial on the CPU; sorted, without atomics, on a GPU.
    if target.device.type != "cpu":
        target.index_put_((index,), values, accumulate=True)
    elif target.dtype == values.dtype:
        target.index_add_(0, index, values)
    else:
        touched, place = torch.unique(index, return_inverse=True)  # frequent ones: rounded once
        wide = target[touched].to(values.dtype)
        target[touched] = wide.index_add_(0, place, values).to(target.dtype)
