"""The mean logit of each sequence, a metric: over positions and vocabulary, without the logits.

    mean over t, v of z = scale * ((sum_t h_t) . (sum_v W_v) / T + sum_v b_v) / V

Exact, and no GEMM, as long as the transform is linear. A softcap is not: then the logits are
computed in tiles and summed while they are there, one pass of work, in the workspace of the loss.
"""

import torch
from torch import Tensor

from orpo_kernels.engine.budget import plan_forward, spans
from orpo_kernels.engine.gemm import matmul_into, tile_of
from orpo_kernels.engine.operands import Head, Rows, flat_rows
from orpo_kernels.engine.problem import Problem, Transform
from orpo_kernels.engine.tiles import softmax_stats

_BLOCK_ELEMENTS = 2**20


@torch.no_grad()
def mean_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    """Mean of the transformed logits over positions and vocabulary.

    Args:
        hidden: (B, T, H) floating.
        weight: (V, H) floating.
        bias: (V,) floating.
        logit_scale: factor on the logits.
        softcap: cap applied after the scale; costs one pass over the vocabulary.
        workspace_bytes: bytes that may be allocated.

    Returns:
        (B,) float32.
    """
    hidden = hidden.to(weight.device)
    with torch.amp.autocast(weight.device.type, enabled=False):
        if softcap is not None and hidden.shape[1] > 0:
            return _capped(hidden, weight, bias, logit_scale, softcap, workspace_bytes)
        return _linear(hidden, weight, bias, logit_scale)


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float) -> Tensor:
    hidden_sum = hidden.sum(1, dtype=torch.float32)
    step = max(1, _BLOCK_ELEMENTS // weight.shape[1])
    weight_sum = sum(
        (weight[v0:v1].sum(0, dtype=torch.float32) for v0, v1 in spans(weight.shape[0], step)),
        start=hidden_sum.new_zeros(weight.shape[1]),
    )
    total = hidden_sum @ weight_sum / max(1, hidden.shape[1])
    if bias is not None:
        total = total + bias.sum(dtype=torch.float32)
    return total * (logit_scale / weight.shape[0])


def _capped(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    logit_scale: float,
    softcap: float,
    workspace_bytes: int | None,
) -> Tensor:
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    transform, count = Transform(logit_scale, softcap), hidden.shape[0] * hidden.shape[1]
    nothing = torch.full((1, count), -1, device=weight.device)  # no label is left out of a sum
    problem = Problem(
        hidden, weight, nothing, bias, None, None, transform, -1, dtype, workspace_bytes, False
    )
    sizes, flat = problem.sizes(count), flat_rows(hidden)
    plan = plan_forward(sizes, problem.budget, with_gradient=False)
    index = None if flat.ndim == 2 else torch.arange(count, device=flat.device)
    rows, head = Rows((flat,), index, dtype), Head((weight,), bias, transform, dtype)
    pitch = sizes.pitch(plan.columns)
    buffer = hidden.new_empty(plan.rows * pitch, dtype=sizes.product_dtype)
    sums = hidden.new_zeros(count, dtype=torch.float32)
    for start, stop in spans(count, plan.rows):
        chunk = rows.take(start, stop)
        for v0, v1 in spans(sizes.vocabulary, plan.columns):
            tile = tile_of(buffer, stop - start, v1 - v0, pitch)
            matmul_into(tile, chunk, head.block(v0, v1).t())
            _, _, logit_sum = softmax_stats(
                tile, head.block_bias(v0, v1), nothing[:, start:stop], v0, *transform,
                with_logit_sum=True,
            )  # fmt: skip
            sums[start:stop] += logit_sum
    return sums.view(hidden.shape[:2]).sum(1) / (hidden.shape[1] * sizes.vocabulary)
