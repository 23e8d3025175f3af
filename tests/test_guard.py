"""The guard of `gradient="auto"`: what makes a step exact, how long, and what a resume keeps."""

import pytest
import torch

from orpo_kernels.guard import EXACT_STEPS, MOST_KEPT, MOST_TAIL_MASS, DensityGuard
from orpo_kernels.options import Certificate


def certificate(kept=0.01, mass=0.01):
    return Certificate(*torch.tensor([kept, mass, mass, 0.0, 0.0]))


@pytest.mark.parametrize(
    "flat", [certificate(kept=MOST_KEPT + 0.01), certificate(mass=MOST_TAIL_MASS + 0.01)]
)
def test_a_flat_step_is_followed_by_exact_ones_and_another_look(flat):
    guard = DensityGuard()
    assert guard.gradient() == "sparse"  # nothing is known
    guard.record(flat)
    assert [guard.gradient() for _ in range(EXACT_STEPS)] == ["exact"] * EXACT_STEPS
    assert guard.gradient() == "sparse"
    guard.record(certificate())
    assert [guard.gradient() for _ in range(3)] == ["sparse"] * 3


def test_guards_know_nothing_of_each_other():
    one, other = DensityGuard(), DensityGuard()
    one.record(certificate(kept=1.0))
    assert (one.gradient(), other.gradient()) == ("exact", "sparse")


def test_a_resumed_guard_decides_as_the_first_would_have():
    guard = DensityGuard()
    guard.record(certificate(kept=1.0))
    for _ in range(5):
        guard.gradient()
    resumed = DensityGuard()
    resumed.load_state_dict(guard.state_dict())
    assert [resumed.gradient() for _ in range(40)] == [guard.gradient() for _ in range(40)]


def test_the_state_includes_a_certificate_that_was_not_looked_at():
    guard = DensityGuard()
    guard.record(certificate(kept=1.0))
    assert guard.state_dict() == {"exact_steps_left": EXACT_STEPS}


@pytest.mark.parametrize("left", [None, -1, EXACT_STEPS + 1, 1.5])
def test_rejects(left):
    with pytest.raises(ValueError, match="exact_steps_left must be an integer"):
        DensityGuard().load_state_dict({"exact_steps_left": left})
