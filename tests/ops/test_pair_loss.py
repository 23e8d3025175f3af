"""The pair loss: its parts, counts and closed-form gradient against autograd in float64."""

import pytest
import torch
from torch.library import opcheck

from orpo_kernels import reference
from orpo_kernels.constants import MAX_MEAN_LOGP
from orpo_kernels.pair_loss import pair_loss
from tests.ops.test_odds_ratio import GRID

P = len(GRID) ** 2


def pairs(sets, dtype):
    """All pairs of the grid, (K, 2P) means and counts; every seventh pair lacks a side."""
    grid = torch.tensor(GRID, dtype=torch.float32)
    mean = torch.cartesian_prod(grid, grid).t().reshape(1, -1).repeat(sets, 1)
    count = torch.randint(1, 9, mean.shape).to(dtype)
    count[0, 3::14] = 0.0
    if sets == 2:
        mean[1, :P] = -torch.rand(P)
        count[1, 5] = 0.0  # a pair without NLL tokens counts
    return mean.to(dtype), count


def definition(mean, count, beta, by_token, with_nll, num_nll_tokens=None, num_pairs=None):
    scored = [i for i in range(P) if count[0, i] > 0 and count[0, P + i] > 0]
    losses, _ = reference.odds_ratio_loss(mean[0, :P], mean[0, P:])
    tokens = sum(float(count[-1, i]) for i in scored)
    R = len(scored) if num_pairs is None else int(num_pairs)
    W = R if not by_token else tokens if num_nll_tokens is None else int(num_nll_tokens)
    weight = {i: float(count[-1, i]) if by_token else 1.0 for i in scored}
    nll = -sum(weight[i] * mean[-1, i] for i in scored) / W
    odds = sum(losses[i] for i in scored) / R
    return with_nll * nll + beta * odds, nll, odds, tokens, scored


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("by_token", [True, False], ids=["by token", "by pair"])
@pytest.mark.parametrize("given", [False, True], ids=["counted here", "counts given"])
@pytest.mark.parametrize("with_nll", [True, False], ids=["with NLL", "without"])
def test_the_definition(sets, by_token, given, with_nll):
    mean, count = pairs(sets, torch.float32)
    counts = {}
    if given:
        counts = {"num_nll_tokens": torch.tensor(5000), "num_pairs": torch.tensor(700.0)}
    exact = mean.double().requires_grad_()
    loss, nll, odds, tokens, scored = definition(exact, count, 0.3, by_token, with_nll, **counts)
    (gradient,) = torch.autograd.grad(loss, exact)
    ours = mean.clone().requires_grad_()
    found = pair_loss(ours, count, beta=0.3, by_token=by_token, nll=with_nll, **counts)
    (dmean,) = torch.autograd.grad(found.loss, ours)
    torch.testing.assert_close(found.loss.double(), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.parts.double(), torch.stack((nll, odds)), rtol=1e-6, atol=0)
    assert torch.isfinite(dmean).all()
    torch.testing.assert_close(dmean.double(), gradient, rtol=1e-4, atol=1e-37)
    assert found.pair_mask.nonzero()[:, 0].tolist() == scored
    assert found.counts.tolist() == [P - len(scored), 0, tokens]
    assert torch.equal(found.rewards, 0.3 * mean[0])
    assert not any(each.requires_grad for each in found[1:])


def test_what_is_not_scored_is_not_read():
    # NaN on either side of a pair without the other, and in the NLL's rejected half.
    mean, count = pairs(2, torch.float32)
    expected = pair_loss(mean, count, beta=0.3, by_token=True)
    lacking = ~expected.pair_mask.repeat(2)
    broken = mean.clone()
    broken[0, lacking] = broken[1, :P][~expected.pair_mask] = torch.nan
    broken[1, :P][~expected.pair_mask] = torch.nan
    broken[1, P:] = torch.nan
    broken.requires_grad_()
    found = pair_loss(broken, count, beta=0.3, by_token=True)
    assert torch.equal(found.loss, expected.loss)
    (dmean,) = torch.autograd.grad(found.loss, broken)
    assert torch.isfinite(dmean).all()
    assert (dmean[0, lacking] == 0).all()
    assert (dmean[1, P:] == 0).all()


def test_a_nan_that_is_scored_is_a_nan():
    for place in range(4):
        mean = torch.full((1, 4), -1.0)
        mean[0, place] = torch.nan
        assert torch.isnan(pair_loss(mean, torch.ones(1, 4), beta=0.1, by_token=True).loss)


def test_certain_answers_are_clamped_and_counted():
    mean = torch.tensor([[0.0, -1.0, -1.0, -1e-12]], requires_grad=True)
    found = pair_loss(mean, torch.ones(1, 4), beta=0.1, by_token=True)
    assert found.counts.tolist() == [0, 2, 2]
    at = mean.detach().clamp(max=MAX_MEAN_LOGP).requires_grad_()
    floor = pair_loss(at, torch.ones(1, 4), beta=0.1, by_token=True)
    assert floor.counts[1] == 0
    assert torch.equal(found.parts[1], floor.parts[1])
    for ours, expected in zip(
        torch.autograd.grad(found.loss, mean), torch.autograd.grad(floor.loss, at), strict=True
    ):
        assert torch.isfinite(ours).all()
        assert torch.equal(ours, expected)


def test_nothing_scored_and_no_pairs():
    for shape in ((1, 4), (2, 4), (1, 0), (2, 0)):
        mean = torch.zeros(shape, requires_grad=True)
        found = pair_loss(mean, torch.zeros(shape), beta=0.1, by_token=True)
        assert found.loss == 0
        assert (torch.autograd.grad(found.loss, mean)[0] == 0).all()
        assert found.counts.tolist() == [shape[1] // 2, 0, 0]


def test_opcheck():
    op = torch.ops.orpo_kernels.pair_loss.default
    mean, count = -torch.rand(2, 6), torch.ones(2, 6)
    opcheck(op, (mean.requires_grad_(), count, None, None, 0.1, True, True))
    counts = (torch.tensor(9), torch.tensor(3))
    opcheck(op, (mean[:1].detach().requires_grad_(), count[:1], *counts, 0.1, False, False))
