"""The exact strategy: every probability takes part in the gradient, in a fixed workspace.

    E_tv = exp(z_tv - m_t) d_tv  for v not a label,  m_t = max of those z,   d = dz / d(h W^T)
    lse  = log(e^m sum E + e^z_y),    1 - p_y from log-sums, never by subtraction
    g_t  = d_y W[y] - (E W)_t / sum E                            dhidden_t = a_t (1 - p_y) g_t
    dW_v: `engine/weight_gradient.py`

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

import math
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
    row_pitch,
    shaped,
    spans,
    tile_of,
)
from orpo_kernels.engine.collect import LARGE, MOST, Entries, restore
from orpo_kernels.engine.tiles import (
    accumulate_,
    accumulation_dtype,
    csr_matmul_,
    softmax_collect_,
    softmax_grad_,
    softmax_stats,
    transformed,
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
        index = labels.clamp(min=0)
        return transformed(dots, self.bias, index, self.logit_scale, self.softcap)

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


Arguments = tuple[Tensor, Tensor | None, Tensor, int]  # tile, bias, labels and first column


class Forward:
    """The forward over the scored rows: statistics, and on request g and the kept tiles."""

    def __init__(
        self, rows: Rows, head: Head, labels: Labels, sizes: Sizes, plan: Plan, *,
        with_gradient: bool, keep: bool,
    ) -> None:  # fmt: skip
        self.rows, self.head, self.labels = rows, head, labels
        self.sizes, self.plan, self.with_gradient = sizes, plan, with_gradient
        self.stores = with_gradient or keep
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
        label_terms = self._label_terms(hidden, labels)
        row_max = hidden.new_full((stop - start,), torch.finfo(self.wide).min, dtype=self.wide)
        sum_exp = torch.zeros_like(row_max)
        accumulator = None
        if self.with_gradient:
            accumulator = torch.zeros_like(hidden, dtype=self.wide)
        for v0, v1 in spans(self.sizes.vocabulary, self.plan.columns):
            weight = self.head.columns.block(v0, v1)
            tile, narrow = self._tiles(stop - start, v1 - v0, kept)
            matmul_into(tile, hidden, weight.t())
            arguments = (tile, self.head.block_bias(v0, v1), labels, v0)
            sums, operands = (row_max, sum_exp), (hidden, weight)
            _, entries = self._add_tile(
                arguments, sums, label_terms.z, operands, narrow, accumulator
            )
            if kept is not None and entries is not None:
                restore(narrow, entries)
        return self._finish(label_terms, row_max, sum_exp, accumulator)

    def _add_tile(
        self, arguments: Arguments, sums: tuple[Tensor, Tensor], others: Tensor,
        operands: tuple[Tensor, Tensor], narrow: Tensor, accumulator: Tensor | None,
    ) -> tuple[Tensor, Entries | None]:  # fmt: skip
        """Takes a tile in; what all before it was rescaled by, and its entries that are apart."""
        entries: Entries | None = None
        if self.sizes.on_cpu:
            rescale, entries = self._collect(arguments, sums, others, *operands)
        else:
            rescale = self._separate(arguments, sums, narrow)
        if accumulator is not None:
            weight = operands[1]
            self._accumulate(accumulator, rescale if arguments[3] > 0 else None, narrow, weight)
            if entries is not None:
                csr_matmul_(accumulator, *entries, weight)
        return rescale, entries

    def _collect(
        self, arguments: Arguments, sums: tuple[Tensor, Tensor], others: Tensor, hidden: Tensor,
        weight: Tensor,
    ) -> tuple[Tensor, Entries | None]:  # fmt: skip
        """One look at the tile; where a 16-bit GEMM rounded it, the large entries apart."""
        refines = self.sizes.refines
        inputs = (hidden, weight) if refines else (None, None)
        options = (LARGE if refines else math.inf, MOST, self.head.logit_scale, self.head.softcap)
        rescale, *entries = softmax_collect_(
            *arguments, *sums, others, *inputs, *options, True, self.stores
        )
        return rescale, (entries[0], entries[1], entries[2]) if refines else None

    def _separate(
        self, arguments: Arguments, sums: tuple[Tensor, Tensor], narrow: Tensor
    ) -> Tensor:
        """Two looks: on a GPU a row is split over programs, which meet in between."""
        (row_max, sum_exp), options = sums, (self.head.logit_scale, self.head.softcap)
        block_max, block_sum, _ = softmax_stats(*arguments, *options)
        new_max = torch.maximum(row_max, block_max)
        rescale = torch.exp(row_max - new_max)
        sum_exp.mul_(rescale).add_(block_sum * torch.exp(block_max - new_max))
        row_max.copy_(new_max)
        if self.stores:
            out = None if narrow.dtype == arguments[0].dtype else narrow
            softmax_grad_(*arguments, row_max, *options, out)
        return rescale

    def _tiles(self, rows: int, columns: int, kept: Tensor | None) -> tuple[Tensor, Tensor]:
        """Where the logits go, and where E goes: the same memory when the dtypes agree."""
        narrow = tile_of(self.narrow, rows, columns) if kept is None else kept
        if not self.sizes.widens:
            return narrow, narrow
        # Rows of both start alike: the kept E is (N, V) without gaps.
        shape = tile_of if kept is None else shaped
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

    def _label_terms(self, hidden: Tensor, labels: Tensor) -> "LabelTerms":
        """Label logits from float32 dots of the operands: a confident token loses no digits."""
        rows = self.head.columns.rows(labels[0], self.wide)
        dots = [_dots(hidden, rows)]
        if self.labels.second is not None:
            dots.append(_dots(hidden, self.head.columns.rows(labels[1], self.wide)))
        return self._terms(rows, dots, labels)

    def _terms(self, rows: Tensor, dots: list[Tensor], labels: Tensor) -> "LabelTerms":
        terms = LabelTerms(rows, *self.head.transform(dots[0], labels[0]))
        if self.labels.second is None:
            return terms
        second, second_slope = self.head.transform(dots[1], labels[1])
        return terms._replace(second=(second, second_slope, labels[1] >= 0))

    def _finish(
        self,
        label: "LabelTerms",
        row_max: Tensor,
        sum_exp: Tensor,
        accumulator: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Adds the label columns: 1 - p_y = sigmoid(log of the rest - z_y)."""
        # Relative to m from here on: m + log(sum) would round away the digits of the difference.
        row_max = torch.where(sum_exp > 0, row_max, label.z)  # nothing but the label: m is not one
        rest, first = torch.log(sum_exp), label.z - row_max
        beside_first, share = rest, label.slope
        second_logp = second_slope = torch.zeros_like(rest)
        total = sum_exp + torch.exp(first)
        if label.second is not None:
            second, second_slope, distinct = label.second
            second = second - row_max
            beside_first = torch.where(distinct, torch.logaddexp(rest, second), rest)
            second_logp = F.logsigmoid(second - torch.logaddexp(rest, first))
            second_logp = torch.where(distinct, second_logp, 0.0)
            total = torch.where(distinct, total + torch.exp(second), total)
            share = share.masked_fill(distinct, 0.0)
        first_logp = F.logsigmoid(first - beside_first)
        if accumulator is not None:
            accumulator.mul_(-torch.where(sum_exp > 0, 1.0 / sum_exp, 0.0)[:, None])
            accumulator.addcmul_(label.rows, share[:, None])
        per_row = (row_max, 1.0 / total, sum_exp / total, first_logp, second_logp)
        return torch.stack((*per_row, label.slope, second_slope)), accumulator


class LabelTerms(NamedTuple):
    """Of the first label: entry (R, H), logit, slope; of a second: logit, slope, if it differs."""

    rows: Tensor
    z: Tensor
    slope: Tensor
    second: tuple[Tensor, Tensor, Tensor] | None = None


def _dots(hidden: Tensor, label_rows: Tensor) -> Tensor:
    return (hidden.to(label_rows.dtype) * label_rows).sum(1)
