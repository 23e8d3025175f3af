"""What the README shows, run as it stands there."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import Trainer, TrainingArguments

from tests.tiny_models import VOCAB_SIZE, build, tiny_tokenizer
from tests.training.runs import pairs

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TRAINING = {"max_steps": 1, "per_device_train_batch_size": 2, "report_to": "none", "use_cpu": True}


def snippet(containing: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (found,) = [block for block in blocks if containing in block]
    return found


def test_any_trainer(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), remove_unused_columns=False, **TRAINING)
    before, after = snippet("fuse_head(model, loss").split("# after")
    assert "trainer = Trainer(model" in before
    names: dict[str, Any] = {
        "Trainer": Trainer, "args": args, "model": build("llama"),
        "pairs": pairs(4), "tokenizer": tiny_tokenizer(),
    }  # fmt: skip
    exec("# after" + after, names)
    names["trainer"].train()


def test_orpo_trainer(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    code = snippet("trainer = ORPOTrainer(")
    code = code.replace("meta-llama/Meta-Llama-3-8B", str(tmp_path / "base"))
    options = ", ".join(f"{name}={value!r}" for name, value in TRAINING.items())
    code = code.replace('output_dir="out"', f'output_dir="{tmp_path}/out", {options}')
    names = {"pairs": pairs(4), "tokenizer": tiny_tokenizer(), "LoraConfig": LoraConfig}
    exec(code, names)


def test_tensors() -> None:
    hidden, weight = torch.randn(4, 6, 8, requires_grad=True), torch.randn(VOCAB_SIZE, 8)
    labels = torch.randint(0, VOCAB_SIZE, (4, 6))
    exec(
        snippet("output = orpo_loss("),
        {"hidden": hidden, "weight": weight, "labels": labels, "beta": 0.1},
    )
    assert hidden.grad is not None


def test_files_and_targets_exist() -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^)make ([a-z-]+)", README, flags=re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("recipe", re.findall(r"examples/[\w.-]+\.yaml", README))
def test_recipes_exist(recipe: str) -> None:
    assert (ROOT / recipe).is_file()
