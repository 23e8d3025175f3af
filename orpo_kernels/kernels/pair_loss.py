"""The loss of preference pairs from the means of their sequences, and its gradient, in one launch.

    nll = - sum over scored pairs of w_i m_i / W,   or = sum over scored pairs of -log sigmoid(lor_i) / R
    loss = nll + beta or, without the NLL beta or
    dm_i = - w_i / W,  dc_i = - beta / R e^(log sigmoid(-lor_i) - l1m(c_i)),  dr_i = + beta / R e^(... - l1m(r_i))

P pairs, K label sets; float32; natural logarithms; log-probs are evaluated at most at
`MAX_MEAN_LOGP`. The NLL's means m are those of the last set, c and r those of the first; w_i is the
pair's NLL tokens or 1. One program: it goes over the pairs once for the sums, each lane in order,
and once for the gradients, so the result does not depend on anything but the numbers. 16 K bytes
read and 8 K + 13 written per pair, a few KiB in all.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.constants import MAX_MEAN_LOGP
from orpo_kernels.kernels.odds_ratio import _log_odds_ratio, _log_sigmoid
from orpo_kernels.kernels.tuning import Device, Row, launch

_HIGHEST = tl.constexpr(MAX_MEAN_LOGP)


@triton.jit
def _sides(mean_ptr, count_ptr, start, P, BLOCK: tl.constexpr):
    """A block of pairs, which of them exist and are scored, and their two means."""
    pair = start + tl.arange(0, BLOCK)
    exists = pair < P
    chosen = tl.load(mean_ptr + pair, mask=exists, other=-1.0)
    rejected = tl.load(mean_ptr + P + pair, mask=exists, other=-1.0)
    n_chosen = tl.load(count_ptr + pair, mask=exists, other=0.0)
    n_rejected = tl.load(count_ptr + P + pair, mask=exists, other=0.0)
    return pair, exists, (n_chosen > 0) & (n_rejected > 0), chosen, rejected


@triton.jit
def _nll_weight(count_ptr, pair, scored, BY_TOKEN: tl.constexpr):
    """The NLL tokens of scored pairs, and what weight that gives these: their number, or 1."""
    tokens = tl.load(count_ptr + pair, mask=scored, other=0.0)
    if BY_TOKEN:
        weight = tokens
    else:
        weight = tl.where(scored, 1.0, 0.0)
    return tokens, weight


@triton.jit(do_not_specialize=["P"], do_not_specialize_on_alignment=["tokens_ptr", "pairs_ptr"])
def _pair_loss_kernel(
    loss_ptr, parts_ptr, ratio_ptr, rewards_ptr,  # (), (2,), (P,), (2P,) float32
    mask_ptr, counts_ptr,  # (P,) uint8, (3,) int64
    dmean_ptr,  # (K, 2P) float32
    mean_ptr, count_ptr,  # (K, 2P) float32
    tokens_ptr, pairs_ptr,  # () of any number type
    P, beta,
    TWO_SETS: tl.constexpr, BY_TOKEN: tl.constexpr, NLL: tl.constexpr,
    HAS_TOKENS: tl.constexpr, HAS_PAIRS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    last_set = 2 * P if TWO_SETS else 0  # the NLL's
    nll_mean_ptr, nll_count_ptr = mean_ptr + last_set, count_ptr + last_set

    nll_sum = tl.zeros((BLOCK,), tl.float32)
    odds_sum = tl.zeros((BLOCK,), tl.float32)
    pairs = tl.zeros((BLOCK,), tl.int64)
    clamped = tl.zeros((BLOCK,), tl.int64)
    nll_tokens = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, P, BLOCK):
        pair, exists, scored, chosen, rejected = _sides(mean_ptr, count_ptr, start, P, BLOCK)
        ratio, _, _ = _log_odds_ratio(chosen, rejected)
        tokens, weight = _nll_weight(nll_count_ptr, pair, scored, BY_TOKEN)
        nll_sum -= weight * tl.load(nll_mean_ptr + pair, mask=scored, other=0.0)
        odds_sum += tl.where(scored, -_log_sigmoid(ratio), 0.0)
        pairs += scored.to(tl.int64)
        clamped += (scored & (chosen > _HIGHEST)).to(tl.int64)
        clamped += (scored & (rejected > _HIGHEST)).to(tl.int64)
        nll_tokens += tokens.to(tl.int64)
        tl.store(ratio_ptr + pair, ratio, mask=exists)
        tl.store(rewards_ptr + pair, beta * chosen, mask=exists)
        tl.store(rewards_ptr + P + pair, beta * rejected, mask=exists)
        tl.store(mask_ptr + pair, scored.to(tl.uint8), mask=exists)

    num_pairs, num_tokens = tl.sum(pairs, 0), tl.sum(nll_tokens, 0)
    tl.store(counts_ptr, P - num_pairs)
    tl.store(counts_ptr + 1, tl.sum(clamped, 0))
    tl.store(counts_ptr + 2, num_tokens)
    if HAS_PAIRS:
        num_pairs = tl.load(pairs_ptr)
    if HAS_TOKENS:
        num_tokens = tl.load(tokens_ptr)
    R = tl.maximum(num_pairs.to(tl.float32), 1.0)
    W = tl.maximum(num_tokens.to(tl.float32), 1.0) if BY_TOKEN else R
    nll = tl.sum(nll_sum, 0) / W
    odds = tl.sum(odds_sum, 0) / R

    tl.store(loss_ptr, nll + beta * odds if NLL else beta * odds)
    tl.store(parts_ptr, nll)
    tl.store(parts_ptr + 1, odds)

    for start in range(0, P, BLOCK):
        pair, exists, scored, chosen, rejected = _sides(mean_ptr, count_ptr, start, P, BLOCK)
        ratio, l1m_c, l1m_r = _log_odds_ratio(chosen, rejected)
        log_share = _log_sigmoid(-ratio)
        _, weight = _nll_weight(nll_count_ptr, pair, scored, BY_TOKEN)
        dchosen = tl.where(scored, -beta / R * tl.exp(log_share - l1m_c), 0.0)
        drejected = tl.where(scored, beta / R * tl.exp(log_share - l1m_r), 0.0)
        dnll = -weight / W if NLL else tl.zeros((BLOCK,), tl.float32)
        if TWO_SETS:
            tl.store(dmean_ptr + 2 * P + pair, dnll, mask=exists)
            tl.store(dmean_ptr + 3 * P + pair, tl.zeros((BLOCK,), tl.float32), mask=exists)
        else:
            dchosen += dnll
        tl.store(dmean_ptr + pair, dchosen, mask=exists)
        tl.store(dmean_ptr + P + pair, drejected, mask=exists)


def pair_loss(
    mean: Tensor,  # (K, 2P)
    count: Tensor,  # (K, 2P)
    num_nll_tokens: Tensor | None,  # ()
    num_pairs: Tensor | None,  # ()
    beta: float,
    by_token: bool,
    nll: bool,
) -> tuple[Tensor, ...]:
    """Launches loss (), parts (2,), lor (P,), rewards (2P,), mask (P,), counts (3,), dmean (K, 2P)."""
    mean, count = mean.contiguous(), count.contiguous()
    K, P = mean.shape[0], mean.shape[1] // 2

    def run(row: Row, _device: Device) -> tuple[Tensor, ...]:
        loss, parts, ratio, rewards = (mean.new_empty(shape) for shape in ((), 2, P, 2 * P))
        mask = mean.new_empty(P, dtype=torch.bool)
        counts, dmean = mean.new_empty(3, dtype=torch.int64), torch.empty_like(mean)
        _pair_loss_kernel[(1,)](
            loss, parts, ratio, rewards, mask.view(torch.uint8), counts, dmean, mean, count,
            counts if num_nll_tokens is None else num_nll_tokens,
            counts if num_pairs is None else num_pairs,
            P, beta,
            TWO_SETS=K == 2, BY_TOKEN=by_token, NLL=nll,
            HAS_TOKENS=num_nll_tokens is not None, HAS_PAIRS=num_pairs is not None,
            BLOCK=row.block, num_warps=row.warps, enable_fp_fusion=True,
        )  # fmt: skip
        return loss, parts, ratio, rewards, mask, counts, dmean

    return launch("pair_loss", torch.float32, mean.device, run)
