"""Every number TRL 1.16's ORPOTrainer logs, step by step: loss, gradient norm and all metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

from orpo_kernels.training import ORPOConfig
from tests.tiny_models import build
from tests.training.runs import TRLConfig, history, largest_difference, make, pairs

TOLERANCE = 1e-4  # relative where a value is above 1; the largest seen is below 1e-5

FAMILIES = {
    "llama": "the plain case",
    "qwen2": "biases in attention",
    "qwen3": "norms in attention",
    "gemma2": "softcap, tied head, scaled embeddings",
    "phi": "bias in the head",
    "gpt2": "learned positions, tied head",
    "cohere": "logit scale",
    "granite": "logit divisor",
    "mixtral": "auxiliary loss",
    "qwen2_moe": "auxiliary loss, shared expert",
}


def compare(folder: Path, model: str = "llama", **options: Any) -> float:
    ours = history(make(folder / "ours", model, **options))
    options.pop("loss_normalization", None)
    return largest_difference(ours, history(make(folder / "trl", model, trl=True, **options)))


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning(family: str, tmp_path: Path) -> None:
    # Micro-batches of different lengths: the mean of their means is not the mean over tokens.
    assert compare(tmp_path, family, gradient_accumulation_steps=2) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
def test_lora(family: str, tmp_path: Path) -> None:
    # Dropout in the adapter: both trainers switch it off.
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    lora = LoraConfig(
        r=4, target_modules=targets, lora_dropout=0.3, fan_in_fan_out="gpt2" in family
    )
    options = {"peft_config": lora, "gradient_accumulation_steps": 2, "learning_rate": 2e-2}
    assert compare(tmp_path, family, **options) < TOLERANCE


def test_lora_on_the_head(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    assert compare(tmp_path, peft_config=lora, learning_rate=2e-2) < TOLERANCE


def test_opt(tmp_path: Path) -> None:
    # Without dropout in the config: OPT keeps its rate as a number, which TRL leaves on.
    pair = [
        history(make(tmp_path / str(trl), build("opt", dropout=0.0), trl=trl))
        for trl in (False, True)
    ]
    assert largest_difference(*pair) < TOLERANCE


@pytest.mark.parametrize("implied", [False, True])
def test_conversations(implied: bool, tmp_path: Path) -> None:
    rows = []
    for row in pairs(24):
        prompt = [{"role": "user", "content": row["prompt"]}]
        chosen, rejected = (
            [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")
        )
        if implied:  # with a text prompt beside it, as mlabonne/orpo-dpo-mix-40k has
            chosen, rejected, prompt = prompt + chosen, prompt + rejected, row["prompt"]
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert compare(tmp_path, train_dataset=Dataset.from_list(rows), max_length=96) < TOLERANCE


def test_evaluation(tmp_path: Path) -> None:
    # 8 rows: TRL averages the means of batches, ours is the mean over rows; the same here.
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": pairs(8, seed=1)}
    assert compare(tmp_path, "qwen2", **options) < TOLERANCE


def test_last_batch_of_an_epoch_is_smaller(tmp_path: Path) -> None:
    # 7 rows in batches of 2: every fourth batch is one pair, alone in its accumulation.
    assert compare(tmp_path, train_dataset=pairs(7), max_steps=6) < TOLERANCE


def test_truncated_answers(tmp_path: Path) -> None:
    # 24 tokens: the longest prompts leave room for one or two answer tokens.
    assert compare(tmp_path, max_length=24) < TOLERANCE


def test_another_beta(tmp_path: Path) -> None:
    assert compare(tmp_path, beta=0.7) < TOLERANCE


def test_a_padding_value_that_is_not_the_tokenizers(tmp_path: Path) -> None:
    # TRL pads with both, so the mean logits, over padding too, differ; the training does not.
    value = 7
    trainers = [make(tmp_path / str(trl), padding_value=value, trl=trl) for trl in (False, True)]
    assert trainers[0].processing_class.pad_token_id != value
    batch = next(iter(trainers[0].get_train_dataloader()))
    assert set(batch["input_ids"][batch["attention_mask"] == 0].tolist()) == {value}
    ours, theirs = (
        [{k: v for k, v in log.items() if "logits/" not in k} for log in history(trainer)]
        for trainer in trainers
    )
    assert largest_difference(ours, theirs) < TOLERANCE


def test_reentrant_checkpointing_with_frozen_embeddings(tmp_path: Path) -> None:
    options = {
        "peft_config": LoraConfig(r=4, target_modules=["q_proj"]),
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    }
    assert compare(tmp_path, **options) < TOLERANCE


def test_parameters_after_five_steps(tmp_path: Path) -> None:
    trainers = [make(tmp_path / str(trl), "gemma2", trl=trl) for trl in (False, True)]
    for trainer in trainers:
        trainer.train()
    ours, theirs = (dict(trainer.model.named_parameters()) for trainer in trainers)
    start = dict(build("gemma2").named_parameters())
    assert ours.keys() == theirs.keys() == start.keys()
    for name, value in ours.items():
        # AdamW's update is lr * sign(gradient) where a gradient is rounding noise: 5 steps of 2e-3.
        torch.testing.assert_close(value, theirs[name], rtol=0, atol=2e-4, msg=name)
        assert not torch.equal(value, start[name])


def test_defaults_equal_trl(tmp_path: Path) -> None:
    # TRL's own default of bf16 cannot be had on a CPU without asking for it.
    common = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False}
    ours, theirs = ORPOConfig(**common), TRLConfig(**common)
    for name, value in vars(theirs).items():
        if name not in ("logging_dir", "accelerator_config", "distributed_state"):
            assert getattr(ours, name) == value, name
