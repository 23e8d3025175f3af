"""The exact strategy: every probability takes part in the gradient, in a fixed workspace.

    E_tv = exp(z_tv - m_t) d_tv  for v not a label,  m_t = max of those z,   d = dz / d(h W^T)
    lse  = log(e^m sum E + e^z_y),    1 - p_y from log-sums, never by subtraction
    g_t  = d_y W[y] - (E W)_t / sum E                            dhidden_t = a_t (1 - p_y) g_t
    dW_v = sum_t a_t ((1 - p_y) d_y 1[v = y_t] - e^(m - lse) E_tv) h_t

Forward: row chunks x vocabulary blocks, the vocabulary inner; m grows and the accumulator of E W is
rescaled, so nothing is (N, V) and no logit is computed twice. g does not depend on the loss (and,
without the factor 1 - p_y, stays of the size of W, inside fp16, for a confident token): a frozen
head is done after the forward (2 passes). A trainable head recomputes the tile in the backward (4),
or keeps E where N V fits the workspace (3). Without a gradient: 1 pass, nothing kept.

Two label sets share the pass. Where they name two different tokens the two entries and their
coefficients are handled apart (`second`); elsewhere they are one label with a_t = a_1t + a_2t.

Rows of `statistics` (7, N): m, e^(m - lse), the mass beside the labels, log-prob of the first label
and of the second, d of the first and of the second.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.engine.chunks import (
    Columns,
    Plan,
    Rows,
    Sizes,
    matmul_into,
    plan_backward,
    row_pitch,
    spans,
)
from orpo_kernels.engine.tiles import (
    accumulate_,
    accumulation_dtype,
    column_sums,
    softcapped,
    softmax_grad_,
    softmax_stats,
)


@dataclass(frozen=True)
class Head:
    """The output projection: entries, bias (V,) and the transform of its logits."""

    columns: Columns
    bias: Tensor | None
    logit_scale: float
    softcap: float | None

    def transform(self, dots: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Label logits z and slopes d of raw dots, both in the dtype of `dots`."""
        if self.bias is not None:
            dots = dots + self.bias.index_select(0, labels.clamp(min=0)).to(dots.dtype)
        z = dots * self.logit_scale
        if self.softcap is None:
            return z, torch.full_like(z, self.logit_scale)
        z, slope = softcapped(z, self.softcap)
        return z, slope * self.logit_scale

    def block_bias(self, start: int, stop: int) -> Tensor | None:
        """Bias of a vocabulary block."""
        return None if self.bias is None else self.bias[start:stop]


class Labels(NamedTuple):
    """Labels of the scored rows, (M,) int64: the first of a row, and a differing second or -1."""

    first: Tensor
    second: Tensor | None

    def take(self, rows: Tensor) -> "Labels":
        """Those rows."""
        return Labels(self.first[rows], None if self.second is None else self.second[rows])

    def stacked(self, start: int, stop: int) -> Tensor:
        """`(K, R)`, as the tile operations take them."""
        sets = (self.first,) if self.second is None else (self.first, self.second)
        return torch.stack([labels[start:stop] for labels in sets])


class Coefficients(NamedTuple):
    """Slope of the loss in each scored row's log-probs, (M,): the first's; the second's, else 0."""

    first: Tensor
    second: Tensor | None

    def take(self, rows: Tensor) -> "Coefficients":
        """Those rows."""
        return Coefficients(self.first[rows], None if self.second is None else self.second[rows])

    @property
    def total(self) -> Tensor:
        """The coefficient of the softmax itself."""
        return self.first if self.second is None else self.first + self.second


