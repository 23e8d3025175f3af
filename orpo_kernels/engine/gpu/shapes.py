"""Shapes of the loops on a GPU: what is planned (`plan.py`) and what is run, in numbers."""

from typing import NamedTuple

MOST_HELD = 8192
"""Columns of a row that the registers of a program hold (`kernels/softmax_block.py`)."""

_VECTOR = 8  # elements: rows of tiles start on 16 bytes


class Shape(NamedTuple):
    """Rows of a group, rows and columns of a tile."""

    group: int
    rows: int
    columns: int


class Sweep(NamedTuple):
    """A range of the vocabulary, and the shape of the tiles of its weight gradient.

    With `rows` under M every chunk is gathered for every block. `in_result`: rows at hand lie in
    the part of dW that comes after the range.
    """

    first: int
    last: int
    rows: int
    columns: int
    in_result: bool = False


def pitch(columns: int) -> int:
    """Elements from a row to the next, where rows start on 16 bytes."""
    return -(-columns // _VECTOR) * _VECTOR
