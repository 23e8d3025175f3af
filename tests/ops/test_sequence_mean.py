"""Means over the scored tokens of a sequence, padded and packed."""

import torch
from torch.library import opcheck

from orpo_kernels import reference
from orpo_kernels.sequence_mean import sequence_mean


def test_padded_and_packed_agree_with_the_definition():
    labels = torch.randint(0, 9, (4, 6))
    labels[torch.rand(4, 6) < 0.4] = -100
    labels[2] = -100  # a sequence without a token
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(4, dtype=torch.float64)
    true = reference.sequence_mean(x, labels)
    mean, count = sequence_mean(x, labels != -100, None, 4)
    shuffle = torch.randperm(24)
    ids = torch.arange(4).repeat_interleave(6)[shuffle]
    packed, packed_count = sequence_mean(
        x.reshape(-1)[shuffle], (labels != -100).reshape(-1)[shuffle], ids, 4
    )
    for found in (mean, packed):
        torch.testing.assert_close(found, true)
        torch.testing.assert_close(
            torch.autograd.grad(found, x, weights, retain_graph=True)[0],
            torch.autograd.grad(true, x, weights, retain_graph=True)[0],
        )
    assert torch.equal(count, packed_count)
    assert count.tolist() == (labels != -100).sum(1).tolist()


def test_values_outside_the_mask_do_not_matter():
    x = torch.tensor([[1.0, float("nan"), 3.0]], requires_grad=True)
    mean, _ = sequence_mean(x, torch.tensor([[True, False, True]]), None, 1)
    mean.sum().backward()
    assert mean.item() == 2.0
    assert x.grad.tolist() == [[0.5, 0.0, 0.5]]


def test_opcheck():
    op = torch.ops.orpo_kernels.sequence_mean.default
    opcheck(op, (torch.randn(4, 5, requires_grad=True), torch.rand(4, 5) > 0.5, None, 4))
    ids = torch.tensor([0, 1, 1, 2, 3])
    opcheck(op, (torch.randn(5, requires_grad=True), torch.rand(5) > 0.5, ids, 4))
