"""What the kernels of the sparse forward hand on from launch to launch: memory taken once a call.

R rows of a chunk in B blocks of 64, M scored rows; S spans of a vocabulary block, L of a look, W wide ones, of several spans;
G groups. Entries kept of a chunk are *slots*: 64 bfloat16 values of a column, one for each row of a
block, in one pool; a list by row block says of which columns they are and where they lie. Of the
second half of a pair of rows in `ends`, `used` the number of the vocabulary block decides, so that a
launch reads what the one before wrote while it writes its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.constants import COMPACT_ROWS
from orpo_kernels.kernels.inputs import Inputs
from orpo_kernels.kernels.slot_store import MOST_SPAN, ScanShape, span_columns
from orpo_kernels.kernels.tuning import Row, row_of

_LOG2_E = 1.4426950408889634


class ScanState(NamedTuple):
    """Names of the memory; what is read of it is written in the same call."""

    logits: Tensor  # (R, pitch)
    rows: Tensor  # (4, M) float32, base 2: estimate, reference, labels; and what was looked at
    factor: Tensor  # (R,) float32: from the reference before this tile to the one after
    groups: Tensor | None  # (M,) int64
    partial: Tensor  # (2 or 3, S, R) float32
    looks: Tensor  # (2 or 3, L, R) float32
    live: Tensor  # (B, S SPAN) int8: slots of a column, 2 where one does not say enough
    counts: Tensor  # (B, S) int32: slots, and 2^16 times the columns that have some
    losses: Tensor  # (B, S) float32
    tails: Tensor  # (B, G, S SPAN) float32
    lost: Tensor  # (B,) float32: losses of all blocks so far
    heads: Tensor  # (5, B) int32: is dense, first entry, first slot, had a sum, moved
    ends: Tensor  # (2, B) int32: entries of each list
    used: Tensor  # (2,) int32: slots
    columns: Tensor  # (B, P) int32: of entries, counted from the first of the vocabulary
    addresses: Tensor  # (B, P) int32: of their slots, in units of 16 bytes
    slots: Tensor  # (slots, 64) bfloat16
    mass: Tensor  # (W, R) float32: sums of the slots of a wide span, over the vocabulary blocks
    sums: Tensor  # (64 (B + E), H + r) float32: products of the row blocks, and of further pieces
    entries: Tensor  # (M / 64,) int64: how many of a row block's were kept
    tail: Tensor  # (G, V) float32
    row: Row  # of the table, for the scan
    tiles: int  # of a program of the scan, that make a span
    look_tiles: int  # of a look
    shape: ScanShape

    @property
    def group_count(self) -> int:
        """G."""
        return self.tail.shape[0]

    def spans(self, columns: int) -> int:
        """Spans of so many columns."""
        return -(-columns // (self.tiles * self.row.depth))

    @property
    def together(self) -> int:
        """Spans that make a wide one."""
        return max(1, MOST_SPAN // (self.tiles * self.row.depth))

    @property
    def most_columns(self) -> int:
        """Of a wide span, whatever the shape."""
        return MOST_SPAN

    def look_spans(self, columns: int) -> int:
        """Those of a look."""
        return -(-columns // (self.look_tiles * self.row.depth))

    def numbers(self, inputs: Inputs) -> tuple[float, float]:
        """Ratio and scale of the exponents, as `exponentials` takes them."""
        return exponents(inputs)


def exponents(inputs: Inputs) -> tuple[float, float]:
    """Ratio and scale of the exponents, as `exponentials` takes them."""
    scale, softcap = inputs.numbers
    if inputs.softcap is None:
        return 1.0, scale * _LOG2_E
    return scale / softcap, softcap * _LOG2_E


def product_dtype(inputs: Inputs) -> torch.dtype:
    """What slots are multiplied in: float16 where the operands are, else bfloat16."""
    return torch.float16 if inputs.dtype == torch.float16 else torch.bfloat16


def scan_row(inputs: Inputs) -> Row:
    """The row of the table for the scan of these inputs."""
    name = "scan" if inputs.softcap is None else "scan_softcap"
    return row_of(name, inputs.wide, inputs.labels.device)


def _tiles(row: Row, row_blocks: int, columns: int) -> int:
    """Tiles of a program, at most those of the table."""
    return min(row.block, -(-span_columns(row_blocks, columns) // row.depth))


def scan_state(
    inputs: Inputs, logits: Tensor, shape: ScanShape, groups: Tensor | None, tail: Tensor,
    looked: int,
) -> ScanState:  # fmt: skip
    """The memory of a call.

    Args:
        inputs: of the call.
        logits: (R, pitch), rows on 16 bytes: of a tile.
        shape: of its tiles.
        groups: (M,) int64 in [0, G), None for one group.
        tail: (G, V) float32, added to.
        looked: columns of a first look, at most.

    Returns:
        The memory, of which nothing is filled.
    """
    row, M = scan_row(inputs), inputs.labels.shape[0]
    R, G, looked = shape.rows, tail.shape[0], min(looked, shape.columns)
    B = -(-R // COMPACT_ROWS)
    tiles, look_tiles = _tiles(row, B, shape.columns), _tiles(row, B, looked)
    span, sums = tiles * row.depth, 2 if inputs.softcap is None else 3
    S, looks = -(-shape.columns // span), -(-looked // (look_tiles * row.depth))
    new = inputs.labels.new_empty

    def floats(*sizes: int) -> Tensor:
        return new(sizes, dtype=torch.float32)

    def whole(*sizes: int) -> Tensor:
        return new(sizes, dtype=torch.int32)

    columns, addresses = whole(2, B, shape.listed).unbind(0)
    return ScanState(
        logits, floats(4, M), floats(R),
        groups if G == 2 else None, floats(sums, S, R), floats(sums, looks, R),
        new((B, S * span), dtype=torch.int8), whole(B, S), floats(B, S), floats(B, G, S * span),
        floats(B), whole(5, B), whole(2, B), whole(2), columns, addresses,
        new((shape.slots, COMPACT_ROWS), dtype=torch.bfloat16), floats(-(-S // max(1, MOST_SPAN // span)), R),
        floats(COMPACT_ROWS * (B + shape.pieces), inputs.columns),
        inputs.labels.new_zeros(-(-M // COMPACT_ROWS)), tail, row, tiles, look_tiles, shape,
    )  # fmt: skip
