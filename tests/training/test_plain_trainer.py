"""A stock `transformers.Trainer` with nothing of ours but the head and the collator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from orpo_kernels import ORPOLoss, fuse_head
from orpo_kernels.training import PreferenceCollator, prepare_dataset
from tests.tiny_models import build, tiny_tokenizer
from tests.training.runs import history, make, pairs, settings


def plain(folder: Path, model: Any, **changes: Any) -> Trainer:
    tokenizer = tiny_tokenizer()
    options = settings(folder, **changes)
    max_length = options.pop("max_length")
    return Trainer(
        model,
        TrainingArguments(**options, remove_unused_columns=False),
        data_collator=PreferenceCollator(tokenizer),
        train_dataset=prepare_dataset(pairs(24), tokenizer, max_length=max_length),
        eval_dataset=prepare_dataset(pairs(8, seed=1), tokenizer, max_length=max_length),
    )


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("lora", [False, True])
def test_same_steps_as_orpo_trainer(accumulate: int, lora: bool, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"gradient_accumulation_steps": accumulate}
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(get_peft_model(build("llama"), config) if lora else build("llama"))
    fuse_head(models[0], loss=ORPOLoss(beta=0.1))
    stock = history(plain(tmp_path / "plain", models[0], **changes))
    ours = history(make(tmp_path / "ours", models[1], **changes))
    for one, other in zip(stock[:-1], ours[:-1], strict=True):
        for name in ("loss", "grad_norm", "learning_rate"):
            assert one[name] == pytest.approx(other[name], rel=1e-5), name


@pytest.mark.parametrize("preset", ["trl", "llamafactory", "paper"])
def test_a_preset_is_a_whole_preset(preset: str, tmp_path: Path) -> None:
    # The default collator's batches have the prompt's labels, LLaMA-Factory's NLL has not.
    model = build("llama")
    fuse_head(model, loss=ORPOLoss.from_preset(preset))
    loss = plain(tmp_path / "plain", model).evaluate()["eval_loss"]
    ours = make(tmp_path / "ours", preset=preset, eval_dataset=pairs(8, seed=1))
    assert loss == pytest.approx(ours.evaluate()["eval_loss"], rel=1e-6)


def test_a_collator_that_leaves_the_prompt_out(tmp_path: Path) -> None:
    model = build("llama")
    fuse_head(model, loss=ORPOLoss.from_preset("trl"))
    trainer = plain(tmp_path, model)
    trainer.data_collator = PreferenceCollator(tiny_tokenizer(), nll_scope="completion")
    with pytest.raises(ValueError, match=r"needs nll_labels, .* PreferenceCollator makes them"):
        trainer.evaluate()


def test_prediction_has_a_row_for_each_pair(tmp_path: Path) -> None:
    model = build("llama")
    fuse_head(model, loss=ORPOLoss())
    trainer = plain(tmp_path, model, per_device_eval_batch_size=3)  # 8 pairs: the last batch has 2
    trainer.data_collator = PreferenceCollator(tiny_tokenizer(), pad_to_multiple_of=64)  # one T
    output = trainer.predict(trainer.eval_dataset)
    assert output.label_ids.shape == (8, 2, 64)
    assert [each.shape for each in output.predictions[:-1]] == [(8, 2, 64, 0), *[(8, 2, 64)] * 2]
    assert output.predictions[-1]["chosen_logps"].shape == (8,)


def test_evaluation(tmp_path: Path) -> None:
    model = build("llama")
    fuse_head(model, loss=ORPOLoss())
    loss = plain(tmp_path, model).evaluate()["eval_loss"]
    ours = make(tmp_path, eval_dataset=pairs(8, seed=1)).evaluate()["eval_loss"]
    assert loss == pytest.approx(ours, rel=1e-6)
