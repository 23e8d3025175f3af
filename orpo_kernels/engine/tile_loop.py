"""The exact forward where one operation finishes a tile: C++ on a CPU, plain torch anywhere.

    E_tv = exp(z_tv - m_t) d_tv  for v not a label,  m_t = max of those z,   d = dz / d(h W^T)
    lse  = log(e^m sum E + e^z_y),    1 - p_y from log-sums, never by subtraction
    g_t  = d_y W[y] - (E W)_t / sum E                            dhidden_t = a_t (1 - p_y) g_t

Row chunks x vocabulary blocks, the vocabulary inner; m grows and the sum of E W is rescaled, so
nothing is (N, V) and no logit is computed twice. g does not depend on the loss (and, without the
factor 1 - p_y, stays of the size of W, inside fp16, for a confident token): the gradient of a
frozen head is done after the forward. A trainable head keeps E, where N V fits the workspace, or
recomputes it in the backward (`weight_gradient.py`).

Two label sets share the pass. Where they name two different tokens, `second` is the other one and g
is of the first; dhidden moves the part of the second from one entry to the other. So g is small
also where all entries of the head have a large part in common. Elsewhere they are one label with
a_t = a_1t + a_2t.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.constants import LARGE, MOST_LARGE
from orpo_kernels.engine.budget import Plan, accumulation_dtype, spans
from orpo_kernels.engine.gemm import accumulate_product_, matmul_into, tile_of
from orpo_kernels.engine.operands import LabelTerms, Operands
from orpo_kernels.engine.tiles import csr_matmul_, softmax_collect_
from orpo_kernels.engine.tiles.collect import Entries, restore_


class Results(NamedTuple):
    """What a loop fills for the scored rows, in their place among all N; g without its factor."""

    statistics: Tensor  # (7, N), or (8, N) of the sparse gradient
    g: Tensor  # (N, H), or (0, H): no gradient of hidden is wanted
    g_r: Tensor  # (N, r) or (0, r)

    @property
    def wants_g(self) -> bool:
        """Whether g is to be filled."""
        return self.g.shape[0] > 0

    def write(self, where: slice | Tensor, statistics: Tensor, g: Tensor | None) -> None:
        """Writes the figures of some rows, the two parts of g apart."""
        self.statistics[:, where] = statistics
        if g is None:
            return
        width = self.g.shape[1]
        self.g[where] = g[:, :width].to(self.g.dtype)
        if g.shape[1] > width:
            self.g_r[where] = g[:, width:].to(self.g_r.dtype)


def forward(operands: Operands, plan: Plan, kept: Tensor | None, out: Results) -> None:
    """Fills the results, and `kept` (M, V) with E where it is given (the plan has one block then).

    Args:
        operands: the scored rows.
        plan: rows of a chunk, columns of a vocabulary block.
        kept: in the GEMMs' dtype, or None.
        out: to be filled.
    """
    rows, head, labels, sizes, _, _ = operands
    buffers = Buffers.of(operands, plan, out, tiles=kept is None or sizes.widens)
    stores = out.wants_g or kept is not None
    redone = Redone.of(operands)
    for start, stop in spans(sizes.rows, plan.rows):
        hidden, row_labels = rows.take(start, stop), labels.stacked(start, stop)
        label = head.label_terms(hidden, row_labels)
        row_max, sum_exp = empty_sums(hidden)
        accumulator = torch.zeros_like(hidden, dtype=row_max.dtype) if out.wants_g else None
        for v0, v1 in spans(sizes.vocabulary, plan.columns):
            weight = head.block(v0, v1)
            tile, probs = buffers.tiles(stop - start, v1 - v0, kept, start)
            matmul_into(tile, hidden, weight.t())
            rescale, *entries = softmax_collect_(
                tile, head.block_bias(v0, v1), row_labels, v0, row_max, sum_exp, label.z,
                *redone.inputs(hidden, weight), redone.share, MOST_LARGE, *head.transform,
                True, stores,
            )  # fmt: skip
            if probs is not tile:
                probs.copy_(tile)
            if accumulator is not None:
                before = rescale if v0 > 0 else None
                accumulate_product_(accumulator, before, probs, weight, buffers.partial)
                if redone.apart:
                    csr_matmul_(accumulator, *entries, weight)
            if kept is not None and redone.apart:
                restore_(probs, Entries(*entries))
        statistics, g = finish(label, row_max, sum_exp, accumulator)
        out.write(operands.placed(start, stop), statistics, g)


class Redone(NamedTuple):
    """Whether large entries are taken out of a tile and redone in float32, and from what share."""

    apart: bool
    share: float

    @classmethod
    def of(cls, operands: Operands) -> "Redone":
        """As the device needs it: where a 16-bit GEMM rounds its logits."""
        apart = operands.sizes.refines
        return cls(apart, LARGE if apart else math.inf)

    def inputs(self, hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What the entries are redone from."""
        return (hidden, weight) if self.apart else (None, None)


