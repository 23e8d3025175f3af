"""The loss of preference pairs from the means of their sequences, and its gradient, in one look.

    nll   = - sum over scored pairs of w_i m_i / W     m_i = mean log-prob of the NLL tokens
    or    = sum over scored pairs of -log sigmoid(lor_i) / R          lor as in `odds_ratio.py`
    loss  = nll + beta or, or beta or alone
    d loss / d m_i = - w_i / W                 w_i = NLL tokens of pair i ("token"), or 1 ("pair")
    d loss / d c_i = beta / R  d or_i / d c_i,   d loss / d r_i likewise

W is the sum of the w_i, R the number of scored pairs, or what the caller counted over all
micro-batches. A pair is scored where both of its sides have a token; every other one contributes
exactly 0, to loss and gradient, whatever stands in it.

The gradient is closed-form, for the reason `odds_ratio.py` gives, and made in the forward: it is
(K, 2P) numbers, and all that the backward has left to do is to multiply by d loss.

P pairs; float32 (float64 in, float64 out); natural logarithms. Deterministic.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.constants import MAX_MEAN_LOGP
from orpo_kernels.kernels import register_custom_op
from orpo_kernels.odds_ratio import log_odds_ratio


class PairLoss(NamedTuple):
    """`loss` () with its graph; `parts` (2,): NLL and odds-ratio term; `log_odds_ratio` (P,).

    `rewards` (2P,): beta times the means of the odds ratio, chosen first; `pair_mask` (P,) bool:
    the scored pairs; `counts` (3,) int64: pairs that are not, means of scored pairs above
    `MAX_MEAN_LOGP`, NLL tokens of scored pairs.
    """

    loss: Tensor
    parts: Tensor
    log_odds_ratio: Tensor
    rewards: Tensor
    pair_mask: Tensor
    counts: Tensor


def pair_loss(
    mean: Tensor,
    count: Tensor,
    *,
    beta: float,
    by_token: bool,
    nll: bool = True,
    num_nll_tokens: Tensor | None = None,
    num_pairs: Tensor | None = None,
) -> PairLoss:
    """The loss of P pairs, and what is reported of it.

    Args:
        mean: (K, 2P) float32 or float64, mean log-probs, chosen first: of the odds ratio's label
            set, and of the NLL's when that is another (K = 2), where the rejected half is not read.
        count: (K, 2P) same dtype, how many tokens each is the mean of.
        beta: weight of the odds-ratio term.
        by_token: whether the NLL is a mean over tokens, or over pairs.
        nll: whether the NLL is a part of the loss; `parts` have it anyway.
        num_nll_tokens: 0-dim, W of a mean over tokens; default: counted here.
        num_pairs: 0-dim, R, and W of a mean over pairs; default: counted here.
    """
    found = _pair_loss(mean, count, num_nll_tokens, num_pairs, beta, by_token, nll)
    return PairLoss(*found[:-1])


@torch.library.custom_op("orpo_kernels::pair_loss", mutates_args=())
def _pair_loss(
    mean: Tensor,
    count: Tensor,
    num_nll_tokens: Tensor | None,
    num_pairs: Tensor | None,
    beta: float,
    by_token: bool,
    nll: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `PairLoss`, and d loss / d mean (K, 2P)."""
    P = mean.shape[1] // 2
    chosen, rejected, nll_mean = mean[0, :P], mean[0, P:], mean[-1, :P]
    scored = (count[0, :P] > 0) & (count[0, P:] > 0)
    nll_tokens = torch.where(scored, count[-1, :P], 0.0)
    R = (scored.sum() if num_pairs is None else num_pairs).clamp(min=1).to(mean.dtype)
    W = (nll_tokens.sum() if num_nll_tokens is None else num_nll_tokens).clamp(min=1)
    weight, W = (nll_tokens, W.to(mean.dtype)) if by_token else (scored.to(mean.dtype), R)
    ratio, l1m_chosen, l1m_rejected = log_odds_ratio(chosen, rejected)

    nll_loss = 0.0 - torch.where(scored, nll_mean * weight, 0.0).sum() / W
    odds = torch.where(scored, -F.logsigmoid(ratio), 0.0).sum() / R
    log_share = F.logsigmoid(-ratio)
    dmean = torch.zeros_like(mean)
    dmean[0, :P] = torch.where(scored, -beta / R * torch.exp(log_share - l1m_chosen), 0.0)
    dmean[0, P:] = torch.where(scored, beta / R * torch.exp(log_share - l1m_rejected), 0.0)
    if nll:
        dmean[-1, :P] -= weight / W

    clamped = (mean[0] > MAX_MEAN_LOGP) & scored.repeat(2)
    counts = torch.stack(((~scored).sum(), clamped.sum(), nll_tokens.sum().to(torch.int64)))
    loss = nll_loss + beta * odds if nll else beta * odds
    parts, rewards = torch.stack((nll_loss, odds)), beta * mean[0]
    return loss, parts, ratio, rewards, scored, counts, dmean


@_pair_loss.register_fake
def _(
    mean: Tensor,
    count: Tensor,
    num_nll_tokens: Tensor | None,
    num_pairs: Tensor | None,
    beta: float,
    by_token: bool,
    nll: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    P = mean.shape[1] // 2
    return (
        mean.new_empty(()),
        mean.new_empty(2),
        mean.new_empty(P),
        mean.new_empty(2 * P),
        mean.new_empty(P, dtype=torch.bool),
        mean.new_empty(3, dtype=torch.int64),
        torch.empty_like(mean),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(output[-1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for the outputs that have no gradient


def _backward(ctx: Any, dloss: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
    (dmean,) = ctx.saved_tensors
    return dloss * dmean, None, None, None, None, None, None


_pair_loss.register_autograd(_backward, setup_context=_setup_context)
register_custom_op("pair_loss", _pair_loss)
