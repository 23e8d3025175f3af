"""What the loss of an optimizer step is divided by, and that the logs say the same."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from tests.training.runs import history, make, pairs

STEP = {"max_steps": 3, "optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 1e9}
LOGGED = ("loss", "grad_norm", "nll_loss", "log_odds_ratio", "logps/chosen", "rewards/accuracies")


def run(folder: Path, size: int, accumulate: int, **options: Any) -> tuple[Any, list[Any]]:
    trainer = make(
        folder / f"{size}x{accumulate}-{options.get('loss_normalization')}",
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulate,
        **{**STEP, **options},
    )
    return trainer, history(trainer)


def largest_difference(one: Any, other: Any) -> float:
    a, b = (torch.cat([p.detach().flatten() for p in t.model.parameters()]) for t in (one, other))
    return float((a - b).abs().max())


def test_global_is_exact_for_ragged_batches(tmp_path: Path) -> None:
    reference, logs = run(tmp_path, 4, 1, loss_normalization="global")
    # With one micro-batch the two normalisations are the same thing.
    plain, _ = run(tmp_path, 4, 1, loss_normalization="micro_batch")
    assert largest_difference(plain, reference) == 0.0
    for size, accumulate in ((1, 4), (2, 2)):
        cut, cut_logs = run(tmp_path, size, accumulate, loss_normalization="global")
        assert largest_difference(cut, reference) < 2e-6
        for one, other in zip(cut_logs[:-1], logs[:-1], strict=True):
            for name in LOGGED:
                assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-6), name
    # And the mean of means is something else: the test can fail.
    means, _ = run(tmp_path, 1, 4, loss_normalization="micro_batch")
    assert largest_difference(means, reference) > 1e-4


@pytest.mark.parametrize("normalization", ["micro_batch", "global"])
def test_equal_lengths_are_exact_either_way(normalization: str, tmp_path: Path) -> None:
    options = {"train_dataset": pairs(12, ragged=False), "loss_normalization": normalization}
    reference, _ = run(tmp_path, 4, 1, **options)
    cut, _ = run(tmp_path, 1, 4, **options)
    assert largest_difference(cut, reference) < 2e-6


@pytest.mark.parametrize("preset", ["llamafactory", "xfactlab"])
def test_global_is_exact_for_every_preset(preset: str, tmp_path: Path) -> None:
    options = {"preset": preset, "loss_normalization": "global"}
    reference, _ = run(tmp_path, 4, 1, **options)
    cut, _ = run(tmp_path, 1, 4, **options)
    assert largest_difference(cut, reference) < 2e-6


def test_global_with_rows_that_have_no_answer(tmp_path: Path) -> None:
    # 20 tokens: of the 24 prompts some leave no room, also alone in a micro-batch.
    options = {"loss_normalization": "global", "max_length": 20, "max_steps": 6}
    reference, logs = run(tmp_path, 4, 1, **options)
    cut, cut_logs = run(tmp_path, 1, 4, **options)
    assert largest_difference(cut, reference) < 2e-6
    skipped = [log["skipped_pairs"] for log in logs[:-1]]
    assert skipped == [log["skipped_pairs"] for log in cut_logs[:-1]]
    assert sum(skipped) > 0


@pytest.mark.parametrize("normalization", ["micro_batch", "global"])
@pytest.mark.parametrize("every", [1, 3])
def test_logged_loss_is_the_loss(normalization: str, every: int, tmp_path: Path) -> None:
    options = {"loss_normalization": normalization, "logging_steps": every, "beta": 0.3}
    _, logs = run(tmp_path, 2, 2, **options)
    for log in logs[:-1]:
        # Both sides are means over the same steps, of terms the log shows one by one.
        assert log["loss"] == pytest.approx(log["nll_loss"] - 0.3 * log["log_odds_ratio"], rel=1e-5)


def test_logged_loss_of_a_last_step_of_fewer_micro_batches(tmp_path: Path) -> None:
    # 14 pairs, of which the second step takes one batch of two; the log is of both steps. `loss` is
    # the mean of their losses, so that is what `nll_loss` must be, ragged as the lengths are.
    options = {"train_dataset": pairs(14), "max_steps": 2, "logging_steps": 2, "beta": 0.0}
    _, logs = run(tmp_path, 2, 6, **options)
    assert logs[0]["nll_loss"] == pytest.approx(logs[0]["loss"], rel=1e-6)


def test_auxiliary_loss_is_logged_and_in_the_loss(tmp_path: Path) -> None:
    for normalization in ("micro_batch", "global"):
        trainer = make(
            tmp_path / normalization,
            "mixtral",
            gradient_accumulation_steps=2,
            loss_normalization=normalization,
        )
        for log in history(trainer)[:-1]:
            orpo = log["nll_loss"] - 0.1 * log["log_odds_ratio"]
            assert log["loss"] == pytest.approx(orpo + 0.1 * log["aux_loss"], rel=1e-5)


def test_a_batch_without_a_scored_pair(tmp_path: Path) -> None:
    # 5 tokens: every prompt fills the length.
    trainer, logs = run(tmp_path, 2, 1, max_length=5, loss_normalization="global")
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    assert [log["skipped_pairs"] for log in logs[:-1]] == [2, 2, 2]
    assert all(log["loss"] == 0 and log["grad_norm"] == 0 for log in logs[:-1])
    assert math.isnan(logs[0]["rewards/accuracies"])
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, before[name])


def test_flags_of_both_generations_of_trainer(tmp_path: Path, monkeypatch: Any) -> None:
    assert make(tmp_path).loss_is_scaled_for_ga is False
    assert make(tmp_path, loss_normalization="global").loss_is_scaled_for_ga is True
    # transformers before 5.19 goes by these two instead.
    monkeypatch.delattr(Trainer, "loss_is_scaled_for_ga")
    trainer = make(tmp_path, loss_normalization="global")
    assert trainer.model_accepts_loss_kwargs is False
    with pytest.raises(RuntimeError, match=re.escape("do not call this")):
        trainer.compute_loss_func()
    assert make(tmp_path).compute_loss_func is None
