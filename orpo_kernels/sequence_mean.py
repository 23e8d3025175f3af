"""Means over the scored tokens of each sequence, padded or packed, of one label set or two.

    mean_s = sum over scored t of s of x_t / n_s,  0 where n_s = 0        dx_t = dmean_s / n_s

B = 2P sequences, chosen first. Padded: x (B, T), a sequence a row. Packed: x (N,), `sequence_ids`
(N,) says whose token it is. A token is scored where its label is not the ignore index; the second
set, the NLL's, scores chosen sequences only, whatever its labels say of the others. Sums in the
dtype of x; packed ones, which are serial, in float64. Deterministic: no float atomics.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.constants import IGNORE_INDEX
from orpo_kernels.kernels import register_custom_op


def sequence_mean(
    token_logps: Tensor,
    labels: Tensor,
    nll: tuple[Tensor, Tensor] | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    sequence_ids: Tensor | None = None,
    num_sequences: int,
) -> tuple[Tensor, Tensor]:
    """Means and counts of the scored tokens of each sequence, of K = 1 or 2 label sets.

    Args:
        token_logps: (B, T), or packed (N,); floating.
        labels: same shape, int64; `ignore_index` where a token does not count.
        nll: the same two of the second set; its labels may be of the chosen half (P, T).
        ignore_index: label of positions that do not count.
        sequence_ids: (N,) int64 in [0, num_sequences) when packed, else None.
        num_sequences: B.

    Returns:
        mean (K, B), 0 for a sequence without a token; count (K, B), same dtype.
    """
    return _sequence_mean(  # type: ignore[no-any-return]
        token_logps, labels, *(nll or (None, None)), ignore_index, sequence_ids, num_sequences
    )


def _scored(
    labels: Tensor, nll_labels: Tensor | None, ignore_index: int, ids: Tensor | None, B: int
) -> list[Tensor]:
    """Of each label set, which tokens count, in the shape of `labels`."""
    masks = [labels != ignore_index]
    if nll_labels is not None and ids is not None:
        masks.append((nll_labels != ignore_index) & (ids < B // 2))
    elif nll_labels is not None:
        masks.append(F.pad(nll_labels[: B // 2] != ignore_index, (0, 0, 0, B - B // 2)))
    return masks


def _sums(values: Tensor, sequence_ids: Tensor | None, num_sequences: int) -> Tensor:
    if sequence_ids is None:
        return values.sum(-1)
    sums = values.new_zeros(num_sequences, dtype=torch.float64)
    if values.device.type == "cpu":
        sums.index_add_(0, sequence_ids, values.double())
    else:
        sums.index_put_((sequence_ids,), values.double(), accumulate=True)  # sorted, no atomics
    return sums.to(values.dtype)


@torch.library.custom_op("orpo_kernels::sequence_mean", mutates_args=())
def _sequence_mean(
    token_logps: Tensor,
    labels: Tensor,
    nll_token_logps: Tensor | None,
    nll_labels: Tensor | None,
    ignore_index: int,
    sequence_ids: Tensor | None,
    num_sequences: int,
) -> tuple[Tensor, Tensor]:
    masks = _scored(labels, nll_labels, ignore_index, sequence_ids, num_sequences)
    both = [token_logps] if nll_token_logps is None else [token_logps, nll_token_logps]
    means, counts = [], []
    for logps, mask in zip(both, masks, strict=True):
        count = _sums(mask.to(token_logps.dtype), sequence_ids, num_sequences)
        total = _sums(torch.where(mask, logps, 0.0), sequence_ids, num_sequences)
        means.append(total / count.clamp(min=1.0))
        counts.append(count)
    return torch.stack(means), torch.stack(counts)


@_sequence_mean.register_fake
def _(
    token_logps: Tensor,
    labels: Tensor,
    nll_token_logps: Tensor | None,
    nll_labels: Tensor | None,
    ignore_index: int,
    sequence_ids: Tensor | None,
    num_sequences: int,
) -> tuple[Tensor, Tensor]:
    B = num_sequences if sequence_ids is not None else token_logps.shape[0]
    mean = token_logps.new_empty((1 if nll_labels is None else 2, B))
    return mean, torch.empty_like(mean)


@torch.library.custom_op("orpo_kernels::sequence_mean_backward", mutates_args=())
def _sequence_mean_backward(
    dmean: Tensor,
    count: Tensor,
    labels: Tensor,
    nll_labels: Tensor | None,
    ignore_index: int,
    sequence_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the tokens of the first set and of the second, (0,) where there is none."""
    masks = _scored(labels, nll_labels, ignore_index, sequence_ids, dmean.shape[1])
    per_token = dmean / count.clamp(min=1.0)
    spread = per_token[..., None] if sequence_ids is None else per_token[:, sequence_ids]
    dlogps = [torch.where(mask, each, 0.0) for mask, each in zip(masks, spread, strict=True)]
    return dlogps[0], dlogps[1] if len(dlogps) == 2 else dmean.new_empty(0)


@_sequence_mean_backward.register_fake
def _(
    dmean: Tensor,
    count: Tensor,
    labels: Tensor,
    nll_labels: Tensor | None,
    ignore_index: int,
    sequence_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    second = (0,) if nll_labels is None else labels.shape
    return dmean.new_empty(labels.shape), dmean.new_empty(second)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, labels, _, nll_labels, ctx.ignore_index, sequence_ids, _ = inputs
    ctx.save_for_backward(output[1], labels, nll_labels, sequence_ids)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for the counts, which have no gradient


def _backward(ctx: Any, dmean: Tensor, _dcount: Tensor) -> tuple[Tensor | None, ...]:
    count, labels, nll_labels, sequence_ids = ctx.saved_tensors
    first, second = _sequence_mean_backward(
        dmean, count, labels, nll_labels, ctx.ignore_index, sequence_ids
    )
    return first, None, None if nll_labels is None else second, None, None, None, None


_sequence_mean.register_autograd(_backward, setup_context=_setup_context)
register_custom_op("sequence_mean", _sequence_mean)
register_custom_op("sequence_mean_backward", _sequence_mean_backward)
