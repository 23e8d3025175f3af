"""The mean logit of each row or sequence, a metric: without the logits.

    mean over v of z_t    = scale * (h_t . (sum_v W_v) + sum_v b_v) / V
    mean over t, v of z_t = scale * ((sum_t h_t) . (sum_v W_v) / T + sum_v b_v) / V

Exact, and no GEMM, as long as the transform is linear. A softcap is not: then the logits are
computed in tiles and summed while they are there, one pass of work, in the workspace of the loss.
"""

import torch
from torch import Tensor

from orpo_kernels.engine.budget import plan_forward, spans
from orpo_kernels.engine.gemm import matmul_into, operand_dtype, tile_of
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
            means = _capped_rows(
                (hidden,), (weight,), bias, (logit_scale, softcap), workspace_bytes
            )
            return means.view(hidden.shape[:2]).mean(1)
        return _linear(hidden, weight, bias, logit_scale)


@torch.no_grad()
def row_mean_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    low_rank: tuple[Tensor, Tensor] | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    workspace_bytes: int | None = None,
) -> Tensor:
    """Mean of each row's transformed logits over the vocabulary.

    Args:
        hidden: (..., H) floating.
        weight: (V, H) floating.
        bias: (V,) floating.
        low_rank: (hidden_r (..., r), weight_r (V, r)), as in `linear_logps`.
        logit_scale: factor on the logits.
        softcap: cap applied after the scale; costs one pass over the vocabulary.
        workspace_bytes: bytes that may be allocated.

    Returns:
        (...) float32.
    """
    parts = (hidden,) if low_rank is None else (hidden, low_rank[0])
    weights = (weight,) if low_rank is None else (weight, low_rank[1])
    moved = tuple(part.to(weight.device) for part in parts)
    with torch.amp.autocast(weight.device.type, enabled=False):
        if softcap is not None:
            means = _capped_rows(moved, weights, bias, (logit_scale, softcap), workspace_bytes)
        else:
            means = _linear_rows(moved, weights, bias, logit_scale)
        return means.view(hidden.shape[:-1])


def _linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, logit_scale: float) -> Tensor:
    hidden_sum = hidden.sum(1, dtype=torch.float32)
    total = hidden_sum @ _column_sums(weight) / max(1, hidden.shape[1])
    if bias is not None:
        total = total + bias.sum(dtype=torch.float32)
    return total * (logit_scale / weight.shape[0])


def _linear_rows(
    hiddens: tuple[Tensor, ...], weights: tuple[Tensor, ...], bias: Tensor | None, scale: float
) -> Tensor:
    count = hiddens[0].shape[:-1].numel()
    means = hiddens[0].new_zeros(count, dtype=torch.float32)
    if bias is not None:
        means += bias.sum(dtype=torch.float32)
    for hidden, weight in zip(hiddens, weights, strict=True):
        rows, sums = _rows((hidden,), torch.float32), _column_sums(weight)
        for start, stop in spans(count, max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))):
            means[start:stop] += rows.take(start, stop) @ sums
    return means * (scale / weights[0].shape[0])


def _column_sums(weight: Tensor) -> Tensor:
    """(H,) float32, the sum of the head's entries, a block of them at a time."""
    step = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
    sums = weight.new_zeros(weight.shape[1], dtype=torch.float32)
    for v0, v1 in spans(weight.shape[0], step):
        sums += weight[v0:v1].sum(0, dtype=torch.float32)
    return sums


def _capped_rows(
    hiddens: tuple[Tensor, ...],
    weights: tuple[Tensor, ...],
    bias: Tensor | None,
    transform: tuple[float, float | None],
    workspace_bytes: int | None,
) -> Tensor:
    hidden, weight = hiddens[0], weights[0]
    hidden_r, weight_r = (hiddens[1], weights[1]) if len(hiddens) == 2 else (None, None)
    count = hidden.shape[:-1].numel()
    dtype = operand_dtype(weight.device, torch.promote_types(hidden.dtype, weight.dtype))
    nothing = torch.full((1, count), -1, device=weight.device)  # no label is left out of a sum
    problem = Problem(
        hidden, weight, nothing, bias, hidden_r, weight_r, Transform(*transform), -1, dtype,
        workspace_bytes, False,
    )  # fmt: skip
    sizes, rows = problem.sizes(count), _rows(hiddens, dtype)
    head = Head(weights, bias, problem.transform, dtype)
    plan = plan_forward(sizes, problem.budget, with_gradient=False)
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
    return sums / sizes.vocabulary


def _rows(hiddens: tuple[Tensor, ...], dtype: torch.dtype) -> Rows:
    """All rows of hidden states of any shape."""
    flat = tuple(flat_rows(each) for each in hiddens)
    if all(each.ndim == 2 for each in flat):
        return Rows(flat, None, dtype)
    count = hiddens[0].shape[:-1].numel()
    return Rows(flat, torch.arange(count, device=flat[0].device), dtype)
