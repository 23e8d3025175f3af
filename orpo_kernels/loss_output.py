"""What the ORPO loss returns."""

from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.options import Certificate


class ORPOOutput(NamedTuple):
    """Result of the ORPO loss. float32; only `loss` carries a graph; scalars are 0-dim tensors.

    Attributes:
        loss: `nll_loss + beta * or_loss`, nats; without `nll`, `beta * or_loss`.
        nll_loss: negative log-likelihood of the chosen answers, nats per token.
        or_loss: mean over pairs of `-log sigmoid(log_odds_ratio)`, >= 0, nats.
        chosen_logps: (P,) mean log-prob per scored token of the chosen answers; 0 without one.
        rejected_logps: (P,) the same of the rejected answers.
        log_odds_ratio: (P,) `log_odds(chosen) - log_odds(rejected)`.
        chosen_rewards: (P,) `beta * chosen_logps`.
        rejected_rewards: (P,) `beta * rejected_logps`.
        skipped_pairs: int64, pairs with an empty side; they contribute 0.
        clamped_logps: int64, mean log-probs above `MAX_MEAN_LOGP`, evaluated at it.
        pair_mask: (P,) bool, the pairs that count.
        num_nll_tokens: int64, tokens in the NLL of this batch.
        sparse: what the sparse gradient left out; None if the gradient is exact, or there is none.
    """

    loss: Tensor
    nll_loss: Tensor
    or_loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    log_odds_ratio: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    skipped_pairs: Tensor
    clamped_logps: Tensor
    pair_mask: Tensor
    num_nll_tokens: Tensor
    sparse: Certificate | None = None

    @property
    def mean_log_sigmoid(self) -> Tensor:
        """Mean over pairs of `log sigmoid(log_odds_ratio)`, <= 0, nats; TRL's `log_odds_ratio`."""
        return -self.or_loss

    @property
    def mean_log_odds_ratio(self) -> Tensor:
        """Mean over the pairs that count of `log_odds_ratio`, 0 without one."""
        counted = torch.where(self.pair_mask, self.log_odds_ratio, 0.0).sum()
        return counted / self.pair_mask.sum().clamp(min=1)
