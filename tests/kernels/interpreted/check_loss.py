"""The whole loss, forward and backward, through the launchers: as a CUDA tensor would take it."""

import pytest
import torch

from orpo_kernels import linear_logps, odds_ratio_loss, orpo_loss, reference
from orpo_kernels.pair_loss import pair_loss
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
    loss = {"sequence_mean", "pair_loss", "sequence_mean_backward"}
    loops = {"label_terms", "take_rows", "finish_rows", "coefficients", "weight_probs"}
    assert {"softmax_block", *loops, *loss} <= used
    assert ("column_totals" in used) == with_bias

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_whose_rows_are_not_contiguous(widens, dtype):
    # Plain torch, whose tiles on a GPU have rows of 1008 for V = 1003: E kept too.
    hidden, weight, _, labels, _ = problem(dtype, with_bias=False)
    apart = weight.detach().t().contiguous().t().requires_grad_()
    found = gradients(linear_logps(hidden, apart, labels).sum(), (hidden, apart))
    wide = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    truth = gradients(reference.linear_logps(*wide, labels).sum(), wide)
    bound = 3e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for ours, true in zip(found, truth, strict=True):
        assert (ours - true).norm() <= bound * true.norm()


def test_linear_logps_without_a_gradient(widens):
    hidden, weight, _, labels, _ = problem(torch.float32, with_bias=False)
    with torch.no_grad():
        found = linear_logps(hidden, weight, labels)
    truth = reference.linear_logps(hidden.double(), weight.double(), labels)
    assert_accurate(found, truth.detach())


def parts(labels, nll_labels, sequence_ids):
    """By the definition, which tokens are of which sequence of which set: (K, B, tokens) bool."""
    B = labels.shape[0] if sequence_ids is None else 4
    rows = torch.arange(B).view(B, *[1] * labels.ndim)
    owner = torch.arange(B)[:, None].expand(labels.shape) if sequence_ids is None else sequence_ids
    sets = [(owner == rows) & (labels != -100)]
    if nll_labels is not None:
        whole = torch.full_like(labels, -100)
        whole[: len(nll_labels)] = nll_labels
        sets.append((owner == rows) & (whole != -100) & (owner < B // 2))
    return torch.stack(sets).flatten(2)


@pytest.mark.parametrize("nll", [None, "all rows", "chosen half"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_sequence_mean(packed, nll):
    # 4 sequences of 5000: more than a block of 4096, a ragged rest; sequence 2 has no token;
    # packed ids in any order, and labels at an odd offset of their storage.
    values = -torch.rand(2, 4, 5000)  # log-probs: of one sign, no cancellation
    labels = torch.randint(0, 9, (2, 4, 5001))[..., 1:]
    labels = labels.masked_fill(torch.rand(labels.shape) < 0.3, -100)
    labels[0, 2] = -100
    ids = None
    if packed:
        values, labels, ids = values[:, 0], labels[:, 0].clone(), torch.randint(0, 4, (5000,))
        labels[0, ids == 2] = -100
    values = [each.clone().requires_grad_() for each in values]
    second = None if nll is None else (values[1], labels[1])
    if nll == "chosen half" and not packed:
        second = (values[1], labels[1][:2])
    before = len(launches)
    mean, count = sequence_mean(values[0], labels[0], second, sequence_ids=ids, num_sequences=4)
    leaves = values[: len(mean)]
    coefficients = torch.randn(mean.shape)
    found = torch.autograd.grad((mean * coefficients).sum(), leaves)
    assert launches[before:] == ["sequence_mean", "sequence_mean_backward"]

    member = parts(labels[0], None if second is None else second[1], ids)
    wide = [each.detach().double().requires_grad_() for each in leaves]
    terms = torch.stack([x.flatten() for x in wide])[:, None].expand(member.shape)
    true_count = member.sum(2)
    true_mean = torch.where(member, terms, 0.0).sum(2) / true_count.clamp(min=1)
    assert torch.equal(count.long(), true_count)
    assert_accurate(mean.detach(), true_mean.detach())
    truth = torch.autograd.grad((true_mean * coefficients.double()).sum(), wide)
    for ours, true in zip(found, truth, strict=True):
        assert_accurate(ours, true)


# Both branches of log1mexp, the clamp, a hopeless and a certain answer.
EDGE = [-1e-9, -(2.0**-26), -1e-4, -0.69, -0.70, -5.0, -80.0, -700.0]


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("by_token", [True, False], ids=["by token", "by pair"])
@pytest.mark.parametrize("given", [False, True], ids=["counted here", "counts given"])
@pytest.mark.parametrize("nll", [True, False], ids=["with NLL", "without"])
def test_pair_loss(sets, by_token, given, nll):
    # 64 pairs of edges and 300 random ones: two blocks of 256; every fifth lacks a side.
    chosen = [c for c in EDGE for _ in EDGE] + (-torch.rand(300) * 3).tolist()
    rejected = EDGE * len(EDGE) + (-torch.rand(300) * 3).tolist()
    mean = torch.tensor([chosen + rejected] * sets)
    mean[-1, : len(chosen)] -= torch.rand(len(chosen))
    count = torch.randint(1, 9, mean.shape).float()
    count[0, ::5] = 0.0
    mean[count == 0] = torch.nan  # which must not be read
    counts = {}
    if given:
        counts = {"num_nll_tokens": torch.tensor(5000), "num_pairs": torch.tensor(999.0)}
    options = {"beta": 0.3, "by_token": by_token, "nll": nll, **counts}
    before = len(launches)
    ours = mean.clone().requires_grad_()
    found = pair_loss(ours, count, **options)
    found.loss.backward()
    assert launches[before:] == ["pair_loss"]

    wide = mean.double().requires_grad_()  # float64 takes the plain form
    true = pair_loss(wide, count.double(), **options)
    true.loss.backward()
    for name in ("loss", "parts"):
        assert_accurate(getattr(found, name).detach(), getattr(true, name).detach())
    assert torch.equal(found.pair_mask, true.pair_mask)
    assert torch.equal(found.counts, true.counts)
    scored = found.pair_mask
    both = scored.repeat(2)
    assert_accurate(found.rewards[both], true.rewards[both])
    assert_accurate(found.log_odds_ratio[scored], true.log_odds_ratio[scored])
    # Of exponents up to 700, whose rounding is relative error of the gradient; 0 below 1e-38.
    torch.testing.assert_close(ours.grad.double(), wide.grad, rtol=1e-4, atol=1e-37)


@pytest.mark.parametrize("broken", [0, 3])
def test_a_nan_is_not_clamped_away(broken):
    # tl.minimum(nan, x) is x: the loss of a broken rejected answer would be a number.
    mean, count = -torch.rand(1, 4), torch.ones(1, 4)
    mean[0, broken] = torch.nan
    assert torch.isnan(pair_loss(mean, count, beta=0.1, by_token=True).loss)
    assert torch.isnan(odds_ratio_loss(mean[0, :2], mean[0, 2:])[0]).sum() == 1


def test_odds_ratio():
    # The edges, and 300 random pairs.
    chosen = torch.tensor([c for c in EDGE for _ in EDGE] + (-torch.rand(300) * 3).tolist())
    rejected = torch.tensor(EDGE * len(EDGE) + (-torch.rand(300) * 3).tolist())
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
