"""What the loss refuses, at each of its entries, and what it says."""

import pytest
import torch

from orpo_kernels import ORPOLoss, orpo_loss
from orpo_kernels.loss import count_terms, orpo_loss_from_logps
from tests.test_loss import H, P, T, batch


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, w, l: (h[:3], w, l[:3], {}), "in pairs.*got 3 sequences"),
        (lambda h, w, l: (h[0], w, l[0], {}), "packed .* needs sequence_ids"),
        (lambda h, w, l: (h, w, l[:4], {}), "labels must have the shape"),
        (lambda h, w, l: (h, w, l, {"nll_labels": l[:1]}), "nll_labels must be"),
        (lambda h, w, l: (h, w, l, {"nll_reduction": "mean"}), "nll_reduction must be one of"),
        (lambda h, w, l: (h[0], w, l[0], {"sequence_ids": l}), "must both be"),
        (
            lambda h, w, l: (h[0], w, l[0], {"sequence_ids": l[0] * 0 + 4, "num_sequences": 2}),
            "sequence_ids must be in",
        ),
    ],
)
def test_rejects(change, message):
    hidden, weight, labels, options = change(*batch())
    with pytest.raises(ValueError, match=message):
        orpo_loss(hidden, weight, labels, **options)


def test_packed_sequences_are_counted_by_the_caller():
    # Four sequences, the last two empty: from the ids it would be a pair of the first two.
    hidden, weight, labels = torch.randn(6, H), torch.randn(9, H), torch.ones(6).long()
    ids, loss = torch.tensor([0, 0, 0, 1, 1, 1]), ORPOLoss()
    for call in (
        lambda **given: orpo_loss(hidden, weight, labels, **given),
        lambda **given: loss(hidden, weight, labels, **given),
        lambda **given: orpo_loss_from_logps(-torch.ones(6), labels, **given),
        lambda **given: loss.from_logps(-torch.ones(6), labels, **given),
        lambda **given: count_terms(labels, **given),
    ):
        with pytest.raises(ValueError, match=r"need num_sequences: .* pass num_sequences=2P"):
            call(sequence_ids=ids)
        call(sequence_ids=ids, num_sequences=4)
        for wrong, message in ((4.0, "must be an integer, got 4.0"), (True, "got True")):
            with pytest.raises(TypeError, match=message):
                call(sequence_ids=ids, num_sequences=wrong)
    assert count_terms(labels, sequence_ids=ids, num_sequences=4)[1] == 0
    with pytest.raises(ValueError, match="have 2 rows, got num_sequences=4"):
        count_terms(torch.ones(2, 3).long(), num_sequences=4)
    with pytest.raises(ValueError, match=r"in pairs.*got 3 sequences"):
        count_terms(labels, sequence_ids=ids, num_sequences=3)


def _entries():
    # Every way labels come in: a function of labels, nll_labels and sequence_ids, one of them bad.
    hidden, weight, labels = batch()
    logps, flat, loss = torch.zeros(labels.shape), labels.view(-1), ORPOLoss()
    ids = torch.arange(2 * P).repeat_interleave(T)
    packed = {"num_sequences": 2 * P}
    for name, good in (("labels", labels), ("nll_labels", labels), ("sequence_ids", ids)):
        for bad in (good > 0, good.float()):
            given = {"labels": labels, "nll_labels": labels, name: bad}
            nll_logps = logps
            if name == "sequence_ids":
                given = {"labels": flat, "nll_labels": flat, name: bad, **packed}
                nll_logps = logps.view(-1)
            tokens = {"token_logps": nll_logps, "nll_token_logps": nll_logps}
            states = {"hidden": hidden if nll_logps.ndim == 2 else hidden.view(-1, H)}
            yield name, lambda g=given, s=states: orpo_loss(weight=weight, **s, **g)
            yield name, lambda g=given, s=states: loss(weight=weight, **s, **g)
            yield name, lambda g=given, t=tokens: orpo_loss_from_logps(**t, **g)
            yield name, lambda g=given, t=tokens: loss.from_logps(**t, **g)
            yield name, lambda g=given: count_terms(**g)


def test_masks_and_floats_are_no_labels():
    # Cast, a mask would train on the tokens 0 and 1.
    entries = list(_entries())
    assert len(entries) == 3 * 2 * 5
    for name, call in entries:
        with pytest.raises(TypeError, match=rf"^{name} must be integer"):
            call()


def test_log_probs_belong_to_the_labels():
    logps, labels = torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"token_logps must have the shape of labels, \(4, 3\)"):
        orpo_loss_from_logps(logps[:, :1], labels)
    with pytest.raises(ValueError, match="nll_token_logps must have the shape of labels"):
        orpo_loss_from_logps(logps, labels, logps[:, :1], labels)
    with pytest.raises(TypeError, match="token_logps must be floating point"):
        orpo_loss_from_logps(labels, labels)


def test_narrow_sequence_ids():
    hidden, weight, labels = batch()
    ids = torch.arange(2 * P).repeat_interleave(T)
    flat = (hidden.view(-1, H), weight, labels.view(-1))
    losses = [
        orpo_loss(*flat, sequence_ids=ids.to(dtype), num_sequences=2 * P).loss
        for dtype in (torch.int64, torch.int32, torch.uint8)
    ]
    assert losses[0] == losses[1] == losses[2]


def test_a_batch_without_the_prompt_for_an_nll_with_it():
    hidden, weight, labels = batch()
    for loss in (ORPOLoss.from_preset("trl"), ORPOLoss(nll_scope="prompt+completion")):
        for call in (
            lambda loss=loss: loss(hidden, weight, labels),
            lambda loss=loss: loss.from_logps(torch.zeros(labels.shape), labels),
        ):
            with pytest.raises(ValueError, match=r"needs nll_labels, .* PreferenceCollator makes"):
                call()
    with pytest.raises(ValueError, match=r"nll_scope must be one of .*; did you mean 'completion'"):
        ORPOLoss(nll_scope="completions")


def test_rejects_unknown_names():
    with pytest.raises(ValueError, match="nll_reduction"):
        ORPOLoss(nll_reduction="sum")
    one = torch.zeros(2, 2), torch.zeros(2, 2).long(), torch.zeros(2, 2)
    for scope in (None, "completion"):
        with pytest.raises(ValueError, match="go together"):
            ORPOLoss(nll_scope=scope).from_logps(*one)
    with pytest.raises(ValueError, match="go together"):
        orpo_loss_from_logps(torch.zeros(2, 2), torch.zeros(2, 2).long(), torch.zeros(2, 2))
