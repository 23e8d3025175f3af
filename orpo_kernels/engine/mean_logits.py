"""The mean logit of each sequence, a metric: over positions and vocabulary, without the logits.

    mean over t, v of z = scale * ((sum_t h_t) . (sum_v W_v) / T + sum_v b_v) / V

Exact, and no GEMM, as long as the transform is linear. A softcap is not: then the logits are
computed in tiles and summed while they are there, one pass of work, in the workspace of the loss.
"""

import torch
from torch import Tensor

from orpo_kernels.engine.chunks import (
    Columns,
    Rows,
    matmul_into,
    plan_forward,
    row_pitch,
    spans,
    workspace_budget,
)
from orpo_kernels.engine.selection import flat_rows, problem_sizes
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
    count = hidden.shape[0] * hidden.shape[1]
    sizes = problem_sizes(count, (hidden, None), (weight, None), 1, dtype)
    plan = plan_forward(
        sizes, workspace_budget(workspace_bytes, weight.device), with_gradient=False
    )
    flat = flat_rows(hidden)
    index = None if flat.ndim == 2 else torch.arange(count, device=flat.device)
    rows, columns = Rows((flat,), index, dtype), Columns((weight,), dtype)
    pitch = row_pitch(plan.columns, sizes.device)
    buffer = hidden.new_empty((plan.rows, pitch), dtype=sizes.product_dtype)
    no_labels = torch.full((1, plan.rows), -1, device=sizes.device)
    sums = hidden.new_zeros(count, dtype=torch.float32)
    for start, stop in spans(count, plan.rows):
        chunk = rows.take(start, stop)
        for v0, v1 in spans(sizes.vocabulary, plan.columns):
            tile = buffer[: stop - start, : v1 - v0]
            matmul_into(tile, chunk, columns.block(v0, v1).t())
            _, _, logit_sum = softmax_stats(
                tile, None if bias is None else bias[v0:v1], no_labels[:, : stop - start], v0,
                logit_scale, softcap, with_logit_sum=True,
            )  # fmt: skip
            sums[start:stop] += logit_sum
    return sums.view(hidden.shape[:2]).sum(1) / (hidden.shape[1] * sizes.vocabulary)
