"""Training in rows without padding, or with the prompt once, is the same training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from orpo_kernels import ORPOLoss, fuse_head
from orpo_kernels.integrations import trl
from tests.tiny_models import build
from tests.training.runs import CLOCKS, history, largest_difference, make, pairs
from tests.training.test_plain_trainer import plain

LAYOUTS = ("packed", "shared_prompt")
TOLERANCE = 1e-4  # after five steps of AdamW, whose first divide rounding by rounding
OF_PADDING = ("logits/chosen", "logits/rejected", "computed_share", "unshared_pairs")
CLOCKS = (*CLOCKS, "preparation_time")


def without_padding(logs: list[dict[str, float]]) -> list[dict[str, float]]:
    """What does not depend on how much padding there is."""
    return [{k: v for k, v in log.items() if not k.endswith(OF_PADDING)} for log in logs]


def changed(rows: list[dict[str, float]], padded: list[dict[str, float]]) -> float:
    """Over all logs and metrics, |rows - padded| / max(1, |padded|)."""
    worst = 0.0
    for one, other in zip(without_padding(rows), without_padding(padded), strict=True):
        assert one.keys() == other.keys()
        for name in other.keys() - {name for name in other if name.endswith(CLOCKS)}:
            worst = max(worst, abs(one[name] - other[name]) / max(1.0, abs(other[name])))
    return worst


def compare(folder: Path, layout: str, model: Any = "llama", **options: Any) -> float:
    """Five steps of ours in a layout and of TRL, on the same pairs in the same order."""
    make_model = model if callable(model) else lambda: build(model)
    ours, theirs = (
        without_padding(
            history(make(folder / str(is_trl), make_model(), trl=is_trl, **options, **own))
        )
        for is_trl, own in ((False, {"batch_layout": layout}), (True, {}))
    )
    return largest_difference(ours, theirs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "mistral", "qwen3_moe"])
def test_equals_trl(family: str, layout: str, tmp_path: Path) -> None:
    assert compare(tmp_path, layout, family, gradient_accumulation_steps=2) < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_equals_trl(layout: str, tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    options = {"peft_config": lora, "learning_rate": 2e-2, "per_device_train_batch_size": 4}
    assert compare(tmp_path, layout, **options) < TOLERANCE


@pytest.mark.parametrize("preset", ["llamafactory", "xfactlab", "paper"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_preset(layout: str, preset: str, tmp_path: Path) -> None:
    padded, rows = (
        history(make(tmp_path / name, preset=preset, batch_layout=name))
        for name in ("padded", layout)
    )
    assert changed(rows, padded) < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_after_a_global_step(layout: str, tmp_path: Path) -> None:
    # 20 tokens: some prompts leave no room for an answer; the last batch is smaller.
    options = {"loss_normalization": "global", "gradient_accumulation_steps": 2, "max_length": 20}
    options |= {"max_steps": 6, "optim": "sgd", "learning_rate": 0.05, "train_dataset": pairs(23)}
    trainers = [make(tmp_path / name, batch_layout=name, **options) for name in ("padded", layout)]
    logs = [history(trainer) for trainer in trainers]
    assert sum(log["skipped_pairs"] for log in logs[0][:-1]) > 0
    assert changed(logs[1], logs[0]) < 1e-5
    weights = [torch.cat([p.detach().flatten() for p in t.model.parameters()]) for t in trainers]
    assert float((weights[0] - weights[1]).abs().max()) < 2e-6


@pytest.mark.parametrize("layout", LAYOUTS)
def test_evaluation(layout: str, tmp_path: Path) -> None:
    options = {"eval_dataset": pairs(7, seed=1), "compute_metrics": means}
    padded, rows = (
        make(tmp_path / name, batch_layout=name, **options).evaluate()
        for name in ("padded", layout)
    )
    assert changed([rows], [padded]) < 1e-5
    assert rows["eval_batch/computed_share"] < 1


def means(prediction: Any) -> dict[str, float]:
    return {"chosen": float(prediction.predictions[:, 0].mean())}


def test_what_is_logged(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Say: dog", "chosen": " I am fox", "rejected": " No"},
        {"prompt": "", "chosen": "two", "rejected": "sky"},
    ]
    options = {"train_dataset": Dataset.from_list(rows), "allow_missing_prompt": True}
    options |= {"max_steps": 1, "per_device_train_batch_size": 2}
    trainer = make(tmp_path / "a", batch_layout="packed", **options)
    log = history(trainer)[0]
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (0, 1)])
    real = int(batch["attention_mask"].sum())
    assert log["batch/computed_share"] < 1
    assert log["batch/unshared_pairs"] == 0  # nothing is to be shared
    assert "batch/computed_share" not in history(make(tmp_path / "b", **options))[0]
    # Tokens that a user has, not those that were computed.
    final = trainer.state.log_history[-1]
    assert final["train_tokens"] == real


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_nf4_model(layout: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    # 64: nf4 quantises blocks of 64 weights.
    build("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    options = {"peft_config": LoraConfig(r=4, target_modules="all-linear"), "learning_rate": 2e-2}
    padded, rows = (
        history(
            make(
                tmp_path / name,
                AutoModelForCausalLM.from_pretrained(
                    tmp_path / "base", quantization_config=quantization, dtype=torch.float32
                ),
                batch_layout=name,
                **options,
            )
        )
        for name in ("padded", layout)
    )
    assert changed(rows, padded) < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trls_own_trainer(layout: str, tmp_path: Path) -> None:
    theirs = history(make(tmp_path / "theirs", trl=True))
    trl.patch_trl(layout=layout)
    try:
        ours = history(make(tmp_path / "ours", trl=True))
    finally:
        trl.unpatch_trl()
    assert changed(ours, theirs) < TOLERANCE


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stock_trainer(layout: str, tmp_path: Path) -> None:
    model = build("llama")
    fuse_head(model, loss=ORPOLoss(beta=0.1), layout=layout)
    stock = history(plain(tmp_path / "plain", model))
    ours = history(make(tmp_path / "ours", batch_layout="padded"))
    for one, other in zip(stock[:-1], ours[:-1], strict=True):
        for name in ("loss", "grad_norm"):
            assert one[name] == pytest.approx(other[name], rel=1e-4), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_resumed_is_as_if_not_interrupted(layout: str, tmp_path: Path) -> None:
    options = {"batch_layout": layout, "save_strategy": "steps", "save_steps": 2}
    whole = history(make(tmp_path / "whole", **options))
    trainer = make(tmp_path / "whole", **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    resumed = trainer.state.log_history
    for one, other in zip(resumed[:5], whole[:5], strict=True):
        assert one["loss"] == other["loss"]
        assert one["batch/computed_share"] == other["batch/computed_share"]


def test_dropout_of_an_adapter_does_not_reach_the_check(tmp_path: Path) -> None:
    # The comparison of two pairs draws no random number, and is not off by a dropout.
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5)
    model = get_peft_model(build("llama", attention_dropout=0.5), config)
    trainer = make(tmp_path, model, batch_layout="shared_prompt", disable_dropout=False)
    state = torch.random.get_rng_state()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (0, 1)])
    with trainer.fused_head.active(), torch.no_grad():
        model.eval()
        model(**batch)
    assert torch.equal(torch.random.get_rng_state(), state)
    history(trainer)


@pytest.mark.slow
def test_torch_compile(tmp_path: Path) -> None:
    # At the level of the model, both layouts: tests/integrations/test_fused_compile.py.
    lora = LoraConfig(r=4, target_modules=["q_proj"])
    eager, compiled = (
        history(
            make(
                tmp_path / str(compiles),
                build("llama", num_hidden_layers=1, attn_implementation="sdpa"),
                torch_compile=compiles,
                torch_compile_backend="aot_eager" if compiles else None,
                batch_layout="shared_prompt",
                peft_config=lora,
                max_steps=2,
            )
        )
        for compiles in (False, True)
    )
    torch._dynamo.reset()
    assert changed(compiled, eager) < TOLERANCE
