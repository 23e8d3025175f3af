"""The kept entries of the sparse gradient on a GPU, by name: slots of a tile, segments of a store.

A trainable head keeps its segments (`row_segments`) from forward to backward. One flat buffer holds the tables and, in what they leave of it, the segments. Nothing here needs
triton: the engine divides its budget by these sizes before the first kernel is loaded.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.constants import COMPACT_COLUMNS, COMPACT_ROWS

SEGMENT_COLUMNS = 64
"""Columns of a segment: 128 bytes."""

_ALIGNMENT = 16

MOST_SPAN = 1024
"""Columns that a program of the sparse forward's look sees one after the other, at most."""

# Columns of one of its tiles; programs that run at once on a large card: four on a processor.
_SPAN_STEP, _PROGRAMS = 64, 512


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


class Slots(NamedTuple):
    """Kept entries of a tile (`softmax_compact`): a column is kept for 64 rows, B blocks of them.

    mass (R,) float32 sum of the kept E as rounded; row_sum (R,) float32 sum of all E with a
    softcap, else empty; entries (1,) int64 how many are kept; slots (64 B, .) bfloat16 the
    memory of the logits; columns and addresses (B, 128 T) int32 of each row block's kept columns,
    ascending; ends (B, T) int32 how many of them lie up to each tile of 128 columns; live
    (B, 128 T) int8 which are kept; threshold (R,) float32, eps * total.
    """

    mass: Tensor
    row_sum: Tensor
    entries: Tensor
    slots: Tensor
    columns: Tensor
    addresses: Tensor
    ends: Tensor
    live: Tensor
    threshold: Tensor


class SegmentStore(NamedTuple):
    """Segments of all chunks, on the device.

    overflow (chunks,) int32, 1 for a chunk that did not fit; used (chunks + 1,) int32, segments
    before each chunk; first_rows (NB,) int32, row of each block; starts and counts (NB, W) int32;
    live (NB, W) int64, a bit per row; segments (S, 64) bfloat16.
    """

    overflow: Tensor
    used: Tensor
    first_rows: Tensor
    starts: Tensor
    counts: Tensor
    live: Tensor
    segments: Tensor

    def rows(self, start: int, stop: int) -> "SegmentStore":
        """The row blocks of rows `start`, a multiple of 64, to `stop`, counted from `start` on."""
        here = slice(start // COMPACT_ROWS, -(-stop // COMPACT_ROWS))
        return self._replace(
            first_rows=self.first_rows[here] - start, starts=self.starts[here],
            counts=self.counts[here], live=self.live[here],
        )  # fmt: skip


def segment_store(buffer: Tensor, rows: int, columns: int, chunks: int) -> SegmentStore:
    """The store in a buffer; it is empty once `used[0]` is 0.

    Args:
        buffer: (bytes,) uint8, starting on 16 bytes, at least those of `table_bytes`.
        rows: N; every chunk but the last has a multiple of 64.
        columns: V.
        chunks: how many `pack_segments` appends.

    Returns:
        Views of the buffer.
    """
    views, end = [], 0
    for shape, dtype in _tables(rows, columns, chunks):
        size = math.prod(shape) * dtype.itemsize
        views.append(buffer[end : end + size].view(dtype).view(shape))
        end += aligned(size)
    left = (buffer.shape[0] - end) // (2 * SEGMENT_COLUMNS) * (2 * SEGMENT_COLUMNS)
    segments = buffer[end : end + left].view(torch.bfloat16).view(-1, SEGMENT_COLUMNS)
    return SegmentStore._make((*views, segments))


def table_bytes(rows: int, columns: int, chunks: int) -> int:
    """Bytes of everything in a store but the segments."""
    return sum(
        aligned(math.prod(shape) * dtype.itemsize)
        for shape, dtype in _tables(rows, columns, chunks)
    )


def list_bytes(rows: int, columns: int, store_bytes: int) -> int:
    """Bytes, at most, of the lists of a store that the weight gradient is made from."""
    blocks, width = _blocks(rows, columns)
    return 8 * (store_bytes // (2 * SEGMENT_COLUMNS)) + 16 * blocks * width


def _tables(
    rows: int, columns: int, chunks: int
) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    blocks = _blocks(rows, columns)
    return (
        ((chunks,), torch.int32), ((chunks + 1,), torch.int32), (blocks[:1], torch.int32),
        (blocks, torch.int32), (blocks, torch.int32), (blocks, torch.int64),
    )  # fmt: skip


def _blocks(rows: int, columns: int) -> tuple[int, int]:
    """NB row blocks and W blocks of 64 columns, two to a tile of `softmax_compact`."""
    width = -(-columns // COMPACT_COLUMNS) * (COMPACT_COLUMNS // SEGMENT_COLUMNS)
    return -(-rows // COMPACT_ROWS), width


def aligned(size: int) -> int:
    """The next multiple of 16 bytes, where every piece of a byte buffer starts."""
    return -(-size // _ALIGNMENT) * _ALIGNMENT
