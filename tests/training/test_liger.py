"""`use_liger_kernel=True` beside the fused head: Liger's layers, not its losses."""

from __future__ import annotations

import inspect
import logging
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
