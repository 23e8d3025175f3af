"""Carries the guard of `gradient="auto"` from run to run, in a checkpoint's trainer_state.json."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from orpo_kernels.guard import DensityGuard
from orpo_kernels.integrations.transformers import guard_of


class GuardCallback(TrainerCallback, ExportableState):
    """Saves the state of a fused model's guard with the trainer's, and restores it on a resume."""

    def __init__(self) -> None:
        self._guard: DensityGuard | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finds the guard of the model that is trained, and puts it where the checkpoint was."""
        self._guard = guard_of(kwargs["model"])
        saved = state.stateful_callbacks.get(type(self).__name__)
        # Not Trainer's own way, which restores callbacks only where it is asked to.
        if self._guard is not None and state.global_step > 0 and saved is not None:
            self._guard.load_state_dict(saved["attributes"]["guard_state"])

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` has of this callback."""
        guard = DensityGuard() if self._guard is None else self._guard
        return {"args": {}, "attributes": {"guard_state": guard.state_dict()}}


def guard_callbacks(gradient: str) -> list[GuardCallback]:
    """What a trainer needs for this `gradient`: only "auto" has a guard to be saved."""
    return [GuardCallback()] if gradient == "auto" else []
