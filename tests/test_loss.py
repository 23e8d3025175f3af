"""orpo_loss against the definition, and against what TRL and LLaMA-Factory compute."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from orpo_kernels import PRESETS, ORPOLoss, linear_logps, orpo_loss, reference
from orpo_kernels.engine.sparse import plan
from orpo_kernels.loss import count_terms, orpo_loss_from_logps
from orpo_kernels.presets import NLL_SCOPES

P, T, H, V = 3, 11, 16, 50  # three pairs: one may be empty, two remain


def batch(dtype=torch.float64, pairs=P, length=T):
    hidden = torch.randn(2 * pairs, length, H, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, V, (2 * pairs, length))
    labels[torch.rand(2 * pairs, length) < 0.4] = -100
    labels[:, -2] = 1  # no side is empty by chance
    return hidden, weight, labels


def other_labels(labels):
    nll = torch.randint(0, V, labels.shape)
    nll[torch.rand(labels.shape) < 0.2] = -100
    return nll


def compare(found, true, inputs, rtol=1e-10):
    for name in ("loss", "nll_loss", "or_loss", "chosen_logps", "rejected_logps", "log_odds_ratio"):
        ours, exact = getattr(found, name), getattr(true, name)
        if name == "log_odds_ratio":  # of a skipped pair it means nothing
            ours, exact = ours[found.pair_mask], exact[found.pair_mask]
        torch.testing.assert_close(ours.double(), exact.double(), rtol=rtol, atol=rtol)
    pairs = zip(
        torch.autograd.grad(found.loss, inputs), torch.autograd.grad(true.loss, inputs), strict=True
    )
    for ours, exact in pairs:
        torch.testing.assert_close(ours, exact, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("reduction", ["token", "pair"])
@pytest.mark.parametrize("nll", ["same", "other", "chosen half"])
@pytest.mark.parametrize("empty", [(), (1,), (4,), (1, 4), tuple(range(6))])
def test_definition(reduction, nll, empty):
    hidden, weight, labels = batch()
    labels[list(empty)] = -100
    nll_labels = {"same": None}.get(nll, other_labels(labels))
    true = reference.orpo_loss(
        hidden, weight, labels, nll_labels=nll_labels, nll_reduction=reduction
    )
    given = nll_labels[:P] if nll == "chosen half" else nll_labels
    found = orpo_loss(hidden, weight, labels, nll_labels=given, nll_reduction=reduction)
    compare(found, true, (hidden, weight))
    assert found.skipped_pairs == true.skipped_pairs == {0: 0, 6: P}.get(len(empty), 1)
    assert found.loss == found.nll_loss + 0.1 * found.or_loss
    assert not any(each.requires_grad for each in found[1:] if each is not None)


@pytest.mark.parametrize("nll", ["same", "other"])
def test_without_the_nll(nll):
    hidden, weight, labels = batch()
    labels[1] = -100
    nll_labels = {"same": None}.get(nll, other_labels(labels))
    true = reference.orpo_loss(hidden, weight, labels, nll_labels=nll_labels, beta=0.3)
    found = orpo_loss(hidden, weight, labels, nll_labels=nll_labels, beta=0.3, nll=False)
    compare(found, true._replace(loss=0.3 * true.or_loss), (hidden, weight))
    module = ORPOLoss(beta=0.3, nll=False)
    assert torch.equal(module(hidden, weight, labels, nll_labels=nll_labels).loss, found.loss)
    assert "nll=False" in repr(module)
    with pytest.raises(TypeError, match="nll must be True or False, got 0"):
        ORPOLoss(nll=0)


def test_rewards_and_means_over_pairs():
    hidden, weight, labels = batch()
    labels[1] = -100
    found = orpo_loss(hidden, weight, labels, beta=0.3)
    torch.testing.assert_close(found.chosen_rewards, 0.3 * found.chosen_logps)
    torch.testing.assert_close(found.rejected_rewards, 0.3 * found.rejected_logps)
    counted = found.log_odds_ratio[found.pair_mask]
    torch.testing.assert_close(found.mean_log_odds_ratio, counted.mean())
    torch.testing.assert_close(found.mean_log_sigmoid, F.logsigmoid(counted).mean())
    nothing = orpo_loss(hidden, weight, torch.full_like(labels, -100))
    assert nothing.mean_log_odds_ratio == nothing.mean_log_sigmoid == 0


@pytest.mark.parametrize("reduction", ["token", "pair"])
@pytest.mark.parametrize("with_nll", [False, True])
def test_packed_equals_padded(reduction, with_nll):
    hidden, weight, labels = batch()
    nll = other_labels(labels) if with_nll else None
    padded = orpo_loss(hidden, weight, labels, nll_labels=nll, nll_reduction=reduction)
    order = torch.randperm(2 * P * T)
    ids = torch.arange(2 * P).repeat_interleave(T)[order]
    packed = orpo_loss(
        hidden.reshape(-1, H)[order], weight, labels.reshape(-1)[order],
        nll_labels=None if nll is None else nll.reshape(-1)[order],
        nll_reduction=reduction, sequence_ids=ids, num_sequences=2 * P,
    )  # fmt: skip
    compare(packed, padded, (hidden, weight))


def test_packed_with_an_empty_last_sequence():
    # Inferred from the ids, its pair would be missing, or with both of the last empty another.
    hidden, weight, labels = batch()
    keep = torch.arange(2 * P).repeat_interleave(T) < 2 * P - 1
    ids = torch.arange(2 * P).repeat_interleave(T)[keep]
    flat = hidden.reshape(-1, H)[keep], weight, labels.reshape(-1)[keep]
    found = orpo_loss(*flat, sequence_ids=ids, num_sequences=2 * P)
    assert found.skipped_pairs == 1
    labels[-1] = -100
    compare(found, orpo_loss(hidden, weight, labels), (hidden, weight))


@pytest.mark.parametrize("reduction", ["token", "pair"])
def test_exact_gradient_accumulation(reduction):
    # Ragged micro-batches, one with an empty pair: their sum is the large batch to the last digit.
    hidden, weight, labels = batch(pairs=4)
    labels[1] = labels[6, :5] = -100
    nll = other_labels(labels)
    tokens, pairs = count_terms(labels, nll)
    options = {"nll_reduction": reduction, "num_nll_tokens": tokens, "num_pairs": pairs}
    whole = orpo_loss(hidden, weight, labels, nll_labels=nll, nll_reduction=reduction)
    parts = [
        orpo_loss(
            hidden[[i, 4 + i]], weight, labels[[i, 4 + i]], nll_labels=nll[[i, 4 + i]], **options
        )
        for i in range(4)
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    for ours, exact in zip(
        torch.autograd.grad(sum(part.loss for part in parts), (hidden, weight)),
        torch.autograd.grad(whole.loss, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, exact)
    assert (int(tokens), int(pairs)) == (int(whole.num_nll_tokens), 3)


def trl_loss(hidden, weight, labels, nll_labels, beta):
    # TRL 1.16's definition on full logits, through its own odds_ratio_loss.
    trl = pytest.importorskip("trl.experimental.orpo.orpo_trainer", reason="TRL is a bench extra")
    logits = hidden @ weight.t()
    pairs = hidden.shape[0] // 2
    stub = type(
        "Stub", (), {"beta": beta, "accelerator": type("A", (), {"device": logits.device})()}
    )
    scored = labels != -100
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    means = (picked * scored).sum(-1) / scored.sum(-1)
    nll = F.cross_entropy(logits[:pairs].flatten(0, 1), nll_labels[:pairs].flatten())
    losses = trl.ORPOTrainer.odds_ratio_loss(stub(), means[:pairs], means[pairs:])[0]
    return nll - losses.mean()


def llamafactory_loss(hidden, weight, labels, nll_labels, beta):
    # Re-derived: mean log-prob of each completion; SFT term per pair; odds by log1p(-exp).
    scored = labels != -100
    picked = (
        (hidden @ weight.t()).log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    )
    chosen, rejected = ((picked * scored).sum(-1) / scored.sum(-1)).chunk(2)
    odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return (-chosen + beta * -F.logsigmoid(odds)).mean()


@pytest.mark.parametrize(
    ("preset", "theirs"), [("trl", trl_loss), ("llamafactory", llamafactory_loss)]
)
def test_presets(preset, theirs):
    hidden, weight, labels = batch(torch.float32)
    nll = labels.clone()
    nll[:, :4] = torch.randint(0, V, (2 * P, 4))  # the prompt, scored by the NLL only
    loss = ORPOLoss.from_preset(preset, beta=0.3)
    completion = PRESETS[preset].nll_scope == "completion"
    # A batch with the prompt's tokens in it, as PreferenceCollator makes by default, fits both.
    found = loss(hidden, weight, labels, nll_labels=nll)
    expected = theirs(hidden, weight, labels, labels if completion else nll, 0.3)
    torch.testing.assert_close(found.loss, expected, rtol=1e-6, atol=0)
    for ours, other in zip(
        torch.autograd.grad(found.loss, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight)),
        strict=True,
    ):
        assert (ours - other).norm() <= 1e-6 * other.norm()


def test_the_scope_of_the_nll_is_the_losses_own():
    hidden, weight, labels = batch()
    nll = other_labels(labels)
    logps, nll_logps = linear_logps(hidden, weight, (labels, nll))
    answers, whole, either = (ORPOLoss(0.1, "token", each) for each in (*NLL_SCOPES[::-1], None))
    for loss, expected in ((answers, None), (whole, nll), (either, nll)):
        true = orpo_loss(hidden, weight, labels, nll_labels=expected)
        assert torch.equal(loss(hidden, weight, labels, nll_labels=nll).loss, true.loss)
        found = loss.from_logps(logps, labels, nll_logps, nll)
        torch.testing.assert_close(found.nll_loss, true.nll_loss, rtol=1e-12, atol=0)
    assert answers.nll_labels_of(nll) is None
    assert whole.nll_labels_of(nll) is nll
    assert either(hidden, weight, labels).num_nll_tokens == (labels[:P] != -100).sum()


def test_module_and_from_logps_equal_the_function():
    hidden, weight, labels = batch()
    bias, nll = torch.randn(V, dtype=torch.float64), other_labels(labels)
    loss = ORPOLoss(beta=0.2, nll_reduction="pair", softcap=4.0)
    expected = orpo_loss(
        hidden, weight, labels, bias, nll_labels=nll, beta=0.2, nll_reduction="pair", softcap=4.0
    )
    assert torch.equal(loss(hidden, weight, labels, bias, nll).loss, expected.loss)
    logps, nll_logps = linear_logps(hidden, weight, (labels, nll), bias, softcap=4.0)
    torch.testing.assert_close(loss.from_logps(logps, labels, nll_logps, nll).loss, expected.loss)
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin(hidden, weight, labels, bias, nll).loss, expected.loss)
    assert repr(loss) == "ORPOLoss(beta=0.2, nll_reduction='pair', softcap=4.0)"


def test_clamps_are_counted():
    logps = torch.tensor([[0.0], [-1.0], [-1e-12], [0.0]], requires_grad=True)
    labels = torch.tensor([[1], [1], [1], [-100]])
    found = orpo_loss_from_logps(logps, labels)
    assert found.clamped_logps == 2  # the empty side is 0 too, and is not a clamp
    assert found.skipped_pairs == 1
    assert torch.isfinite(torch.autograd.grad(found.loss, logps)[0]).all()


def test_16_bit_logps_are_summed_in_float32():
    logps = torch.full((4, 5000), -1.0).bfloat16()
    found = orpo_loss_from_logps(logps, torch.ones(4, 5000, dtype=torch.int64))
    assert found.num_nll_tokens == 10_000
    assert found.nll_loss == 1.0


def test_unsigned_labels():
    hidden, weight, labels = batch()
    labels = labels.clamp(min=0)
    expected = orpo_loss(hidden, weight, labels, nll_labels=labels.flip(1))
    small = labels.to(torch.uint8)
    found = orpo_loss(hidden, weight, small, nll_labels=small.flip(1))
    assert torch.equal(found.loss, expected.loss)


def test_long_packed_sequences_keep_their_digits():
    # Added one after the other in float32, 65,536 terms lose two digits.
    logps = -torch.rand(131_072)
    labels = torch.ones(131_072, dtype=torch.int64)
    ids = torch.arange(2).repeat_interleave(65_536)
    found = orpo_loss_from_logps(logps, labels, sequence_ids=ids, num_sequences=2)
    truth = logps.double().view(2, -1).mean(1)
    torch.testing.assert_close(found.chosen_logps.double(), truth[:1], rtol=1e-7, atol=0)


def test_ignore_index_inside_the_vocabulary():
    hidden, weight, labels = batch()
    inside = labels.masked_fill(labels == -100, 7)
    expected = orpo_loss(hidden, weight, inside.masked_fill(inside == 7, -100))
    found = orpo_loss(hidden, weight, inside, ignore_index=7)
    assert torch.equal(found.loss, expected.loss)


def test_compiles():
    loss = ORPOLoss(0.2, softcap=4.0)

    def step(hidden, weight, labels, nll):
        of_function = orpo_loss(hidden, weight, labels, nll_labels=nll, logit_scale=2.0).loss
        return of_function + loss(hidden, weight, labels, nll_labels=nll, num_pairs=7).loss

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    hidden, weight, labels = batch()
    nll = other_labels(labels)
    torch.testing.assert_close(
        compiled(hidden, weight, labels, nll), step(hidden, weight, labels, nll)
    )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("two_sets", [False, True])
def test_sparse_averages_chosen_and_rejected_apart(two_sets, packed, monkeypatch):
    monkeypatch.setattr(plan, "live_share", lambda device: 1.0)  # a toy head is flat
    hidden, weight, labels = batch()
    nll_labels = other_labels(labels) if two_sets else None
    options = {"gradient": "sparse", "eps": 0.02}
    sides = torch.tensor([0] * P + [1] * P)[:, None].expand(labels.shape)
    if packed:
        kept = (labels != -100).view(-1)
        if two_sets:
            kept |= (nll_labels != -100).view(-1)
            nll_labels = nll_labels.view(-1)[kept]
        ids = torch.arange(2 * P).repeat_interleave(T)[kept]
        hidden = hidden.detach().reshape(-1, H)[kept].requires_grad_()
        labels, sides = labels.view(-1)[kept], sides.reshape(-1)[kept]
        options |= {"sequence_ids": ids, "num_sequences": 2 * P}
    found = orpo_loss(hidden, weight, labels, nll_labels=nll_labels, **options)
    by_hand = orpo_loss(hidden, weight, labels, nll_labels=nll_labels, tail_groups=sides, **options)
    together = orpo_loss(
        hidden,
        weight,
        labels,
        nll_labels=nll_labels,
        tail_groups=torch.zeros_like(labels),
        **options,
    )
    exact = orpo_loss(
        hidden, weight, labels, nll_labels=nll_labels, **{**options, "gradient": "exact"}
    )
    torch.testing.assert_close(found.loss, exact.loss, rtol=1e-13, atol=0)
    assert exact.sparse is None
    ours, same, other, true = (
        torch.autograd.grad(each.loss, hidden)[0] for each in (found, by_hand, together, exact)
    )
    assert torch.equal(ours, same)
    assert not torch.equal(ours, other)
    assert 0 < (ours - true).norm() < 0.3 * true.norm()
    certificate = found.sparse
    assert 0 < certificate.kept_share < 1
    assert 0 < certificate.tail_mass < certificate.tail_mass_max < 1
    expected = (0.02 * certificate.tail_mass_max).sqrt()
    torch.testing.assert_close(certificate.residual_rms_max, expected)
    assert certificate.residual_rms < certificate.residual_rms_max
