"""A stock `transformers.Trainer` on a fused model: metrics, scales, and what is left behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from orpo_kernels import ORPOLoss
from orpo_kernels.integrations.transformers import fuse_head
from tests.integrations.helpers import BETA
from tests.tiny_models import build

LOSS = ORPOLoss(BETA)


def pairs(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(5, 300, (count, 2, 6), generator=generator))


def collate(batch: list[Tensor]) -> dict[str, Tensor]:
    ids = torch.cat([torch.stack([pair[side] for pair in batch]) for side in (0, 1)])
    return {"input_ids": ids, "labels": ids}


def trainer_of(
    model: nn.Module, folder: Path, accumulate: int = 1, batch: int = 2, **options: Any
) -> Trainer:
    args = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, save_strategy="no",
        remove_unused_columns=False, per_device_eval_batch_size=2, max_steps=2, logging_steps=1,
        per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    return Trainer(model, args, data_collator=collate, train_dataset=pairs(8), **options)


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("rows", [8, 7], ids=["even", "last batch smaller"])
def test_predict_and_compute_metrics(rows: int, tmp_path: Path) -> None:
    model = build("llama")
    seen: list[Any] = []

    def compute_metrics(prediction: Any) -> dict[str, float]:
        terms = prediction.predictions[-1]
        seen.append(terms)
        return {"accuracy": float((terms["log_odds_ratio"] > 0).mean())}

    data = pairs(rows)
    trainer = trainer_of(model, tmp_path, eval_dataset=data, compute_metrics=compute_metrics)
    with fuse_head(model, loss=LOSS):
        model.eval()
        expected = model(**collate(data)).orpo
        accuracy = trainer.evaluate()["eval_accuracy"]
        predicted = trainer.predict(data).predictions[-1]
    assert accuracy == pytest.approx(float((expected.log_odds_ratio > 0).float().mean()))
    for terms in (*seen, predicted):
        for name in ("chosen_logps", "rejected_logps", "log_odds_ratio"):
            theirs = getattr(expected, name)
            torch.testing.assert_close(torch.from_numpy(terms[name]), theirs, rtol=0, atol=1e-5)


def test_a_trainer_made_before_the_head_was_fused(tmp_path: Path) -> None:
    # It asked the model whether the model's own loss is divided by the step's tokens: it is.
    trainers = [trainer_of(build("llama"), tmp_path, accumulate) for accumulate in (1, 2)]
    with fuse_head(trainers[0].model, loss=LOSS), fuse_head(trainers[1].model, loss=LOSS):
        ours = losses(trainers[0])
        with pytest.raises(ValueError, match=r"num_items_in_batch=40 .* make it after fuse_head"):
            trainers[1].train()
    model = build("llama")
    with fuse_head(model, loss=LOSS):
        assert losses(trainer_of(model, tmp_path)) == ours
    steps = []
    for options in ({"accumulate": 2}, {"batch": 4}):  # answers of equal length: the same mean
        model = build("llama")
        with fuse_head(model, loss=LOSS):
            steps.append(losses(trainer_of(model, tmp_path, **options)))
    assert steps[0] == pytest.approx(steps[1], rel=1e-5)


class Perplexity(TrainerCallback):
    """What many write: the model's own loss on a text, while it trains."""

    def __init__(self, paused: Any) -> None:
        self.paused, self.seen = paused, []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ids = pairs(1)[0][:1]
        with torch.no_grad(), self.paused():
            self.seen.append(float(kwargs["model"](input_ids=ids, labels=ids).loss))


def test_the_models_own_loss_during_and_after_training(tmp_path: Path) -> None:
    model = build("llama")
    ids = pairs(1)[0][:1]
    with fuse_head(model, loss=LOSS) as fused:
        callback = Perplexity(fused.paused)
        trainer_of(model, tmp_path, callbacks=[callback]).train()
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
        expected = float(nn.functional.cross_entropy(logits, ids[0, 1:]))
        after = float(model(input_ids=ids, labels=ids).loss)
    assert after == pytest.approx(expected, rel=1e-5)
    assert callback.seen[-1] == pytest.approx(after, rel=1e-5)
    assert "fused" not in repr(model)
