"""The preset "xfactlab" against what xfactlab/orpo's trainer computes, from full logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels import ORPOLoss, fuse_head
from orpo_kernels.training import PreferenceCollator, prepare_dataset
from tests.tiny_models import build, tiny_tokenizer
from tests.training.runs import history, make, pairs

ALPHA, LENGTH = 0.3, 24  # 24 tokens: of the answers some are cut there, and have no padding


def padded(rows: list[Any], name: str, value: int) -> Tensor:
    return torch.tensor([row[name] + [value] * (LENGTH - len(row[name])) for row in rows])


def theirs(model: Any, rows: list[Any], eos: int) -> Tensor:
    """Derived from src/orpo_trainer.py (commit 0f0abfe): everything padded with EOS to LENGTH."""

    def side(name: str) -> tuple[Tensor, Tensor, Tensor]:
        ids = padded(rows, f"{name}_input_ids", eos)
        lengths = torch.tensor([len(row[f"{name}_input_ids"]) for row in rows])[:, None]
        attention = (torch.arange(LENGTH) < lengths).long()
        prompt = (padded(rows, f"{name}_labels", 0) == -100).long()
        logits = model(input_ids=ids, attention_mask=attention).logits
        mask = attention[:, :-1] - prompt[:, 1:]
        logps = logits[:, :-1].log_softmax(-1).gather(2, (mask * ids[:, 1:])[..., None])[..., 0]
        labels = ids.masked_fill(ids == eos, -100)[:, 1:]
        return (logps * mask).sum(1) / mask.sum(1), logits[:, :-1], labels

    chosen, logits, labels = side("chosen")
    rejected, _, _ = side("rejected")
    nll = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    return (nll - ALPHA * odds.sigmoid().log()).mean()


def data(count: int) -> tuple[Any, list[Any]]:
    tokenizer = tiny_tokenizer()
    rows = list(prepare_dataset(pairs(count), tokenizer, max_length=LENGTH))
    lengths = {len(row[f"{side}_input_ids"]) for row in rows for side in ("chosen", "rejected")}
    assert max(lengths) == LENGTH > min(lengths)
    # A row whose prompt fills it has no answer: NaN there, skipped here.
    has_answer = [r for r in rows if {*r["chosen_labels"]} > {-100} < {*r["rejected_labels"]}]
    return tokenizer, has_answer


def test_loss_and_gradients() -> None:
    tokenizer, rows = data(8)
    model = build("llama").double()
    collator = PreferenceCollator(
        tokenizer, nll_scope="prompt+completion-pad", odds_scope="completion+pad", max_length=LENGTH
    )
    batch = collator(rows)
    assert collator.pad_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
    expected = theirs(model, rows, tokenizer.eos_token_id)
    parameters = list(model.parameters())
    true = torch.autograd.grad(expected, parameters)
    with fuse_head(model, loss=ORPOLoss(ALPHA, "token", "prompt+completion")):
        found = model(**batch)
    torch.testing.assert_close(found.loss, expected, rtol=1e-12, atol=0)
    for ours, other in zip(torch.autograd.grad(found.loss, parameters), true, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-12)


def test_the_trainer_sets_it_up(tmp_path: Path) -> None:
    tokenizer, rows = data(4)
    expected = theirs(build("llama"), rows[:2], tokenizer.eos_token_id).item()
    options = {"preset": "xfactlab", "beta": ALPHA, "max_length": LENGTH, "max_steps": 1}
    trainer = make(tmp_path, **options)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows[:2])).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    paper = make(tmp_path / "paper", **{**options, "preset": "paper"})
    other = paper.compute_loss(paper.model, paper.data_collator(rows[:2])).item()
    assert other != pytest.approx(expected, rel=1e-3)  # flat logits: a little
    assert history(trainer)[0]["loss"] > 0


def test_the_batch() -> None:
    row = {
        "chosen_input_ids": [5, 2, 6, 2], "chosen_labels": [-100, -100, 6, 2],
        "rejected_input_ids": [5, 8], "rejected_labels": [-100, 8],
    }  # fmt: skip
    scopes = {"nll_scope": "prompt+completion-pad", "odds_scope": "completion+pad"}
    batch = PreferenceCollator(pad_token_id=2, **scopes)([row])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[[5, 2, 6, 2, 2], [5, 8, 2, 2, 2]]],
        "attention_mask": [[[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]],
        "labels": [[[-100, -100, 6, 2, 2], [-100, 8, 2, -100, -100]]],
        "nll_labels": [[[5, -100, 6, -100, -100], [-100] * 5]],
    }
    # A row as long as max_length has no position after it.
    full = PreferenceCollator(pad_token_id=2, max_length=4, **scopes)([row])
    assert full["labels"].tolist() == [[[-100, -100, 6, 2], [-100, 8, 2, -100]]]


def test_the_loss_alone_cannot_have_it() -> None:
    with pytest.raises(ValueError, match=r"odds_scope='completion\+pad'\) and take ORPOLoss"):
        ORPOLoss.from_preset("xfactlab")
