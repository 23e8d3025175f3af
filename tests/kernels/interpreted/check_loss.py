"""The whole loss, forward and backward, through the launchers: as a CUDA tensor would take it."""

import pytest
import torch

from orpo_kernels import linear_logps, odds_ratio_loss, orpo_loss, reference
from orpo_kernels.sequence_mean import sequence_mean
from tests.helpers import assert_accurate
from tests.kernels.interpreted.engine import as_on_a_gpu
from tests.kernels.interpreted.plugin import launches

# P = 2, T = 5: few programs. H = 16. V = 1003: no vector divides it; one block, and several.
P, T, H, V = 2, 5, 16, 1003


@pytest.fixture(params=[False, True], ids=["GEMMs round", "GEMMs widen"])
def widens(request, monkeypatch):
    as_on_a_gpu(monkeypatch, widens=request.param)
    return request.param


def problem(dtype, with_bias):
    hidden = torch.randn(2 * P, T, H).to(dtype).requires_grad_()
    weight = (torch.randn(V, H) * 0.5).to(dtype).requires_grad_()
    bias = torch.randn(V).to(dtype).requires_grad_() if with_bias else None
    labels = torch.randint(0, V, (2 * P, T))
    nll_labels = labels.clone()
    nll_labels[P:] = -100
    nll_labels[0, 0] = 7  # the two sets may name different tokens
    labels[:, 0] = -100
    labels[1, 3:] = -100
    return hidden, weight, bias, labels, nll_labels


def gradients(loss, tensors):
    found = torch.autograd.grad(loss, [each for each in tensors if each is not None])
    return [each.double() for each in found]


@pytest.mark.parametrize(
    ("dtype", "with_bias", "softcap", "workspace"),
    [
        pytest.param(torch.float32, True, 5.0, None, id="float32, bias, softcap, E kept"),
        pytest.param(torch.float32, False, None, 150_000, id="float32, blocks, recomputed"),
        pytest.param(torch.bfloat16, False, None, None, id="bfloat16"),
        pytest.param(torch.bfloat16, True, 5.0, 140_000, id="bfloat16, bias, softcap, blocks"),
        pytest.param(torch.float16, True, None, None, id="float16, bias"),
        pytest.param(torch.float16, True, 5.0, 140_000, id="float16, bias, softcap, blocks"),
    ],
)
def test_orpo_loss(widens, dtype, with_bias, softcap, workspace):
    hidden, weight, bias, labels, nll_labels = problem(dtype, with_bias)
    options = {"logit_scale": 0.7, "softcap": softcap, "nll_labels": nll_labels, "beta": 0.3}
    before = len(launches)
    ours = orpo_loss(hidden, weight, labels, bias, workspace_bytes=workspace, **options)
    found = gradients(ours.loss, (hidden, weight, bias))
    used = set(launches[before:])
    assert {"softmax_stats", "softmax_grad", "sequence_mean", "odds_ratio"} <= used
    assert ("column_sums" in used) == with_bias

    wide = [None if t is None else t.detach().double().requires_grad_() for t in
            (hidden, weight, bias)]  # fmt: skip
    truth = reference.orpo_loss(wide[0], wide[1], labels, wide[2], **options)
    # Loss in float32 from rounded logits; gradients rounded to their dtype after 16-bit GEMMs.
    rounding = 0.0 if dtype == torch.float32 or widens else 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        ours.loss.double(), truth.loss, rtol=2e-6 + rounding, atol=0, check_dtype=False
    )
    bound = 3e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for ours_d, true_d in zip(found, gradients(truth.loss, wide), strict=True):
        assert (ours_d - true_d).norm() <= bound * true_d.norm()


def test_linear_logps_without_a_gradient(widens):
    hidden, weight, _, labels, _ = problem(torch.float32, with_bias=False)
    with torch.no_grad():
        found = linear_logps(hidden, weight, labels)
    truth = reference.linear_logps(hidden.double(), weight.double(), labels)
    assert_accurate(found, truth.detach())


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_sequence_mean(packed):
    # 5000 positions: more than a block; sequence 2 has no token; packed ids in any order.
    values = -torch.rand(3, 5000)  # log-probs: of one sign, no cancellation
    mask = torch.rand(3, 5000) < 0.7
    mask[2] = False
    ids = None
    if packed:
        values, mask, ids = values[0], mask[0], torch.randint(0, 2, (5000,))
    values = values.detach().requires_grad_()
    mean, count = sequence_mean(values, mask, ids, 3)
    owner = torch.arange(3)[:, None].expand(3, 5000) if ids is None else ids
    member = (owner == torch.arange(3).view(3, *[1] * owner.ndim)) & mask
    wide = values.detach().double().requires_grad_()
    true_count = member.flatten(1).sum(1)
    true_mean = torch.where(member, wide, 0.0).flatten(1).sum(1) / true_count.clamp(min=1)
    assert count.tolist() == true_count.tolist()
    assert_accurate(mean.detach(), true_mean.detach())
    coefficients = torch.randn(3)
    (found,) = torch.autograd.grad(mean @ coefficients, values, retain_graph=True)
    (truth,) = torch.autograd.grad(true_mean @ coefficients.double(), wide)
    assert_accurate(found, truth)


def test_odds_ratio():
    # Both branches of log1mexp, the clamp, a hopeless and a certain answer, 300 random pairs.
    edge = [-1e-9, -(2.0**-26), -1e-4, -0.69, -0.70, -5.0, -80.0, -700.0]
    chosen = torch.tensor([c for c in edge for _ in edge] + (-torch.rand(300) * 3).tolist())
    rejected = torch.tensor(edge * len(edge) + (-torch.rand(300) * 3).tolist())
    chosen.requires_grad_()
    rejected.requires_grad_()
    loss, ratio = odds_ratio_loss(chosen, rejected)
    wide = [each.detach().double().requires_grad_() for each in (chosen, rejected)]
    true_loss, true_ratio = reference.odds_ratio_loss(*wide)
    assert_accurate(ratio.detach(), true_ratio.detach())
    assert_accurate(loss.detach(), true_loss.detach())
    weights = torch.rand(chosen.shape)
    found = torch.autograd.grad((loss * weights + 0.1 * ratio).sum(), (chosen, rejected))
    truth = torch.autograd.grad((true_loss * weights.double() + 0.1 * true_ratio).sum(), wide)
    for ours, true in zip(found, truth, strict=True):
        # Of exponents up to 700, whose rounding is relative error of the gradient; 0 below 1e-38.
        torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-37)
