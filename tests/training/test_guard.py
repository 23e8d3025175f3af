"""The guard of `gradient="auto"` in training: exact steps after a flat one, and across a resume."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch

from orpo_kernels.guard import EXACT_STEPS
from orpo_kernels.integrations.transformers import fuse_head
from orpo_kernels.loss import ORPOLoss
from tests.integrations.helpers import make_batch
from tests.tiny_models import build
from tests.training.runs import make


def test_a_flat_model_is_trained_exactly_after_one_look() -> None:
    # A random model's softmax is flat: every entry is over eps, and is kept.
    model, batch = build("llama"), make_batch()
    options = {"gradient": "auto", "eps": 0.0, "compute_dtype": torch.bfloat16}
    with fuse_head(model, loss=ORPOLoss(0.1), check=False, **options) as fused:
        with torch.no_grad():
            model(**batch)  # has no gradient: asks no guard
        looked = [model(**batch).orpo.sparse is not None for _ in range(3)]
        assert looked == [True, False, False]
        assert fused.guard.state_dict() == {"exact_steps_left": EXACT_STEPS - 2}
        again = copy.deepcopy(fused.guard), pickle.loads(pickle.dumps(fused.guard))
        assert [each.state_dict() for each in again] == [fused.guard.state_dict()] * 2


def test_options_are_checked_when_the_head_is_fused() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="sparse"):
        fuse_head(model, gradient="sparce")
    with pytest.raises(TypeError, match="workspace_bytes"):
        fuse_head(model, workspace_bytes=1e6)
    assert "forward" not in model.__dict__  # refused before anything is changed


@pytest.mark.parametrize("restored", [False, True], ids=["callback kept", "callback made again"])
def test_a_resumed_run_goes_on_where_the_guard_was(restored: bool, tmp_path: Path) -> None:
    options = {"gradient": "auto", "compute_dtype": "bfloat16", "save_strategy": "steps"}
    first = make(tmp_path, max_steps=2, save_steps=2, **options)
    first.fused_head.guard.load_state_dict({"exact_steps_left": 9})
    first.train()
    left = first.fused_head.guard.state_dict()["exact_steps_left"]
    assert 0 < left < 9
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["GuardCallback"]["attributes"]
    assert saved == {"guard_state": {"exact_steps_left": left}}
    options["restore_callback_states_from_checkpoint"] = restored
    second = make(tmp_path, max_steps=3, save_steps=3, **options)
    second.train(resume_from_checkpoint=True)
    assert second.fused_head.guard.state_dict()["exact_steps_left"] < left
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["GuardCallback"]["attributes"]["guard_state"]
    assert saved == second.fused_head.guard.state_dict()
    assert not [name for name in make(tmp_path / "b").callback_handler.callbacks
                if type(name).__name__ == "GuardCallback"]  # fmt: skip
