"""`activation_offload`: the inputs of checkpointed layers are moved, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.modeling_utils
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from orpo_kernels.training import ORPOConfig, arguments
from tests.tiny_models import build
from tests.training.runs import history, make

H, LAYERS = 32, 2


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of every tensor that goes to the host; here to another tensor, as to pinned memory."""
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        sizes.append(tensor.nbytes)
        return tensor.clone()

    def hooks(**options: Any) -> Any:
        assert options["pin_memory"] is True
        return torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.clone())

    monkeypatch.setattr(transformers.modeling_utils, "save_on_cpu", hooks)
    monkeypatch.setattr(arguments, "refuse_offload_on_cpu", lambda args: None)
    return sizes


@pytest.mark.parametrize("layout", ["padded", "packed", "shared_prompt"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_same_numbers(lora: bool, layout: str, moved: list[int], tmp_path: Path) -> None:
    options: dict[str, Any] = {"batch_layout": layout, "gradient_accumulation_steps": 2}
    if lora:
        options["peft_config"] = LoraConfig(r=4, target_modules="all-linear")
    kept, offloaded = (
        history(make(tmp_path / str(offload), activation_offload=offload, **options))
        for offload in (False, True)
    )
    for one, other in zip(offloaded[:-1], kept[:-1], strict=True):
        assert (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"])
    assert moved


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_is_moved_is_a_layers_input(reentrant: bool, moved: list[int], tmp_path: Path) -> None:
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}, "max_steps": 1}
    trainer = make(tmp_path, activation_offload=True, narrow_head=False, **options)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in (0, 1)])
    assert trainer.args.gradient_checkpointing_kwargs["use_reentrant"] is reentrant
    trainer.train()
    moved.clear()
    with trainer.fused_head.active():
        trainer.model.train()(**batch, use_cache=False).loss.backward()
    assert moved == LAYERS * [batch["input_ids"].numel() * H * 4]  # float32


def test_an_nf4_model(moved: list[int], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    # 64: nf4 quantises blocks of 64 weights.
    build("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=quantization, dtype=torch.float32
    )
    lora = LoraConfig(r=4, target_modules="all-linear")
    trainer = make(tmp_path / "run", model, peft_config=lora, activation_offload=True)
    # PEFT turns checkpointing on before Trainer does: a call in between works too.
    batch = trainer.data_collator([trainer.train_dataset[0]])
    with trainer.fused_head.active():
        trainer.model.train()(**batch, use_cache=False).loss.backward()
    assert not moved
    assert len(history(trainer)) == 6
    assert moved


def test_refused_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this run is on the CPU"):
        make(tmp_path, activation_offload=True)


def test_refused_without_checkpointing() -> None:
    with pytest.raises(ValueError, match="gradient_checkpointing is off"):
        ORPOConfig("unused", use_cpu=True, gradient_checkpointing=False, activation_offload=True)


def test_refused_by_a_transformers_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def enable(self: Any, gradient_checkpointing_kwargs: Any = None) -> None:
        raise AssertionError

    monkeypatch.delattr(PreTrainedModel, "activation_checkpointing_enable", raising=False)
    monkeypatch.setattr(PreTrainedModel, "gradient_checkpointing_enable", enable)
    with pytest.raises(NotImplementedError, match="this is "):
        ORPOConfig("unused", use_cpu=True, activation_offload=True)
