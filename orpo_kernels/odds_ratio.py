"""The pair term: odds-ratio loss of chosen and rejected mean log-probs, gradient in closed form.

    l1m(x)  = log(1 - e^x)                      lo(x) = x - l1m(x)
    lor     = lo(c) - lo(r)                     or_loss = -log sigmoid(lor)
    d or_loss / dc = -exp(log sigmoid(-lor) - l1m(c))
    d or_loss / dr = +exp(log sigmoid(-lor) - l1m(r))
    d lor / dc = exp(-l1m(c)),  d lor / dr = -exp(-l1m(r))

The gradient is not left to autograd: differentiating a two-branch `log1mexp` evaluates the dead
branch too, and 0 * inf makes NaN of a confident pair. In closed form it is finite and accurate in
float32 wherever the loss is. d or_loss / dr has a true pole at p_r = 1, so log-probs are evaluated
at most at `MAX_MEAN_LOGP`.

P pairs; float32 (float64 in, float64 out); natural logarithms; a few bytes per pair.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.constants import MAX_MEAN_LOGP
from orpo_kernels.kernels import register_custom_op


def odds_ratio_loss(chosen_logps: Tensor, rejected_logps: Tensor) -> tuple[Tensor, Tensor]:
    """Odds-ratio loss of preference pairs.

    `or_loss = -log sigmoid(log_odds(chosen) - log_odds(rejected))`,
    `log_odds(x) = x - log(1 - e^x)`.

    Args:
        chosen_logps: (P,) floating, mean log-prob per token of the chosen answers, nats, <= 0.
        rejected_logps: (P,) floating, the same of the rejected answers.

    Returns:
        or_loss: (P,) float32, >= 0, nats (float64 when an input is float64).
        log_odds_ratio: (P,) same dtype, positive when the chosen answer is preferred.

    Raises:
        TypeError: an input is not floating point.
        ValueError: the shapes differ, or are not (P,).

    Note:
        Values above `MAX_MEAN_LOGP` = -2^-27 are evaluated there, loss and gradient. Deterministic.

    Source:
        arXiv 2403.07691, equations 6 and 7; log-space gradient of its equation 8.
    """
    for name, logps in (("chosen_logps", chosen_logps), ("rejected_logps", rejected_logps)):
        if not logps.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {logps.dtype}")
    if chosen_logps.ndim != 1 or chosen_logps.shape != rejected_logps.shape:
        raise ValueError(
            "chosen_logps and rejected_logps must both be (P,), got "
            f"{tuple(chosen_logps.shape)} and {tuple(rejected_logps.shape)}; entry i is pair i"
        )
    dtype = torch.promote_types(
        torch.promote_types(chosen_logps.dtype, rejected_logps.dtype), torch.float32
    )
    return _odds_ratio(chosen_logps.to(dtype), rejected_logps.to(dtype))  # type: ignore[no-any-return]


def _log1mexp(x: Tensor) -> Tensor:
    # log(-expm1) loses the digits of e^x below -log 2, log1p(-exp) those of x above it.
    return torch.where(
        x > -0.6931471805599453, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x))
    )


def log_odds_ratio(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`lor`, `l1m(c)` and `l1m(r)` of (P,) each, evaluated at most at `MAX_MEAN_LOGP`."""
    c, r = chosen.clamp(max=MAX_MEAN_LOGP), rejected.clamp(max=MAX_MEAN_LOGP)
    l1m_c, l1m_r = _log1mexp(c), _log1mexp(r)
    return (c - r) - (l1m_c - l1m_r), l1m_c, l1m_r


@torch.library.custom_op("orpo_kernels::odds_ratio", mutates_args=())
def _odds_ratio(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    ratio, _, _ = log_odds_ratio(chosen, rejected)
    return -F.logsigmoid(ratio), ratio


@torch.library.custom_op("orpo_kernels::odds_ratio_backward", mutates_args=())
def _odds_ratio_backward(
    d_or_loss: Tensor, d_ratio: Tensor, chosen: Tensor, rejected: Tensor
) -> tuple[Tensor, Tensor]:
    ratio, l1m_c, l1m_r = log_odds_ratio(chosen, rejected)
    log_weight = F.logsigmoid(-ratio)
    dchosen = d_ratio * torch.exp(-l1m_c) - d_or_loss * torch.exp(log_weight - l1m_c)
    drejected = d_or_loss * torch.exp(log_weight - l1m_r) - d_ratio * torch.exp(-l1m_r)
    return dchosen, drejected


@_odds_ratio.register_fake
def _(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(chosen), torch.empty_like(chosen)


@_odds_ratio_backward.register_fake
def _(
    d_or_loss: Tensor, d_ratio: Tensor, chosen: Tensor, rejected: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(chosen), torch.empty_like(chosen)


def _setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_or_loss: Tensor, d_ratio: Tensor):  # type: ignore[no-untyped-def]
    return _odds_ratio_backward(d_or_loss, d_ratio, *ctx.saved_tensors)


_odds_ratio.register_autograd(_backward, setup_context=_setup_context)
register_custom_op("odds_ratio", _odds_ratio)
register_custom_op("odds_ratio_backward", _odds_ratio_backward)
