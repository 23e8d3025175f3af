"""`rl: orpo` through Axolotl's own command, on a CPU, with and without the plugin.

Runs in the environment of `make setup-axolotl`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.environments.page import after
from tests.environments.runs import difference, save_adapter, save_conversations, save_model

pytest.importorskip("axolotl", reason="needs the environment of make setup-axolotl")

ROOT = Path(__file__).parents[2]
CONFIG: dict[str, Any] = {
    "rl": "orpo", "orpo_alpha": 0.3, "seed": 3, "chat_template": "chatml", "sequence_len": 96,
    "remove_unused_columns": False, "micro_batch_size": 2, "gradient_accumulation_steps": 2,
    "max_steps": 5, "learning_rate": 2e-3, "optimizer": "adamw_torch", "lr_scheduler": "linear",
    "logging_steps": 1, "save_steps": 5, "bf16": False, "fp16": False, "tf32": False,
    "use_cpu": True, "attn_implementation": "eager", "special_tokens": {"pad_token": "<pad>"},
}  # fmt: skip
PLUGIN = yaml.safe_load(after("Axolotl", "yaml"))
CLASS = {"trainer_cls": "orpo_kernels.integrations.axolotl.ORPOTrainer"}


def run(folder: Path, name: str, **changes: Any) -> tuple[list[dict[str, float]], str]:
    """What Axolotl's trainer logged, and what the process said."""
    config = CONFIG | {
        "base_model": str(folder / "base"),
        "datasets": [
            {"path": str(folder / "data.json"), "ds_type": "json", "type": "chat_template.argilla"}
        ],
        "output_dir": str(folder / name),
        "dataset_prepared_path": str(folder / "prepared"),
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config | changes))
    command = [str(Path(sys.executable).parent / "axolotl"), "train", str(folder / f"{name}.yaml")]
    environment = os.environ | {"AXOLOTL_DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT)])
    done = subprocess.run(
        [sys.executable, *command, "--launcher", "python"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    said = done.stdout + done.stderr
    if done.returncode:
        return [], said
    state = folder / name / "checkpoint-5/trainer_state.json"
    return json.loads(state.read_text())["log_history"], said


# Llama: for others Axolotl adds tokens, whose entries it draws anew in every run.
@pytest.mark.parametrize("lora", [False, True], ids=["full", "LoRA"])
def test_same_losses(lora: bool, tmp_path: Path) -> None:
    save_model(tmp_path / "base", "llama")
    save_conversations(tmp_path / "data.json")
    adapter = {}
    if lora:  # made here: Axolotl draws its weights before it seeds
        save_adapter(tmp_path / "base", tmp_path / "adapter")
        adapter = {"adapter": "lora", "lora_model_dir": str(tmp_path / "adapter")}
    theirs, said = run(tmp_path, "theirs", **adapter)
    assert len(theirs) == CONFIG["max_steps"], said
    for name, ours in (("plugin", PLUGIN), ("class", CLASS)):
        logs, said = run(tmp_path, name, **adapter, **ours)
        assert logs, said
        assert difference(logs, theirs) < 1e-5
        # Axolotl goes on without a plugin that it cannot load.
        assert ("AxolotlORPOTrainer trains without logits" in said) == (name == "plugin"), said


def test_the_class_has_the_options_of_the_head(tmp_path: Path) -> None:
    save_model(tmp_path / "base", "llama")
    save_conversations(tmp_path / "data.json")
    # A budget below one tile: Axolotl's own trainer has none.
    (tmp_path / "tight.py").write_text(
        "from orpo_kernels.integrations.axolotl import ORPOTrainer\n"
        "class Tight(ORPOTrainer):\n    fuse_options = {'workspace_bytes': 10}\n"
    )
    logs, said = run(tmp_path, "tight", trainer_cls="tight.Tight")
    assert not logs
    assert "raise workspace_bytes" in said


def test_another_method_is_refused() -> None:
    from orpo_kernels.integrations.axolotl import ORPOKernelsPlugin

    with pytest.raises(TypeError, match="is for `rl: orpo`, got a AxolotlCPOTrainer"):
        ORPOKernelsPlugin().post_trainer_create({}, type("AxolotlCPOTrainer", (), {})())
