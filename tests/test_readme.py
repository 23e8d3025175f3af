"""What the README shows, run as it stands there."""

import ast
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
    assert names["trainer"].state.global_step == TRAINING["max_steps"]
    assert "fused" not in repr(names["model"])


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


# What a refusal of the package is about -> what README says of it.
REFUSALS = {
    "encoder-decoder": "encoder-decoder models",
    "no output head": "models without an output head",
    "expected torch.nn.Linear": "heads that are no `nn.Linear`",
    "is quantised": "quantised",
    "unquantised, not offloaded": "offloaded and tensor-parallel heads",
    "twice in one forward": "called twice in a forward",
    "adapter_names": "called with `adapter_names`",
    "prompt-learning": "prompt-learning adapters",
    "kept the forward that": "adapters that kept the model's forward before it was fused",
    "which rebuilds the": "`trainable_token_indices` on it",
    "supports plain LoRA": "any adapter on the head but plain LoRA",
    "only plain LoRA": "DoRA",
    "torch.nn.DataParallel": "`nn.DataParallel`",
    "context and sequence parallelism": "context and sequence parallelism",
    "preprocess_logits_for_metrics": "`preprocess_logits_for_metrics`",
    "generate_during_eval": "`generate_during_eval`",
    "label_smoothing_factor": "`label_smoothing_factor`",
    "underflow_overflow": '`debug="underflow_overflow"`',
    "than the ones this patch knows": "by the patches of other trainers, versions they do not know",
    "activation_offload": "`activation_offload` with a transformers that does not have it",
    "batch_layout": "with a `batch_layout` that is not padded",
    "carry a state": "recurrent and hybrid models",
    "ALiBi": "ALiBi",
    "limit by themselves": "layers with a window of their own",
    "images": "images",
    "other hidden states": "models that compute something else in rows",
    "second derivatives": "second derivatives",
    "forward-mode": "forward-mode derivatives",
}
# Of one tile operation, which others stand in for; of a word that is none of the choices.
NOT_OF_THE_PACKAGE = ("linear_lse needs tensor cores",)


def refusals() -> list[str]:
    """The text of every NotImplementedError that the package raises."""
    found = []
    for path in (ROOT / "orpo_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "NotImplementedError":
                parts = ast.walk(call)
                texts = [part.value for part in parts if isinstance(part, ast.Constant)]
                found.append("".join(text for text in texts if isinstance(text, str)))
    return found


def test_refusals_are_complete() -> None:
    (row,) = re.findall(r"^\| Refused, by name \|(.*)$", README, flags=re.MULTILINE)
    messages = refusals()
    for message in messages:
        if not any(part in message for part in NOT_OF_THE_PACKAGE):
            named = [said for part, said in REFUSALS.items() if part in message]
            assert named, f"README does not know this refusal: {message}"
            assert all(said in row for said in named), (message, named)
    for part in REFUSALS:
        assert any(part in message for message in messages), f"nothing is refused as {part!r}"
