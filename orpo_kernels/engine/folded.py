"""The exact strategy without a gradient and without a logit: `linear_lse` in place of tiles.

What it holds is rows of hidden in the GEMMs' dtype and about 1 KiB per row: no tile, and no
float32 copy of rows, as the dots of the labels come with the statistics. A head that has to be
copied (cast, or joined with its low-rank part) is, one vocabulary block at a time.
"""

import torch
from torch import Tensor

from orpo_kernels.engine.chunks import Plan, Rows, Sizes, spans
from orpo_kernels.engine.exact import Forward, Head, Labels
from orpo_kernels.engine.linear_lse import linear_lse


class Folded(Forward):
    """As `Forward` without gradient and kept E."""

    def __init__(self, rows: Rows, head: Head, labels: Labels, sizes: Sizes, plan: Plan) -> None:
        no_tile = Plan(0, 0, 0)
        super().__init__(rows, head, labels, sizes, no_tile, with_gradient=False, keep=False)
        self.plan = plan

    def chunk(
        self, start: int, stop: int, kept: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Statistics (7, R) of rows `start` to `stop`, and None."""
        hidden, labels = self.rows.take(start, stop), self.labels.stacked(start, stop)
        if hidden.stride(1) != 1:
            hidden = hidden.contiguous()
        row_max = hidden.new_full((stop - start,), torch.finfo(self.wide).min, dtype=self.wide)
        sum_exp = torch.zeros_like(row_max)
        dots = hidden.new_zeros(labels.shape, dtype=self.wide)
        for v0, v1 in spans(self.sizes.vocabulary, self.plan.columns):
            here = torch.where((labels >= v0) & (labels < v1), labels - v0, -1)
            block_max, block_sum, block_dots, _ = linear_lse(
                hidden, self.head.columns.block(v0, v1), self.head.block_bias(v0, v1), here,
                self.head.logit_scale, self.head.softcap, False,
            )  # fmt: skip
            new_max = torch.maximum(row_max, block_max)
            sum_exp *= torch.exp(row_max - new_max)
            sum_exp += block_sum * torch.exp(block_max - new_max)
            row_max = new_max
            dots += block_dots
        terms = self._terms(hidden[:0], list(dots), labels)
        return self._finish(terms, row_max, sum_exp, None)
