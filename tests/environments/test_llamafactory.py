"""`pref_loss: orpo` through LLaMA-Factory's own entry, on a CPU, with and without the patch.

Runs in the environment of `make setup-llamafactory`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_kernels import PRESETS, ORPOLoss
from tests.environments import llamafactory_run  # torchaudio's stub
from tests.environments.runs import ROWS, difference, save_adapter, save_conversations, save_model

pytest.importorskip("llamafactory", reason="needs the environment of make setup-llamafactory")

ROOT = Path(__file__).parents[2]
ARGUMENTS: dict[str, Any] = {
    "stage": "dpo", "do_train": True, "pref_loss": "orpo", "pref_beta": 0.3, "template": "empty",
    "dataset": "pairs", "cutoff_len": 96, "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2, "learning_rate": 2e-3, "max_steps": 5, "logging_steps": 1,
    "save_steps": 5, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
    "flash_attn": "disabled", "finetuning_type": "full",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_conversations(tmp_path / "rows.json")
    rows = [json.loads(line) for line in (tmp_path / "rows.json").read_text().splitlines()]

    def turn(message: dict[str, str]) -> dict[str, str]:
        sender = {"user": "human", "assistant": "gpt"}[message["role"]]
        return {"from": sender, "value": message["content"]}

    pairs = [
        {
            "conversations": [turn(row["chosen"][0])],
            **{side: turn(row[side][1]) for side in ("chosen", "rejected")},
        }
        for row in rows
    ]
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    known = {"file_name": "pairs.json", "ranking": True, "formatting": "sharegpt"}
    (tmp_path / "pairs.json").write_text(json.dumps(pairs))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"pairs": known | {"columns": columns}}))
    assert len(pairs) == ROWS
    return tmp_path


def run(folder: Path, *words: str, **changes: Any) -> tuple[list[dict[str, float]], str]:
    """What LLaMA-Factory's trainer logged, and what the process said."""
    output = folder / "-".join(("out", *words))
    arguments = ARGUMENTS | {
        "model_name_or_path": str(folder / "base"), "dataset_dir": str(folder),
        "output_dir": str(output), **changes,
    }  # fmt: skip
    (folder / "arguments.json").write_text(json.dumps(arguments))
    done = subprocess.run(
        [sys.executable, llamafactory_run.__file__, str(folder / "arguments.json"), *words],
        cwd=folder, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    said = done.stdout + done.stderr
    if done.returncode:
        return [], said
    state = output / "checkpoint-5/trainer_state.json"
    return json.loads(state.read_text())["log_history"], said


@pytest.mark.parametrize(("model", "lora"), [("llama", False), ("qwen2", True)])
def test_same_losses(model: str, lora: bool, folder: Path) -> None:
    save_model(folder / "base", model)
    adapter = {}
    if lora:
        save_adapter(folder / "base", folder / "adapter")
        adapter = {"finetuning_type": "lora", "adapter_name_or_path": str(folder / "adapter")}
    theirs, said = run(folder, **adapter)
    assert len(theirs) == ARGUMENTS["max_steps"], said
    ours, said = run(folder, "ours", **adapter)
    assert ours, said
    assert difference(ours, theirs) < 1e-5


def test_the_patch_is_put_on_and_taken_off() -> None:
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    from orpo_kernels.integrations.llamafactory import patch_llamafactory, unpatch_llamafactory

    before = dict(vars(CustomDPOTrainer))
    patch_llamafactory()
    patch_llamafactory(gradient="sparse")
    changed = {name for name, value in vars(CustomDPOTrainer).items() if before[name] is not value}
    assert changed == {"concatenated_forward", "odds_ratio_loss"}
    unpatch_llamafactory()
    unpatch_llamafactory()
    assert dict(vars(CustomDPOTrainer)) == before


def test_its_loss_is_the_preset() -> None:
    from orpo_kernels.integrations.llamafactory import orpo_losses

    # Two pairs of four tokens: the mean over pairs of LLaMA-Factory's losses.
    token_logps = (-torch.rand(4, 4)).requires_grad_()
    labels = torch.zeros(4, 4, dtype=torch.int64)
    loss = ORPOLoss.from_preset("llamafactory", beta=0.3).from_logps(token_logps, labels).loss
    chosen, rejected = token_logps.mean(1).chunk(2)
    theirs = orpo_losses(type("Trainer", (), {"beta": 0.3}), chosen, rejected).mean()
    torch.testing.assert_close(theirs, loss)
    assert PRESETS["llamafactory"].nll_reduction == "pair"


def test_certain_answers_have_a_gradient() -> None:
    from llamafactory.train.dpo.trainer import CustomDPOTrainer

    from orpo_kernels.integrations.llamafactory import orpo_losses

    trainer = type("Trainer", (), {"beta": 0.3})
    for loss, finite in ((CustomDPOTrainer.odds_ratio_loss, False), (orpo_losses, True)):
        # In float32 exp(-2e-8) is 1.
        logps = torch.tensor([-2e-8, -1.0], requires_grad=True)
        (gradient,) = torch.autograd.grad(loss(trainer, logps[:1], logps[1:]).sum(), logps)
        assert bool(torch.isfinite(gradient).all()) is finite
