"""Which cases a device runs, where each is a kernel to compile."""

import itertools
from collections.abc import Collection, Sequence
from typing import Any


def pairwise(
    first: Collection[Any], second: Collection[Any], third: Sequence[Any]
) -> list[tuple[Any, Any, Any]]:
    """Every two of the values of different axes in one case, in as few cases as that takes.

    All three at once are the interpreter's to try (`tests/kernels/interpreted`).

    Raises:
        ValueError: the third axis is longer than another.
    """
    if len(third) > min(len(first), len(second)):
        raise ValueError("the third axis must be the shortest; exchange them")
    grid = itertools.product(enumerate(first), enumerate(second))
    return [(one, other, third[(i + j) % len(third)]) for (i, one), (j, other) in grid]