class Forward:
    """The forward over the scored rows: statistics, and on request g and the kept tiles."""

    def __init__(
        self, rows: Rows, head: Head, labels: Labels, sizes: Sizes, plan: Plan, *,
        with_gradient: bool, keep: bool,
    ) -> None:  # fmt: skip
        self.rows, self.head, self.labels = rows, head, labels
        self.sizes, self.plan, self.with_gradient = sizes, plan, with_gradient
        self.wide = accumulation_dtype(sizes.compute_dtype)
        new, pitch = labels.first.new_empty, row_pitch(plan.columns, sizes.device)
        cells = plan.rows * (plan.columns if keep else pitch)
        self.tile = new(0 if keep and not sizes.widens else cells, dtype=sizes.product_dtype)
        self.narrow = self.tile
        if sizes.widens and not keep:
            self.narrow = new(cells, dtype=sizes.compute_dtype)
        partial_rows = plan.rows if with_gradient and sizes.sums_apart else 0
        self.partial = new((partial_rows, sizes.hidden_columns), dtype=sizes.product_dtype)

    def chunk(
        self, start: int, stop: int, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Rows `start` to `stop`.

        Args:
            start: first row.
            stop: one past the last.
            kept: (R, V) in the GEMMs' dtype; receives E when given (the plan has one block then).

        Returns:
            statistics (7, R), and g (R, H) or None.
        """
        hidden, labels = self.rows.take(start, stop), self.labels.stacked(start, stop)
        row_max = hidden.new_full((stop - start,), torch.finfo(self.wide).min, dtype=self.wide)
        sum_exp = torch.zeros_like(row_max)
        accumulator = None
        if self.with_gradient:
            accumulator = torch.zeros_like(hidden, dtype=self.wide)
        for v0, v1 in spans(self.sizes.vocabulary, self.plan.columns):
            weight, bias = self.head.columns.block(v0, v1), self.head.block_bias(v0, v1)
            tile, narrow = self._tiles(stop - start, v1 - v0, kept)
            matmul_into(tile, hidden, weight.t())
            options = (self.head.logit_scale, self.head.softcap)
            block_max, block_sum = softmax_stats(tile, bias, labels, v0, *options)
            new_max = torch.maximum(row_max, block_max)
            rescale = torch.exp(row_max - new_max)
            sum_exp = sum_exp * rescale + block_sum * torch.exp(block_max - new_max)
            row_max = new_max
            if accumulator is not None or kept is not None:
                out = None if narrow.dtype == tile.dtype else narrow
                softmax_grad_(tile, bias, labels, v0, row_max, *options, out)
            if accumulator is not None:
                self._accumulate(accumulator, rescale if v0 > 0 else None, narrow, weight)
        return self._finish(hidden, labels, row_max, sum_exp, accumulator)

    def _tiles(self, rows: int, columns: int, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Where the logits go, and where E goes: the same memory when the dtypes agree."""
        narrow = _tile(self.narrow, rows, columns) if kept is None else kept
        if not self.sizes.widens:
            return narrow, narrow
        # Rows of both start alike: the kept E is (N, V) without gaps.
        shape = _tile if kept is None else _shaped
        return shape(self.tile, rows, columns), narrow

    def _accumulate(
        self, accumulator: Tensor, rescale: Tensor | None, probs: Tensor, weight: Tensor
    ) -> None:
        if self.partial.shape[0] > 0:
            product = matmul_into(self.partial[: probs.shape[0]], probs, weight)
            accumulate_(accumulator, product, rescale)
            return
        if rescale is not None:
            accumulator.mul_(rescale[:, None])
        accumulator.addmm_(probs, weight)

    def _finish(
        self,
        hidden: Tensor,
        labels: Tensor,
        row_max: Tensor,
        sum_exp: Tensor,
        accumulator: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Adds the label columns, from float32 dots: 1 - p_y = sigmoid(log of the rest - z_y)."""
        label_rows = self.head.columns.rows(labels[0], self.wide)
        z_first, slope = self.head.transform(_dots(hidden, label_rows), labels[0])
        # Relative to m from here on: m + log(sum) would round away the digits of the difference.
        row_max = torch.where(sum_exp > 0, row_max, z_first)  # nothing but the label: m is not one
        rest, first = torch.log(sum_exp), z_first - row_max
        beside_first, distinct = rest, None
        second_logp = second_slope = torch.zeros_like(rest)
        total = sum_exp + torch.exp(first)
        if self.labels.second is not None:
            distinct = labels[1] >= 0
            dots = _dots(hidden, self.head.columns.rows(labels[1], self.wide))
            z_second, second_slope = self.head.transform(dots, labels[1])
            second = z_second - row_max
            beside_first = torch.where(distinct, torch.logaddexp(rest, second), rest)
            second_logp = F.logsigmoid(second - torch.logaddexp(rest, first))
            second_logp = torch.where(distinct, second_logp, 0.0)
            total = torch.where(distinct, total + torch.exp(second), total)
        first_logp = F.logsigmoid(first - beside_first)
        if accumulator is not None:
            accumulator.mul_(-torch.where(sum_exp > 0, 1.0 / sum_exp, 0.0)[:, None])
            share = slope if distinct is None else slope.masked_fill(distinct, 0.0)
            accumulator.addcmul_(label_rows, share[:, None])
        per_row = (row_max, 1.0 / total, sum_exp / total, first_logp, second_logp)
        return torch.stack((*per_row, slope, second_slope)), accumulator


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
        # fp16 reaches from 6e-8 to 6.5e4: a_t h_t is scaled by the largest coefficient.
        self.unit = softmax.abs().amax().clamp_(min=torch.finfo(softmax.dtype).tiny)
        self.softmax = softmax / self.unit
        self.parts: tuple[int, ...] = ()
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
        plan = plan_backward(self.sizes, budget, sum(widths), recompute=kept is None)
        buffers = self._buffers(plan, sum(widths), kept)
        for v0, v1 in spans(self.sizes.vocabulary, plan.columns):
            block = _shaped(buffers["block"], v1 - v0, sum(widths)).zero_()
            bias_block = buffers["bias"][: v1 - v0].zero_()
            for start, stop in spans(self.sizes.rows, plan.rows):
                if kept is None:
                    probs = self._recompute((start, stop), (v0, v1), buffers)
                else:
                    probs = kept[start:stop, v0:v1]
                if dbias is not None:
                    bias_block -= column_sums(probs, self.softmax[start:stop])
                if self.parts:
                    self._add(block, probs, buffers["partial"], start, stop)
            block.mul_(self.unit)
            bias_block.mul_(self.unit)
            for start, stop in spans(self.sizes.rows, plan.rows):
                self._add_labels(block, bias_block, (v0, v1), (start, stop))
            offset = 0
            for dweight, width in zip(present(dweights), widths, strict=True):
                dweight[v0:v1].copy_(block[:, offset : offset + width])
                offset += width
            if dbias is not None:
                dbias[v0:v1].copy_(bias_block)

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

    def _recompute(
        self, span: tuple[int, int], block: tuple[int, int], buffers: dict[str, Tensor]
    ) -> Tensor:
        (start, stop), (v0, v1) = span, block
        tile = _tile(buffers["tile"], stop - start, v1 - v0)
        narrow = _tile(buffers["narrow"], stop - start, v1 - v0)
        matmul_into(tile, self.rows.take(start, stop), self.head.columns.block(v0, v1).t())
        softmax_grad_(
            tile, self.head.block_bias(v0, v1), self.labels.stacked(start, stop), v0,
            self.statistics[0, start:stop], self.head.logit_scale, self.head.softcap,
            None if narrow.dtype == tile.dtype else narrow,
        )  # fmt: skip
        return narrow

    def _add(self, block: Tensor, probs: Tensor, partial: Tensor, start: int, stop: int) -> None:
        scaled = self._scaled_rows(start, stop)
        if partial.numel() == 0:
            block.addmm_(probs.t(), scaled, alpha=-1.0)
        else:
            product = matmul_into(_shaped(partial, *block.shape), probs.t(), scaled)
            accumulate_(block, product, None, -1.0)

    def _scaled_rows(self, start: int, stop: int) -> Tensor:
        """The coefficients times hidden; one chunk of rows is kept for all vocabulary blocks."""
        if self._scaled is None or self._scaled[0] != (start, stop):
            hidden = self.rows.take(start, stop, self.parts)
            scaled = (self.softmax[start:stop, None] * hidden).to(self.sizes.compute_dtype)
            self._scaled = ((start, stop), scaled)
        return self._scaled[1]

    def _add_labels(
        self, block: Tensor, bias_block: Tensor, columns: tuple[int, int], span: tuple[int, int]
    ) -> None:
        (v0, v1), (start, stop) = columns, span
        hidden = self.rows.take(start, stop, self.parts) if self.parts else None
        for labels, shares in zip(self.labels.stacked(start, stop), self.shares, strict=True):
            inside = (labels >= v0) & (labels < v1)
            share = torch.where(inside, shares[start:stop], 0.0)
            index = (labels - v0).clamp(0, v1 - v0 - 1)
            _index_add(bias_block, index, share, inside)
            if hidden is not None:
                _index_add(block, index, share[:, None] * hidden, inside)


def present(tensors: list[Tensor | None]) -> list[Tensor]:
    """The tensors that are there, in order."""
    return [tensor for tensor in tensors if tensor is not None]


def _index_add(target: Tensor, index: Tensor, values: Tensor, inside: Tensor) -> None:
    # Deterministic on both: serial on the CPU; sorted, without atomics, on a GPU (and without the
    # sync that choosing the rows would be: the others add 0).
    if target.device.type == "cpu":
        rows = inside.nonzero()[:, 0]
        target.index_add_(0, index[rows], values[rows])
    else:
        target.index_put_((index,), values, accumulate=True)


def _dots(hidden: Tensor, label_rows: Tensor) -> Tensor:
    return (hidden.to(label_rows.dtype) * label_rows).sum(1)


def _tile(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return _shaped(buffer, rows, row_pitch(columns, buffer.device))[:, :columns]


def _shaped(buffer: Tensor, rows: int, columns: int) -> Tensor:
    return buffer[: rows * columns].view(rows, columns)
