"""What runs of other trainers start from, and how their logs are compared."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests.tiny_models import build, tiny_tokenizer

ROWS = 24
CLOCKS = ("_runtime", "_per_second", "total_flos")


def save_model(folder: Path, name: str) -> None:
    """A tiny model and its tokenizer, as from the hub."""
    build(name).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def save_adapter(base: Path, folder: Path) -> None:
    """A LoRA on queries and values of the model in `base`, its weights drawn from a seed."""
    torch.manual_seed(1)
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(folder)


def save_conversations(path: Path) -> None:
    """Pairs of conversations of one turn, a JSON object a line; answers of 2 to 12 words."""
    words = ("dog", "fox", "sky", "two", "cat")
    lines = []
    for row in range(ROWS):
        question = {"role": "user", "content": "Say: " + " ".join(words[: row % 5 + 1])}
        sides = {}
        for side, said, many in (("chosen", "I am ", row % 7), ("rejected", "No ", row % 4)):
            answer = said + " ".join(words[(row + i) % 5] for i in range(many + 1))
            sides[side] = [question, {"role": "assistant", "content": answer}]
        lines.append(json.dumps(sides))
    path.write_text("\n".join(lines))


def difference(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    """Over all logs, |ours - theirs| / max(1, |theirs|); both must log the same names."""
    assert len(ours) == len(theirs) >= 5
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        assert set(one) == set(other)
        for name, value in other.items():
            if not name.endswith(CLOCKS):
                assert math.isfinite(value), (name, other)
                worst = max(worst, abs(one[name] - value) / max(1.0, abs(value)))
    return worst
