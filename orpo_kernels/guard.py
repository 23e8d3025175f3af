"""When `gradient="auto"` is exact: after a step whose softmax was too flat for the sparse one.

A flat softmax (an untrained model) has no few large entries. The sparse gradient is then slower
than the exact one, and where it drops most of the mass, less accurate. What a step kept and dropped
is in its certificate; a guard reads that of the last step and decides the next one. It belongs to
whoever takes the steps (`ORPOLoss`, the fused head), and its state to the checkpoint of the run:
with the same state the same steps give the same bits. `gradient="sparse"` asks no guard.
"""

from typing import TypedDict

import torch

from orpo_kernels.engine.host_copy import HostCopy
from orpo_kernels.options import Certificate

MOST_KEPT = 0.25
"""Share of rows x vocabulary over which the exact gradient is faster."""

MOST_TAIL_MASS = 0.2
"""Mean mass given back by its average over which the exact gradient is better."""

EXACT_STEPS = 32
"""Steps the exact way, before a step finds out whether the softmax is peaked by now."""


class GuardState(TypedDict):
    """What a resumed run needs: how many exact steps are still to come."""

    exact_steps_left: int


class DensityGuard:
    """Decides, step by step, between the sparse and the exact gradient.

    Between steps call `gradient`, which says how the next one is to be taken, and after a sparse
    step `record` with its certificate. Reading a certificate waits for nothing but the step before.
    """

    def __init__(self) -> None:
        self._exact_steps_left = 0
        self._last: HostCopy | None = None

    def gradient(self) -> str:
        """How the next step is to be taken, "sparse" or "exact"; counts it as taken."""
        self._look()
        if self._exact_steps_left == 0:
            return "sparse"
        self._exact_steps_left -= 1
        return "exact"

    def record(self, certificate: Certificate) -> None:
        """Takes what a sparse step kept and dropped, without waiting for it."""
        figures = torch.stack((certificate.kept_share, certificate.tail_mass))
        self._last = HostCopy(figures.detach())

    def state_dict(self) -> GuardState:
        """The state, for a checkpoint."""
        self._look()
        return {"exact_steps_left": self._exact_steps_left}

    def load_state_dict(self, state: GuardState) -> None:
        """Goes on where the guard of a checkpoint was.

        Raises:
            ValueError: not a state of this class.
        """
        left = state.get("exact_steps_left")
        if not isinstance(left, int) or not 0 <= left <= EXACT_STEPS:
            raise ValueError(
                f"exact_steps_left must be an integer from 0 to {EXACT_STEPS}, got {left!r}; give "
                "what state_dict() returned"
            )
        self._exact_steps_left, self._last = left, None

    def __getstate__(self) -> GuardState:
        return self.state_dict()  # a certificate on its way cannot be copied

    def __setstate__(self, state: GuardState) -> None:
        self.load_state_dict(state)

    def _look(self) -> None:
        """Reads the last certificate, once."""
        if self._last is None:
            return
        kept_share, tail_mass = self._last.get().tolist()
        self._last = None
        if kept_share > MOST_KEPT or tail_mass > MOST_TAIL_MASS:
            self._exact_steps_left = EXACT_STEPS
