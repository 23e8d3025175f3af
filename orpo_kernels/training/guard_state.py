"""Carries the guard of `gradient="auto"` from run to run, in a checkpoint's trainer_state.json."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from orpo_kernels.guard import DensityGuard


class GuardCallback(TrainerCallback, ExportableState):
    """Saves the state of a guard with the trainer's, and restores it on a resume."""

    guard: ClassVar[Callable[[], DensityGuard]]  # of the model that is trained

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts the guard where the checkpoint was."""
        saved = state.stateful_callbacks.get(type(self).__name__)
        # Not Trainer's own way, which restores callbacks only where it is asked to.
        if state.global_step > 0 and saved is not None:
            type(self).guard().load_state_dict(saved["attributes"]["guard_state"])

    def state(self) -> dict[str, Any]:
        """What `trainer_state.json` has of this callback."""
        return {"args": {}, "attributes": {"guard_state": type(self).guard().state_dict()}}


def guard_callbacks(gradient: str, guard: Callable[[], DensityGuard]) -> list[TrainerCallback]:
    """What a trainer needs for this `gradient`: only "auto" has a guard to be saved.

    Args:
        gradient: of the run.
        guard: returns the guard of the model that is trained, which `model_init` may replace.

    Returns:
        A callback of this trainer's own type, or none.
    """
    if gradient != "auto":
        return []
    # A type of its own: Trainer may restore a callback by making another, without arguments.
    own = type(GuardCallback.__name__, (GuardCallback,), {"guard": staticmethod(guard)})
    return [own()]
