"""Means over the scored tokens of a sequence, padded and packed, of one label set and of two."""

import pytest
import torch
from torch.library import opcheck

from orpo_kernels import reference
from orpo_kernels.sequence_mean import sequence_mean

B, T = 4, 6  # two pairs


def tokens():
    labels = torch.randint(0, 9, (B, T))
    labels[torch.rand(B, T) < 0.4] = -100
    return torch.randn(B, T, dtype=torch.float64, requires_grad=True), labels


@pytest.mark.parametrize("half", [False, True], ids=["NLL labels of all", "of the chosen half"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_definition(packed, half):
    (x, labels), (nll_x, nll_labels) = tokens(), tokens()
    labels[2] = -100  # a sequence without a token
    weights = torch.randn(2, B, dtype=torch.float64)
    chosen = nll_labels.clone()
    chosen[B // 2 :] = -100
    true = torch.stack((reference.sequence_mean(x, labels), reference.sequence_mean(nll_x, chosen)))
    first, ids = (x, labels), None
    second = (nll_x, nll_labels[: B // 2] if half else nll_labels)
    if packed:
        order = torch.randperm(B * T)
        ids = order // T
        first, second = (
            tuple(each.reshape(-1)[order] for each in pair) for pair in (first, (nll_x, nll_labels))
        )
    mean, count = sequence_mean(*first, second, sequence_ids=ids, num_sequences=B)
    torch.testing.assert_close(mean, true)
    for found, expected in zip(
        torch.autograd.grad(mean, (x, nll_x), weights, retain_graph=True),
        torch.autograd.grad(true, (x, nll_x), weights),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)
    assert count.tolist() == [(each != -100).sum(1).tolist() for each in (labels, chosen)]
    alone, of_one = sequence_mean(*first, sequence_ids=ids, num_sequences=B)
    assert torch.equal(alone, mean[:1])
    assert torch.equal(of_one, count[:1])


def test_values_that_are_not_scored_do_not_matter():
    x = torch.tensor([[1.0, float("nan"), 3.0], [4.0, 5.0, 6.0]], requires_grad=True)
    labels = torch.tensor([[7, -1, 7], [-1, 7, -1]])
    mean, _ = sequence_mean(x, labels, ignore_index=-1, num_sequences=2)
    mean.sum().backward()
    assert mean.tolist() == [[2.0, 5.0]]
    assert x.grad.tolist() == [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]


def test_empty():
    for shape, ids in (((0, 3), None), ((4, 0), None), ((0,), torch.zeros(0).long())):
        x = torch.zeros(shape, requires_grad=True)
        n = shape[0] if ids is None else 4
        mean, count = sequence_mean(x, x.long(), sequence_ids=ids, num_sequences=n)
        assert mean.shape == count.shape == (1, n)
        assert mean.tolist() == count.tolist() == [[0.0] * n]
        assert torch.autograd.grad(mean.sum(), x)[0].shape == shape


def test_opcheck():
    op = torch.ops.orpo_kernels.sequence_mean.default
    x, labels = torch.randn(4, 5, requires_grad=True), torch.randint(-1, 3, (4, 5))
    opcheck(op, (x, labels, None, None, -1, None, 4))
    opcheck(op, (x, labels, x.detach().requires_grad_(), labels[:2], -1, None, 4))
    ids = torch.tensor([0, 1, 1, 2, 3])
    packed = (x[0].detach().requires_grad_(), labels[0])
    opcheck(op, (*packed, *packed, -1, ids, 4))
    backward = torch.ops.orpo_kernels.sequence_mean_backward.default
    sets = torch.randn(2, 4), torch.ones(2, 4)
    opcheck(backward, (*sets, labels, labels[:2], -1, None))
    opcheck(backward, (*(each[:1] for each in sets), labels[0], None, -1, ids))
