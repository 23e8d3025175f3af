"""The pair term and its closed-form gradient, one launch each.

    l1m(x)  = log(1 - e^x)              lo(x) = x - l1m(x)
    lor     = lo(c) - lo(r)             or_loss = -log sigmoid(lor)
    dc = d_lor e^-l1m(c) - d_or e^(log sigmoid(-lor) - l1m(c))
    dr = d_or e^(log sigmoid(-lor) - l1m(r)) - d_lor e^-l1m(r)

P pairs; float32; natural logarithms; log-probs are evaluated at most at `MAX_MEAN_LOGP`.
8 bytes read and 8 written per pair forward, 16 and 8 backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.constants import MAX_MEAN_LOGP
from orpo_kernels.kernels.elementwise import expm1_near_zero, log1p
from orpo_kernels.kernels.tuning import Device, Row, cdiv, launch

_HIGHEST = tl.constexpr(MAX_MEAN_LOGP)


@triton.jit
def _log1mexp(x):
    # Each form where it loses no digits; the other is kept off its poles, as both are evaluated.
    near = x > -0.6931471805599453
    small = tl.where(near, x, -0.5)
    large = tl.where(near, -1.0, x)
    return tl.where(near, tl.log(-expm1_near_zero(small)), log1p(-tl.exp(large)))


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - log1p(tl.exp(-tl.abs(x)))


@triton.jit
def _log_odds_ratio(chosen, rejected):
    # Not tl.minimum, which makes a number of NaN: a broken log-prob must not give a loss.
    c = tl.where(chosen > _HIGHEST, _HIGHEST, chosen)
    r = tl.where(rejected > _HIGHEST, _HIGHEST, rejected)
    l1m_c = _log1mexp(c)
    l1m_r = _log1mexp(r)
    return (c - r) - (l1m_c - l1m_r), l1m_c, l1m_r


@triton.jit(do_not_specialize=["P"])
def _odds_ratio_kernel(
    loss_ptr, ratio_ptr,  # (P,) float32
    chosen_ptr, rejected_ptr,  # (P,) float32
    P,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = pair < P

    chosen = tl.load(chosen_ptr + pair, mask=exists, other=-1.0)
    rejected = tl.load(rejected_ptr + pair, mask=exists, other=-1.0)

    ratio, _, _ = _log_odds_ratio(chosen, rejected)

    tl.store(loss_ptr + pair, -_log_sigmoid(ratio), mask=exists)
    tl.store(ratio_ptr + pair, ratio, mask=exists)


@triton.jit(do_not_specialize=["P"])
def _odds_ratio_backward_kernel(
    dchosen_ptr, drejected_ptr,  # (P,) float32
    dloss_ptr, dratio_ptr, chosen_ptr, rejected_ptr,  # (P,) float32
    P,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = pair < P

    dloss = tl.load(dloss_ptr + pair, mask=exists, other=0.0)
    dratio = tl.load(dratio_ptr + pair, mask=exists, other=0.0)
    chosen = tl.load(chosen_ptr + pair, mask=exists, other=-1.0)
    rejected = tl.load(rejected_ptr + pair, mask=exists, other=-1.0)

    ratio, l1m_c, l1m_r = _log_odds_ratio(chosen, rejected)
    log_weight = _log_sigmoid(-ratio)
    dchosen = dratio * tl.exp(-l1m_c) - dloss * tl.exp(log_weight - l1m_c)
    drejected = dloss * tl.exp(log_weight - l1m_r) - dratio * tl.exp(-l1m_r)

    tl.store(dchosen_ptr + pair, dchosen, mask=exists)
    tl.store(drejected_ptr + pair, drejected, mask=exists)


def odds_ratio(chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """Launches the pair term: (P,) float32 loss and log odds ratio."""
    inputs = [each.contiguous() for each in (chosen, rejected)]

    def run(row: Row, _device: Device) -> tuple[Tensor, Tensor]:
        # Two tensors, not two views of one: outputs of a custom op may not share storage.
        loss, ratio = (torch.empty_like(each) for each in inputs)
        P = chosen.numel()
        _odds_ratio_kernel[(cdiv(P, row.block),)](
            loss, ratio, *inputs, P, BLOCK=row.block, num_warps=row.warps, enable_fp_fusion=True
        )
        return loss, ratio

    return launch("odds_ratio", torch.float32, chosen.device, run)


def odds_ratio_backward(
    d_or_loss: Tensor, d_ratio: Tensor, chosen: Tensor, rejected: Tensor
) -> tuple[Tensor, Tensor]:
    """Launches the gradient of the pair term: (P,) float32 to chosen and rejected."""
    inputs = [each.contiguous() for each in (d_or_loss, d_ratio, chosen, rejected)]

    def run(row: Row, _device: Device) -> tuple[Tensor, Tensor]:
        dchosen, drejected = (torch.empty_like(each) for each in inputs[2:])
        P = chosen.numel()
        _odds_ratio_backward_kernel[(cdiv(P, row.block),)](
            dchosen, drejected, *inputs, P,
            BLOCK=row.block, num_warps=row.warps, enable_fp_fusion=True,
        )  # fmt: skip
        return dchosen, drejected

    return launch("odds_ratio", torch.float32, chosen.device, run)
