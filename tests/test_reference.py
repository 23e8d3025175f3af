"""The oracle itself: gradcheck in float64, and agreement with torch's own losses."""

import pytest
import torch
import torch.nn.functional as F

from orpo_kernels import reference


def doubles(*shapes):
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def test_linear_logps():
    hidden, weight, bias, hidden_r, weight_r = doubles((2, 3, 4), (5, 4), (5,), (2, 3, 2), (5, 2))
    labels = torch.tensor([[0, -100, 4], [2, 2, 1]])

    def logps(hidden, weight, bias, hidden_r, weight_r):
        return reference.linear_logps(
            hidden,
            weight,
            labels,
            bias,
            logit_scale=0.7,
            softcap=3.0,
            low_rank=(hidden_r, weight_r),
        )

    assert torch.autograd.gradcheck(logps, (hidden, weight, bias, hidden_r, weight_r))
    plain = reference.linear_logps(hidden, weight, labels)
    loss = F.cross_entropy((hidden @ weight.t()).flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(plain.flatten(), -loss)


def test_a_row_that_is_not_scored_is_0_whatever_token_0_has():
    # A mask of -inf on token 0, which stands in for the label that is ignored.
    hidden, weight = doubles((2, 4), (5, 4))
    bias = torch.tensor([-torch.inf, 0, 0, 0, 0], dtype=torch.float64)
    logps = reference.linear_logps(hidden, weight, torch.tensor([-100, 3]), bias)
    assert logps[0] == 0
    assert torch.isfinite(logps[1])


def test_odds_ratio_loss():
    chosen = -torch.rand(5, dtype=torch.float64).mul(3).add(0.1).requires_grad_()
    chosen = chosen.detach().requires_grad_()
    rejected = (-torch.rand(5, dtype=torch.float64).mul(3) - 0.1).requires_grad_()
    assert torch.autograd.gradcheck(reference.odds_ratio_loss, (chosen, rejected))
    odds = [torch.exp(x) / (1 - torch.exp(x)) for x in (chosen, rejected)]
    loss, ratio = reference.odds_ratio_loss(chosen, rejected)
    torch.testing.assert_close(ratio, torch.log(odds[0] / odds[1]))
    torch.testing.assert_close(loss, -F.logsigmoid(ratio))


def test_sequence_mean():
    (x,) = doubles((3, 4))
    labels = torch.tensor([[1, -100, 1, 1], [-100] * 4, [1] * 4])
    assert torch.autograd.gradcheck(lambda x: reference.sequence_mean(x, labels), x)
    means = reference.sequence_mean(x, labels)
    assert means[1] == 0
    torch.testing.assert_close(means[2], x[2].mean())


def test_orpo_loss():
    hidden, weight, bias = doubles((4, 3, 4), (5, 4), (5,))
    labels = torch.tensor([[1, 2, -100], [0, 4, 3], [2, 2, 2], [-100, 1, 0]])
    for reduction in ("token", "pair"):

        def loss(hidden, weight, bias, reduction=reduction):
            return reference.orpo_loss(hidden, weight, labels, bias, nll_reduction=reduction).loss

        assert torch.autograd.gradcheck(loss, (hidden, weight, bias))


def test_mean_logits():
    hidden, weight, bias = doubles((2, 3, 4), (5, 4), (5,))

    def mean(hidden, weight, bias):
        return reference.mean_logits(hidden, weight, bias, logit_scale=0.7, softcap=3.0)

    assert torch.autograd.gradcheck(mean, (hidden, weight, bias))


def test_tile_operations():
    # The statistics are those of the columns without a label, the gradient that of their sum.
    tile, bias = doubles((3, 6), (6,))
    labels = torch.tensor([[11, 4, -1], [16, 13, 99]])
    z, slope = reference.tile_logits(tile, bias, labels, 11, 0.7, 3.0)
    assert torch.isinf(z).nonzero().tolist() == [[0, 0], [0, 5], [1, 2]]
    top, total = reference.softmax_stats(z)
    torch.testing.assert_close(top + total.log(), torch.logsumexp(z, 1))
    nothing, _ = reference.tile_logits(tile, bias, labels[:0], 11, 0.7, 3.0)
    torch.testing.assert_close(reference.logit_sum(tile, bias, 0.7, 3.0) / 6, nothing.mean(1))
    level = torch.randn(3, dtype=torch.float64)
    (derivative,) = torch.autograd.grad(torch.exp(z - level[:, None]).sum(), tile)
    torch.testing.assert_close(reference.softmax_grad(z, slope, level), derivative)
    assert torch.autograd.gradcheck(reference.column_sums, (tile, doubles((3,))[0]))
    sums, partial, rescale = doubles((3, 2), (3, 2), (3,))
    assert torch.autograd.gradcheck(reference.accumulate, (sums, partial, rescale, -0.5))


# Scale, softcap, bias; two label sets that agree, differ, and score a row each; a row none scores.
SPARSE_OPTIONS = [(1.0, None), (0.7, 3.0)]


def sparse_problem(scale, softcap):
    inputs = doubles((6, 4), (9, 4), (9,))
    labels = torch.tensor([[0, -100, 4, 8, -100, 3], [2, -100, 4, -100, 1, 3]])
    options = {"logit_scale": scale, "softcap": softcap}
    coefficients = torch.randn(2, 6, dtype=torch.float64)
    logps = [reference.linear_logps(*inputs[:2], each, inputs[2], **options) for each in labels]
    true = torch.autograd.grad(logps, inputs, list(coefficients))
    hidden, weight, bias = (each.detach() for each in inputs)

    def sparse(**more):
        found = reference.sparse_gradients(
            hidden, weight, tuple(labels), tuple(coefficients), bias, **options, **more
        )
        return found[:3], found.softmax

    return sparse, true, coefficients.where(labels >= 0, 0.0)


@pytest.mark.parametrize(("scale", "softcap"), SPARSE_OPTIONS)
def test_sparse_gradients_are_exact_where_nothing_is_dropped(scale, softcap):
    sparse, true, _ = sparse_problem(scale, softcap)
    found, softmax = sparse(eps=0.0)
    torch.testing.assert_close(found, true)
    torch.testing.assert_close(softmax.mass, torch.zeros(5, dtype=torch.float64))
    assert not softmax.residual.any()


@pytest.mark.parametrize(("scale", "softcap"), SPARSE_OPTIONS)
def test_what_dropping_leaves_unchanged(scale, softcap):
    sparse, true, _ = sparse_problem(scale, softcap)
    for more in ({"eps": 1.0}, {"eps": 0.1}, {"eps": 0.1, "block": 2, "rounding": torch.bfloat16}):
        (dhidden, _, dbias), softmax = sparse(groups=torch.tensor([0, 0, 1, 1, 0, 0]), **more)
        assert not torch.allclose(dhidden, true[0])
        # Row sums: a vector added to all rows of the head changes every row of dhidden alike, and
        # the sum of dbias is the sum over rows of what their columns get.
        torch.testing.assert_close(dbias.sum(), true[2].sum())
        sums = softmax.kept.sum(1) + softmax.mass * softmax.tail.sum(1)[[0, 1, 1, 0, 0]]
        (_, full) = sparse(eps=0.0)
        torch.testing.assert_close(sums, full.kept.sum(1))


def test_a_row_is_kept_with_its_block():
    entries = torch.tensor([[0.5, 0.01, 0.02], [0.1, 0.2, 0.03], [0.04, 0.05, 0.3]]).double()
    total, groups = torch.tensor([[1.0], [1.0], [2.0]]), torch.tensor([0, 1, 1])
    single = reference.softmax_compact(entries, total, groups, eps=0.15)
    assert single.mask.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    torch.testing.assert_close(
        single.tail, torch.tensor([[0, 0.01, 0.02], [0.12, 0.025, 0.18]]).double()
    )
    pairs = reference.softmax_compact(
        entries, total, groups, eps=0.15, block=2, rounding=torch.bfloat16
    )
    assert pairs.mask.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    # The first column, whose kept entry is over a quarter, in two numbers.
    once = entries.bfloat16().double()
    twice = once + (entries - once).bfloat16().double()
    expected = torch.stack((twice[:, 0], once[:, 1], once[:, 2]), 1)
    assert torch.equal(pairs.kept, expected * pairs.mask)
    assert (pairs.kept[0, 0] - 0.5).abs() + (pairs.kept[1, 0] - 0.1).abs() < 2.0**-18


def test_one_look_keeps_no_less():
    sparse, true, _ = sparse_problem(1.0, None)
    (found, one_look), (_, known) = sparse(eps=0.1, columns=4), sparse(eps=0.1)
    assert (one_look.mask >= known.mask).all()
    assert (one_look.mask > known.mask).any()
    torch.testing.assert_close(found[2].sum(), true[2].sum())
    assert torch.equal(sparse(eps=0.1, columns=9)[1].mask, known.mask)
