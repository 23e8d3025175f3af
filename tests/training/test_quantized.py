"""bitsandbytes on a CPU: QLoRA on an nf4 base model, 8-bit paged AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from tests.tiny_models import build
from tests.training.runs import history, largest_difference, make, pairs

pytest.importorskip("bitsandbytes")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: Any) -> Path:
    # 64: nf4 quantises blocks of 64 weights, and the CPU kernel wants whole ones.
    folder = tmp_path_factory.mktemp("model")
    build("llama", hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


def nf4(folder: Path, dtype: torch.dtype) -> Any:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=quantization, dtype=dtype, device_map={"": "cpu"}
    )


@pytest.mark.parametrize("bf16", [False, True])
def test_qlora_trains(bf16: bool, saved_model: Path, tmp_path: Path) -> None:
    model = nf4(saved_model, torch.bfloat16 if bf16 else torch.float32)
    # peft casts embeddings and head to float32, and with bf16 TRL and we cast them back.
    options = {"peft_config": LORA, "bf16": bf16, "optim": "paged_adamw_8bit"}
    trainer = make(tmp_path, model, learning_rate=2e-2, max_steps=8, **options)
    assert trainer.model.get_output_embeddings().weight.dtype == (
        torch.bfloat16 if bf16 else torch.float32
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    logs = history(trainer)
    assert logs[7]["loss"] < logs[0]["loss"] - 0.5
    for name, value in trainer.model.named_parameters():
        assert torch.equal(value, before[name]) != ("lora_" in name), name


def test_qlora_equals_trl(saved_model: Path, tmp_path: Path) -> None:
    logs = [
        history(
            make(
                tmp_path / str(trl),
                nf4(saved_model, torch.float32),
                trl=trl,
                peft_config=LORA,
                gradient_accumulation_steps=2,
                learning_rate=2e-2,
            )
        )
        for trl in (False, True)
    ]
    assert largest_difference(*logs) < 1e-4


def test_qlora_resumes(saved_model: Path, tmp_path: Path) -> None:
    # Paged 8-bit state has to survive the round trip through the file.
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    saving |= {"optim": "paged_adamw_8bit", "learning_rate": 1e-2, "train_dataset": pairs(8)}
    straight = make(tmp_path, nf4(saved_model, torch.float32), peft_config=LORA, **saving)
    straight.train()
    resumed = make(tmp_path, nf4(saved_model, torch.float32), peft_config=LORA, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = dict(straight.model.named_parameters())
    for name, value in resumed.model.named_parameters():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "adamw_bnb_8bit"])
def test_eight_bit_optimizer_on_a_full_model(optim: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, optim=optim, max_steps=8)
    logs = history(trainer)
    states = trainer.optimizer.optimizer.state.values()
    # Below 4,096 elements bitsandbytes keeps float32; the embeddings are above.
    assert torch.uint8 in {state["state1"].dtype for state in states}
    assert logs[7]["loss"] < logs[0]["loss"]