class Buffers(NamedTuple):
    """Memory of one call, taken once: flat tiles, and the product that is summed apart."""

    raw: Tensor
    narrow: Tensor  # where E goes in the GEMMs' dtype; empty where logits are of it
    partial: Tensor  # (R or 0, H)
    operands: Operands

    @classmethod
    def of(cls, operands: Operands, plan: Plan, out: Results, *, tiles: bool) -> "Buffers":
        """For tiles of a plan; without `tiles` E lies in memory of the caller's."""
        sizes, new = operands.sizes, operands.labels.first.new_empty
        cells = plan.rows * sizes.pitch(plan.columns)
        partial_rows = plan.rows if out.wants_g and sizes.sums_apart else 0
        return cls(
            new(cells if tiles else 0, dtype=sizes.product_dtype),
            new(cells if sizes.widens else 0, dtype=sizes.compute_dtype),
            new((partial_rows, sizes.hidden_columns), dtype=sizes.product_dtype),
            operands,
        )

    def tiles(
        self, rows: int, columns: int, kept: Tensor | None = None, start: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Where the logits go and where E goes, (R, C) each: one tile when the dtypes agree.

        With `kept` (M, C or more), E goes to its rows from `start` on.
        """
        sizes = self.operands.sizes
        pitch = sizes.pitch(columns)
        if kept is not None:
            probs = kept[start : start + rows, :columns]
            return (tile_of(self.raw, rows, columns, pitch) if sizes.widens else probs), probs
        tile = tile_of(self.raw, rows, columns, pitch)
        return tile, tile_of(self.narrow, rows, columns, pitch) if sizes.widens else tile


def empty_sums(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and sum (R,) of an online softmax over nothing; its maximum is a finite number."""
    wide = accumulation_dtype(hidden.dtype)
    row_max = hidden.new_full((hidden.shape[0],), torch.finfo(wide).min, dtype=wide)
    return row_max, torch.zeros_like(row_max)


def finish(
    label: LabelTerms, row_max: Tensor, sum_exp: Tensor, accumulator: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Statistics (7, R), and g in place of E W: the label columns are added here.

    1 - p_y = sigmoid(log of the rest - z_y), relative to m: m + log(sum) would round away the
    digits of the difference.
    """
    row_max = torch.where(sum_exp > 0, row_max, label.z)  # nothing but the label: m is not one
    rest, first = torch.log(sum_exp), label.z - row_max
    beside_first = rest
    second_logp = second_slope = torch.zeros_like(rest)
    total = sum_exp + torch.exp(first)
    if label.second is not None:
        second, second_slope, distinct = label.second
        second = second - row_max
        beside_first = torch.where(distinct, torch.logaddexp(rest, second), rest)
        second_logp = F.logsigmoid(second - torch.logaddexp(rest, first))
        second_logp = torch.where(distinct, second_logp, 0.0)
        total = torch.where(distinct, total + torch.exp(second), total)
    first_logp = F.logsigmoid(first - beside_first)
    if accumulator is not None:
        accumulator.mul_(-torch.where(sum_exp > 0, 1.0 / sum_exp, 0.0)[:, None])
        accumulator.addcmul_(label.entries, label.slope[:, None])
    per_row = (row_max, 1.0 / total, sum_exp / total, first_logp, second_logp)
    return torch.stack((*per_row, label.slope, second_slope)), accumulator
