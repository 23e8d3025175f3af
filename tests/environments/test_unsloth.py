"""Unsloth's ORPOTrainer on a CPU, alone and under TRL's adapter: its own path steps aside.

Runs in the environment of `make setup-unsloth`; what Unsloth compiles for a GPU does not run here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.environments import unsloth_run
from tests.environments.runs import difference, save_conversations, save_model

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("unsloth") is None,
    reason="needs the environment of make setup-unsloth",
)


def run(folder: Path, *mode: str, on_a_gpu: bool = False) -> dict[str, Any]:
    """What `unsloth_run.py` writes of a run in this mode."""
    hidden = {} if on_a_gpu else unsloth_run.ON_A_CPU | {"CUDA_VISIBLE_DEVICES": ""}
    logs = folder / ("-".join(("logs", *mode)) + ".json")
    arguments = [folder / "base", folder / "rows.json", logs, *mode]
    done = subprocess.run(
        [sys.executable, unsloth_run.__file__, *map(str, arguments)],
        cwd=folder, capture_output=True, text=True, timeout=400,  # it leaves a cache where it runs
        env=os.environ | {"PYTHONPATH": str(ROOT)} | hidden,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(json.loads(logs.read_text()))


def test_same_losses(tmp_path: Path) -> None:
    save_model(tmp_path / "base", "llama")
    save_conversations(tmp_path / "rows.json")
    theirs = run(tmp_path)
    assert theirs["unsloth"]
    assert not theirs["fused"]
    for mode in ("subclass", "patch"):
        ours = run(tmp_path, mode)
        assert ours["unsloth"]
        assert ours["fused"]
        assert difference(ours["logs"], theirs["logs"]) < 1e-5


def test_the_report_names_it(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "orpo_kernels", "env", "--device=cpu", "--import", "unsloth"],
        cwd=tmp_path, capture_output=True, text=True, timeout=400,
        env=os.environ | unsloth_run.ON_A_CPU | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "UNSLOTH_ALLOW_CPU=1" in done.stdout
    # On import it replaces forwards of mixtures of experts.
    assert "Unsloth (Qwen3MoeForCausalLM.forward is unsloth_zoo." in done.stdout
