"""`use_liger_kernel=True` beside the fused head: Liger's layers, not its losses."""

from __future__ import annotations

import inspect
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers.trainer

from tests.training.runs import history, make

monkey_patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")
LOSSES = {"fused_linear_cross_entropy": False, "cross_entropy": False}


def test_layers_without_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # Liger's kernels need a GPU: what Trainer asks it for is recorded instead of done.
    asked: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(
        transformers.trainer, "apply_liger_kernel", lambda *arguments: asked.append(arguments)
    )
    with caplog.at_level(logging.WARNING):
        trainer = make(
            tmp_path, use_liger_kernel=True, liger_kernel_config={"rope": False}, max_steps=1
        )
    assert "Liger's layers are used, and not its cross-entropy losses" in caplog.text
    assert len(history(trainer)) == 2
    ((model, config),) = asked
    assert config == {"rope": False, **LOSSES}
    assert model.forward.__func__ is type(model).forward  # not fused when Liger patches it


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mixtral", "phi3"])
def test_the_names_are_ligers(family: str) -> None:
    patch = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN[family]
    assert set(inspect.signature(patch).parameters) >= LOSSES.keys()


# Of Liger's layers the rotary positions run in Triton's interpreter: norms and SwiGLU call `.to` on
# scalars, which are plain numbers there. Patches stay, hence a process, and the plain run first.
SCRIPT = """
import json, sys
from pathlib import Path
from tests.tiny_models import build
from tests.training.runs import history, make
from transformers.models.llama import modeling_llama

def losses(name, **options):
    model = build("llama", num_hidden_layers=1)
    logs = history(make(Path(sys.argv[1]) / name, model, max_steps=2, **options))
    return [[log["loss"], log["grad_norm"]] for log in logs[:-1]]

config = {"rms_norm": False, "swiglu": False}
found = {"plain": losses("plain")}
for layout in ("padded", "packed", "shared_prompt"):
    options = {"use_liger_kernel": True, "liger_kernel_config": config}
    found[layout] = losses(layout, batch_layout=layout, **options)
assert modeling_llama.apply_rotary_pos_emb.__module__.startswith("liger_kernel")
print(json.dumps(found))
"""


@pytest.mark.slow
def test_its_positions_are_those_of_every_layout(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    for layout in ("padded", "packed", "shared_prompt"):
        for one, other in zip(found[layout], found["plain"], strict=True):
            assert one == pytest.approx(other, rel=1e-5), layout
