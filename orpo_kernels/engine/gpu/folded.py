"""The forward without a gradient and without a logit: a GEMM that folds its tiles, `linear_lse`.

    for a group of rows:            (a gather)
        for a vocabulary block:     (a cast of it, if the head is of another dtype; else one block)
                                    the GEMM, one launch that combines its partials
        finish                      statistics, written in their place

What it holds is rows of hidden, if they are gathered, and 8 bytes per row and split of a row.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from orpo_kernels.engine.gpu.parts import HeadBlocks, Hidden, spans
from orpo_kernels.engine.gpu.shapes import Shape
from orpo_kernels.kernels.combine_rows import combine_rows
from orpo_kernels.kernels.finish_rows import FinishRows
from orpo_kernels.kernels.inputs import Inputs
from orpo_kernels.kernels.linear_lse import fold


def forward(
    inputs: Inputs,
    shape: Shape,
    statistics: Tensor,
    state: Callable[[], Tensor],
    rows: tuple[int, int],
) -> None:
    """Fills the statistics (7, N) of some of the scored rows, from the state of all of them.

    The state is asked for, and so launched, behind the first product.
    """
    transform = (inputs.logit_scale, inputs.softcap)
    labels = inputs.labels[None]
    if inputs.second is not None:
        labels = torch.stack((inputs.labels, inputs.second))
    hidden, head = Hidden(inputs, shape.group), HeadBlocks(inputs, shape.columns, padded=False)
    nothing = statistics[0, :0, None]
    finish = functools.cache(
        lambda: FinishRows(inputs, state(), None, statistics, (nothing, nothing))
    )
    for start, stop in spans(rows, shape.group):
        x, here = hidden.take(start, stop), labels[:, start:stop]
        for block, (v0, v1) in enumerate(head.blocks):
            ((w, _),) = head.take(block).operands
            bias = None if inputs.bias is None else inputs.bias[v0:v1]
            partials = fold(x, w[: v1 - v0], bias, here, transform, v0)
            combine_rows(state(), partials, start)
        finish()(start, stop, 0, 0)
