"""How long this process's threads were ready to run and did not: what others cost a timing.

Threads that share a product wait for each other at its end. Beside one busy process on a machine
of two cores a training step in two threads took 5 to 20 times as long, in one thread twice as long:
whenever one of the two is not running, the other spins. Such a time is no figure of the step.
"""

import contextlib
from pathlib import Path
from typing import NamedTuple

TASKS = Path("/proc/self/task")
MOST_WAITING = 0.1
"""Share of waiting over which a timing is not used; beside one busy process it was 0.5 to 0.8."""


class Threads(NamedTuple):
    """Nanoseconds that all threads of this process have run, and have waited for a core."""

    ran: int
    waited: int


def threads() -> Threads | None:
    """What the threads alive now have run and waited; None where the system does not say."""
    ran = waited = 0
    for path in TASKS.glob("*/schedstat"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            first, second, _ = path.read_text().split()
            ran, waited = ran + int(first), waited + int(second)
    return Threads(ran, waited) if ran else None


def waiting_share(before: Threads | None, after: Threads | None) -> float | None:
    """Of the time between, in which threads were ready to run, the share in which they did not.

    None where the system does not say, or nothing ran.
    """
    if before is None or after is None or after == before:
        return None
    ran, waited = after.ran - before.ran, after.waited - before.waited
    return waited / (ran + waited)
