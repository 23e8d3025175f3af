"""The exact forward on devices of Triton's kernels: GEMM, statistics, exponentials, GEMM.

The formulae are those of `tile_loop.py`. A row of a tile is split over programs of the GPU, which
meet between the two looks: `softmax_stats` finds the maximum and the sum of exponentials,
`softmax_grad_` turns the logits into E in the dtype of the next GEMM.
"""

import torch
from torch import Tensor

from orpo_kernels.engine.budget import Plan, spans
from orpo_kernels.engine.gemm import accumulate_product_, matmul_into
from orpo_kernels.engine.operands import Operands
from orpo_kernels.engine.tile_loop import Buffers, Results, empty_sums, finish
from orpo_kernels.engine.tiles.plain import merge
from orpo_kernels.kernels import launcher


def forward(operands: Operands, plan: Plan, kept: Tensor | None, out: Results) -> None:
    """Fills the results, and `kept` (M, V) with E where it is given, as `tile_loop.forward`."""
    softmax_stats = launcher("softmax_stats", "softmax_stats")
    softmax_grad_ = launcher("softmax_grad", "softmax_grad_")
    rows, head, labels, sizes, _ = operands
    buffers = Buffers.of(operands, plan, out, tiles=kept is None or sizes.widens)
    stores = out.wants_g or kept is not None
    for start, stop in spans(sizes.rows, plan.rows):
        hidden, row_labels = rows.take(start, stop), labels.stacked(start, stop)
        label = head.label_terms(hidden, row_labels)
        row_max, sum_exp = empty_sums(hidden)
        accumulator = torch.zeros_like(hidden, dtype=row_max.dtype) if out.wants_g else None
        for v0, v1 in spans(sizes.vocabulary, plan.columns):
            weight = head.block(v0, v1)
            tile, probs = buffers.tiles(stop - start, v1 - v0, kept, start)
            matmul_into(tile, hidden, weight.t())
            arguments = (tile, head.block_bias(v0, v1), row_labels, v0)
            block_max, block_sum, _ = softmax_stats(*arguments, *head.transform)
            row_max, sum_exp, rescale, _ = merge(row_max, sum_exp, block_max, block_sum)
            if stores:
                into = None if probs is tile else probs
                softmax_grad_(*arguments, row_max, *head.transform, into)
            if accumulator is not None:
                before = rescale if v0 > 0 else None
                accumulate_product_(accumulator, before, probs, weight, buffers.partial)
        statistics, g = finish(label, row_max, sum_exp, accumulator)
        out.write(operands.placed(start, stop), statistics, g)
