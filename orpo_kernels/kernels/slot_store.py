"""The kept entries of the sparse gradient on a GPU, by name: the slots that a trainable head keeps.

One flat buffer from forward to backward: the slots, and the column of each. Where those of a row
block lie a table says that the host can read. Nothing here needs triton: the engine divides its
budget by these sizes before the first kernel is loaded.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.constants import COMPACT_ROWS

KEPT_ROUNDING = 2.0**-8
"""Of a slot's entry, relative: bfloat16, to nearest."""

SLOT_BYTES = 2 * COMPACT_ROWS + 4
"""Of a slot in the store, and its column."""

COLUMN_BYTES = 4
"""Of a slot of which the store has the column alone."""

_ALIGNMENT = 16

MOST_SPAN = 1024
"""Columns that a program of the sparse forward's look sees one after the other, at most."""

# Columns of one of its tiles; programs that run at once on a large card: five on a processor.
_SPAN_STEP, _PROGRAMS = 64, 640


class ScanShape(NamedTuple):
    """Shape of a sparse forward: tiles, and the room for what is kept of a chunk of rows.

    rows of a chunk, a multiple of 64; columns of a vocabulary block; slots of the pool; listed
    columns of a row block, at most; pieces of the product beyond one for each row block.
    """

    rows: int
    columns: int
    slots: int
    listed: int
    pieces: int


def span_columns(row_blocks: int, columns: int) -> int:
    """Columns of a program of the look, of so many blocks of rows: fewer where few programs would run.

    By the shape, not by the device: the order of sums, and with it their last bit, depends on it.
    """
    tiles = -(-row_blocks * columns // (_SPAN_STEP * _PROGRAMS))
    return min(MOST_SPAN, _SPAN_STEP * max(1, tiles))


class SlotStore(NamedTuple):
    """Slots of all chunks, on the device.

    slots (S, 64) bfloat16: kept entries of a column, of 64 rows, None where the backward makes them
    again; columns (S,) int32, of them, ascending in a row block; table (NB or more, 2) int64: first
    slot of a row block and how many, -1 of one that has none here and is recomputed.
    """

    slots: Tensor | None
    columns: Tensor
    table: Tensor

    @classmethod
    def of(cls, buffer: Tensor, table: Tensor, *, remade: bool = False) -> "SlotStore":
        """The store in a buffer (bytes,) uint8 that starts on 16 bytes; `remade`: without slots."""
        if remade:
            return cls(None, buffer[: buffer.shape[0] // 4 * 4].view(torch.int32), table)
        count = buffer.shape[0] // SLOT_BYTES
        end = count * 2 * COMPACT_ROWS
        slots = buffer[:end].view(torch.bfloat16).view(count, COMPACT_ROWS)
        return cls(slots, buffer[end : end + 4 * count].view(torch.int32), table)


def aligned(size: int) -> int:
    """The next multiple of 16 bytes, where every piece of a byte buffer starts."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT
