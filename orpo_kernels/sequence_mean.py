"""Mean over the scored tokens of each sequence, padded or packed.

    mean_s = sum over scored t of s of x_t / n_s,  0 where n_s = 0        dx_t = dmean_s / n_s

Padded: x (B, T), a sequence a row. Packed: x (N,), `sequence_ids` (N,) says whose token it is.
Sums in the dtype of x; packed ones, which are serial, in float64. Deterministic: no float atomics.
"""

from typing import Any

import torch
from torch import Tensor

from orpo_kernels.kernels import register_custom_op


def sequence_mean(
    token_logps: Tensor, mask: Tensor, sequence_ids: Tensor | None, num_sequences: int
) -> tuple[Tensor, Tensor]:
    """Means and counts of the masked tokens of each sequence.

    Args:
        token_logps: (B, T), or packed (N,); floating.
        mask: same shape, bool; the tokens that count.
        sequence_ids: (N,) int64 in [0, num_sequences) when packed, else None.
        num_sequences: B.

    Returns:
        mean (B,), 0 for a sequence without a token; count (B,), same dtype.
    """
    return _sequence_mean(token_logps, mask, sequence_ids, num_sequences)  # type: ignore[no-any-return]


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
    token_logps: Tensor, mask: Tensor, sequence_ids: Tensor | None, num_sequences: int
) -> tuple[Tensor, Tensor]:
    count = _sums(mask.to(token_logps.dtype), sequence_ids, num_sequences)
    total = _sums(torch.where(mask, token_logps, 0.0), sequence_ids, num_sequences)
    return total / count.clamp(min=1.0), count


@_sequence_mean.register_fake
def _(
    token_logps: Tensor, mask: Tensor, sequence_ids: Tensor | None, num_sequences: int
) -> tuple[Tensor, Tensor]:
    mean = token_logps.new_empty(
        num_sequences if sequence_ids is not None else token_logps.shape[0]
    )
    return mean, torch.empty_like(mean)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, mask, sequence_ids, _ = inputs
    ctx.save_for_backward(mask, sequence_ids, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, dmean: Tensor, _dcount: Tensor) -> tuple[Tensor | None, ...]:
    mask, sequence_ids, count = ctx.saved_tensors
    per_token = dmean / count.clamp(min=1.0)
    spread = per_token[:, None] if sequence_ids is None else per_token[sequence_ids]
    return torch.where(mask, spread, 0.0), None, None, None


_sequence_mean.register_autograd(_backward, setup_context=_setup_context)
register_custom_op("sequence_mean", _sequence_mean)
