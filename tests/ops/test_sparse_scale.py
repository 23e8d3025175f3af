"""eps is a probability: the scale of the logits, a factor of every entry, changes nothing of it."""

import pytest
import torch

from orpo_kernels import linear_logps
from orpo_kernels.backend import use_backend
from orpo_kernels.linear_logps import certified_logps
from orpo_kernels.options import LogpsOptions
from orpo_kernels.reference import sparse_gradients

# 80 rows: two tasks of 64 of the C++ forms. 515 columns: no vector divides them.
N, H, V = 80, 16, 515


def problem(spread):
    hidden, weight = torch.randn(N, H), spread * torch.randn(V, H)
    return hidden.requires_grad_(), weight.requires_grad_(), torch.randint(0, V, (N,))


def step(hidden, weight, labels, **options):
    given = LogpsOptions(gradient="sparse", tail_groups=torch.arange(N) // 40, **options)
    logps, certificate = certified_logps(hidden, weight, labels, None, given)
    return logps, certificate, *torch.autograd.grad(logps.sum(), (hidden, weight))


@pytest.mark.parametrize("backend", ["auto", "torch"])  # C++ and torch
def test_same_choice_at_any_scale(backend):
    hidden, weight, labels = problem(2.0)
    # A power of two, so bits are the same.
    large = (16 * hidden.detach()).requires_grad_()
    with use_backend(backend):
        logps, certificate, dhidden, dweight = step(hidden, weight, labels, eps=2.0**-10)
        scaled = step(large, weight, labels, eps=2.0**-10, logit_scale=1 / 16)
    assert torch.equal(logps, scaled[0])
    for each, other in zip(certificate, scaled[1], strict=True):
        assert torch.equal(each, other)
    assert 0.002 < certificate.tail_mass < 0.2
    assert 0 < certificate.kept_share < 0.03
    assert torch.equal(dhidden, 16 * scaled[2])
    assert torch.equal(dweight, scaled[3])


def test_flat_logits_of_a_small_scale_are_exact():
    hidden, weight, labels = problem(0.5)
    _, certificate, *found = step(hidden, weight, labels, logit_scale=1 / 16)
    assert (certificate.kept_share, certificate.tail_mass) == (1, 0)  # it was 0.002, and 0.062
    exact = linear_logps(hidden, weight, labels, logit_scale=1 / 16)
    true = torch.autograd.grad(exact.sum(), (hidden, weight))
    for ours, other in zip(found, true, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-7)


def test_the_definition():
    hidden, weight, labels = (each.detach().double() for each in problem(3.0))
    options = {"eps": 2.0**-10, "groups": torch.arange(N) // 40, "rounding": torch.bfloat16}
    given = ((labels.long(),), (torch.ones(N).double(),))
    once = sparse_gradients(hidden, weight, *given, block=64, **options)
    scaled = sparse_gradients(16 * hidden, weight, *given, block=64, logit_scale=1 / 16, **options)
    assert torch.equal(once.dhidden, 16 * scaled.dhidden)
    assert torch.equal(once.dweight, scaled.dweight)
    assert torch.equal(once.softmax.mask, scaled.softmax.mask)
