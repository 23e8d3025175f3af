"""Rows longer than the positions that a model has a table of."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from orpo_kernels.training.limits import learned_positions
from tests.tiny_models import VOCAB_SIZE, build
from tests.training.runs import make, pairs

POSITIONS = 20  # the prompts and answers of `pairs` reach 40 tokens

# name -> config class and what its positions need
TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    "offset of two rows": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "wpe": ("GPT2Config", {}),
    "positions_embed": ("OpenAIGPTConfig", {}),
    "behind the padding index": ("RobertaConfig", {"is_decoder": True, "pad_token_id": 1}),
    "rotary, from a buffer": ("GPTJConfig", {"rotary_dim": 8}),
    "sinusoidal, from an attribute": ("CTRLConfig", {"dff": 48}),
}


def with_table(name: str) -> Any:
    config_class, extra = TABLES[name]
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 48, "max_position_embeddings": POSITIONS}
    config = getattr(transformers, config_class)(vocab_size=VOCAB_SIZE, **sizes, **extra)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", TABLES)
def test_the_table_ends_where_it_is_said_to(name: str) -> None:
    model = with_table(name)
    count = learned_positions(model)
    assert count is not None
    ids = torch.randint(5, VOCAB_SIZE, (1, count + 1))
    model(input_ids=ids[:, :count])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)


@pytest.mark.parametrize("family", ["llama", "falcon", "gemma3", "phi"])
def test_computed_positions_have_no_end(family: str) -> None:
    model = build(family, max_position_embeddings=8)
    assert learned_positions(model) is None
    model(input_ids=torch.randint(5, VOCAB_SIZE, (1, 12)))


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_trainer_bounds_the_length_and_says_so_once(
    family: str, tmp_path: Path, caplog: Any
) -> None:
    model = build(family, max_position_embeddings=POSITIONS)
    with caplog.at_level(logging.WARNING):
        trainer = make(tmp_path, model, max_length=1024, max_steps=1, eval_dataset=pairs(4))
        said = [m for m in caplog.messages if m.startswith("max_length=1024 is more than the 20 ")]
    assert len(said) == 1
    assert max(trainer.train_dataset["length"]) == POSITIONS
    trainer.train()
    trainer.evaluate()


def test_shorter_rows_are_left_alone(tmp_path: Path, caplog: Any) -> None:
    model = build("gpt2", max_position_embeddings=POSITIONS)
    with caplog.at_level(logging.WARNING):
        trainer = make(tmp_path, model, max_length=12)
    assert "positions" not in caplog.text
    assert max(trainer.train_dataset["length"]) == 12


@pytest.mark.parametrize("family", ["gemma3_vl", "qwen2_5_vl"])
def test_patches_of_a_vision_tower_are_no_positions_of_tokens(family: str) -> None:
    assert learned_positions(build(family)) is None
