"""The pair term: closed-form float32 gradient against float64, wherever a mean log-prob can be."""

import pytest
import torch
from torch.library import opcheck

from orpo_kernels import odds_ratio_loss, reference
from orpo_kernels.constants import MAX_MEAN_LOGP

# -1e-8 is all but certain; -0.693 is where log1mexp switches; -1e3 underflows exp.
GRID = [
    -1e-8,
    -6e-8,
    -1e-6,
    -1e-4,
    -1e-2,
    -0.3,
    -0.693,
    -0.694,
    -1.0,
    -2.0,
    -5.0,
    -20.0,
    -90.0,
    -1e3,
]


def pairs(dtype):
    values = torch.tensor(GRID, dtype=torch.float32)
    chosen, rejected = torch.cartesian_prod(values, values).unbind(1)
    return [each.to(dtype).clone().requires_grad_() for each in (chosen, rejected)]


def test_gradient_over_the_grid():
    found_inputs, true_inputs = pairs(torch.float32), pairs(torch.float64)
    found_loss, found_ratio = odds_ratio_loss(*found_inputs)
    true_loss, true_ratio = reference.odds_ratio_loss(*true_inputs)
    # Two float32 roundings of a number of size |ratio| are all that separates them.
    torch.testing.assert_close(found_ratio.double(), true_ratio, rtol=3e-7, atol=1e-6)
    torch.testing.assert_close(found_loss.double(), true_loss, rtol=2e-5, atol=1e-37)
    found = torch.autograd.grad(found_loss.sum(), found_inputs)
    true = torch.autograd.grad(true_loss.sum(), true_inputs)
    for ours, exact in zip(found, true, strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-37)


def test_gradient_of_the_ratio():
    found_inputs, true_inputs = pairs(torch.float32), pairs(torch.float64)
    weights = torch.randn(len(GRID) ** 2)
    found = torch.autograd.grad(odds_ratio_loss(*found_inputs)[1], found_inputs, weights)
    true = torch.autograd.grad(
        reference.odds_ratio_loss(*true_inputs)[1], true_inputs, weights.double()
    )
    for ours, exact in zip(found, true, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("top", [0.0, -0.0, -1e-12, 1e-3])
def test_certain_answers_are_evaluated_at_the_floor(top):
    # Exactly 0 is where TRL 1.16 and Liger 0.8.5 return NaN gradients.
    certain = torch.tensor([top, -2.0, top], requires_grad=True)
    other = torch.tensor([-2.0, top, top], requires_grad=True)
    loss, ratio = odds_ratio_loss(certain, other)
    grads = torch.autograd.grad(loss.sum() + ratio.sum(), (certain, other))
    at = [
        torch.where(each > MAX_MEAN_LOGP, MAX_MEAN_LOGP, each).detach().requires_grad_()
        for each in (certain, other)
    ]
    expected_loss, expected_ratio = odds_ratio_loss(*at)
    expected = torch.autograd.grad(expected_loss.sum() + expected_ratio.sum(), at)
    assert torch.equal(loss, expected_loss)
    for ours, floor in zip(grads, expected, strict=True):
        assert torch.isfinite(ours).all()
        assert torch.equal(ours, floor)


def test_limit_at_a_certain_chosen_answer():
    # d or_loss / dc = -o_r / (p_c + (1 - p_c) o_r) is finite at p_c = 1.
    chosen = torch.tensor([-1e-8], requires_grad=True)
    rejected = torch.tensor([-2.0])
    loss, _ = odds_ratio_loss(chosen, rejected)
    odds = torch.exp(rejected) / -torch.expm1(rejected)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), chosen)[0], -odds, rtol=1e-6, atol=0)


def test_matches_trl_where_trl_is_finite():
    trl = pytest.importorskip("trl.experimental.orpo.orpo_trainer", reason="TRL is a bench extra")

    class Stub:
        beta = 0.1
        accelerator = type("Accelerator", (), {"device": torch.device("cpu")})()

    chosen = -torch.rand(64).mul(5).add(1e-3).requires_grad_()
    rejected = -torch.rand(64).mul(5).add(1e-3).requires_grad_()
    chosen, rejected = chosen.detach().requires_grad_(), rejected.detach().requires_grad_()
    losses, _, _, ratio, log_odds = trl.ORPOTrainer.odds_ratio_loss(Stub(), chosen, rejected)
    ours, our_ratio = odds_ratio_loss(chosen, rejected)
    # TRL's `losses` is minus beta times the loss; its `log_odds_chosen` is our log_odds_ratio.
    torch.testing.assert_close(-losses, 0.1 * ours, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(log_odds.reshape(()), our_ratio.mean(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(ratio.reshape(()), -ours.mean(), rtol=1e-6, atol=1e-7)
    for found, theirs in zip(
        torch.autograd.grad(0.1 * ours.sum(), (chosen, rejected)),
        torch.autograd.grad(-losses.sum(), (chosen, rejected)),
        strict=True,
    ):
        torch.testing.assert_close(found, theirs, rtol=2e-6, atol=1e-8)


def test_dtypes_and_empty():
    half = odds_ratio_loss(-torch.rand(3).half(), -torch.rand(3).bfloat16())
    assert all(each.dtype == torch.float32 for each in half)
    assert all(each.shape == (0,) for each in odds_ratio_loss(torch.ones(0), torch.ones(0)))


def test_opcheck():
    args = (-torch.rand(4, requires_grad=True), -torch.rand(4, requires_grad=True))
    opcheck(torch.ops.orpo_kernels.odds_ratio.default, args)


@pytest.mark.parametrize(
    ("chosen", "rejected", "error", "message"),
    [
        (torch.ones(2).long(), torch.ones(2), TypeError, "chosen_logps must be floating"),
        (torch.ones(2), torch.ones(3), ValueError, r"must both be \(P,\)"),
        (torch.ones(2, 2), torch.ones(2, 2), ValueError, r"must both be \(P,\)"),
    ],
)  # fmt: skip
def test_rejects(chosen, rejected, error, message):
    with pytest.raises(error, match=message):
        odds_ratio_loss(chosen, rejected)
