"""What the loops of a GPU are made of: rows and blocks to multiply, tiles, sums."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.engine.gpu.shapes import pitch
from orpo_kernels.kernels.inputs import Inputs, Sums, Tiles
from orpo_kernels.kernels.take_rows import TakeRows
from orpo_kernels.kernels.tuning import VECTOR


def spans(span: tuple[int, int], step: int) -> Iterator[tuple[int, int]]:
    """A range in (start, stop) pieces of `step`; the last may be shorter."""
    for start in range(span[0], span[1], step):
        yield start, min(start + step, span[1])


def whole_pieces(columns: int) -> tuple[tuple[int, int], ...]:
    """Columns in whole vectors, and the few that are left: a GEMM of both together is slow."""
    whole = columns // VECTOR * VECTOR
    pieces = ((0, whole), (whole, columns))
    return tuple(piece for piece in pieces if piece[0] < piece[1])


class Hidden:
    """Rows of hidden states in the GEMMs' dtype: a view where nothing moves, else one buffer."""

    def __init__(self, inputs: Inputs, rows: int, memory: Tensor | None = None) -> None:
        """For at most so many rows at a time; `memory`, flat bytes, is used where it is given."""
        (part, *rest), dtype = inputs.hidden, inputs.dtype
        chosen = inputs.positions is not None or inputs.scored is not None
        moves = chosen or part.ndim > 2 or part.stride(0) < part.shape[1]
        self.view = part
        self.gathered: TakeRows | None = None
        if moves or rest or part.dtype != dtype:
            step = pitch(inputs.columns)
            if memory is None:
                buffer = part.new_empty((rows, step), dtype=dtype)
            else:
                buffer = memory[: rows * step * dtype.itemsize].view(dtype).view(rows, step)
            out = buffer[:, : inputs.columns]
            self.gathered = TakeRows(out, inputs.hidden, inputs.positions, inputs.scored)

    def take(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop`, `(stop - start, H + r)`."""
        return self.view[start:stop] if self.gathered is None else self.gathered(start, stop)


class BlockViews(NamedTuple):
    """A vocabulary block as GEMMs take it: pieces of columns, and the entries of each."""

    edges: tuple[tuple[int, int], ...]  # columns of the tile, whole vectors
    operands: tuple[tuple[Tensor, Tensor], ...]  # (C, H + r) and its transpose


class HeadBlocks:
    """Vocabulary blocks of the head in the GEMMs' dtype: views, or copies in one buffer.

    cuBLAS takes five times as long for a matrix whose columns are no whole vectors, and a resized
    vocabulary is often odd: the last few entries are then a piece of their own, padded with zeros.
    """

    def __init__(
        self,
        inputs: Inputs,
        columns: int,
        span: tuple[int, int] | None = None,
        *,
        padded: bool = True,
    ) -> None:
        """In blocks of `columns` entries, a multiple of 8, of a range of the vocabulary or all.

        Not `padded`, a view has its entries in one piece, whatever their number.
        """
        parts = inputs.weight
        self.blocks = list(spans(span or (0, parts[0].shape[0]), columns))
        self.weight, self.padded = parts[0], padded
        self.views: dict[int, BlockViews] = {}
        self.copied: TakeRows | None = None
        if len(parts) == 1 and parts[0].dtype == inputs.dtype:
            return
        buffer = parts[0].new_zeros((pitch(columns), pitch(inputs.columns)), dtype=inputs.dtype)
        self.buffer = buffer[:, : inputs.columns]
        self.copied = TakeRows(self.buffer, parts)

    def take(self, block: int) -> BlockViews:
        """The block-th block; its views are made when it is first taken."""
        if self.copied is None:
            if block not in self.views:
                self.views[block] = _views(self.weight, *self.blocks[block], padded=self.padded)
            return self.views[block]
        v0, v1 = self.blocks[block]
        self.copied(v0, v1)
        # Past the last entry lie zeros, or entries of another block: what they give is left out.
        w = self.buffer[: pitch(v1 - v0)]
        return BlockViews(((0, w.shape[0]),), ((w, w.t()),))


def _views(weight: Tensor, v0: int, v1: int, *, padded: bool) -> BlockViews:
    whole = (v1 - v0) // VECTOR * VECTOR if padded else v1 - v0
    pieces = [] if whole == 0 else [((0, whole), weight[v0 : v0 + whole])]
    if whole < v1 - v0:
        rest = weight.new_zeros((VECTOR, weight.shape[1]))
        rest[: v1 - v0 - whole].copy_(weight[v0 + whole : v1])
        pieces.append(((whole, whole + VECTOR), rest))
    edges, operands = zip(*pieces, strict=True)
    return BlockViews(edges, tuple((w, w.t()) for w in operands))


class TileViews:
    """Pieces of a tile as GEMMs take them, made once: a view costs as much as starting a kernel."""

    def __init__(self, tiles: Tiles) -> None:
        """Of one call."""
        self.tiles = tiles
        self.known: dict[tuple[object, ...], tuple[tuple[Tensor, Tensor], ...]] = {}

    def of(
        self, rows: tuple[int, int], edges: tuple[tuple[int, int], ...]
    ) -> tuple[tuple[Tensor, Tensor], ...]:
        """Logits and P (or logits again, where P is not stored) of some rows, piece by piece."""
        start, stop = rows
        key = (self.tiles.firsts(start), stop - start, edges)
        if key not in self.known:
            logits, probs = self.tiles.logits, self.tiles.probs
            (i, j), count = key[0], stop - start
            stored = logits if probs is None else probs
            self.known[key] = tuple(
                (logits[i : i + count, c0:c1], stored[j : j + count, c0:c1]) for c0, c1 in edges
            )
        return self.known[key]


def tile_pair(inputs: Inputs, rows: int, columns: int, *, apart: bool) -> tuple[Tensor, Tensor]:
    """Memory for logits and for P, (R, pitch) each: P apart, or over the logits row by row."""
    new = inputs.labels.new_empty
    logits = new((rows, pitch(columns)), dtype=inputs.wide)
    if inputs.wide == inputs.dtype:
        return logits, logits
    if apart:
        return logits, new(logits.shape, dtype=inputs.dtype)
    return logits, logits.view(inputs.dtype)


def sums_of(inputs: Inputs, rows: int) -> Sums:
    """Memory for the sums of P W of so many rows."""
    shape, new = (rows, inputs.columns), inputs.labels.new_empty
    apart = inputs.wide != torch.float32
    partial = new(shape, dtype=inputs.dtype) if apart else None
    return Sums(new(shape, dtype=torch.float32), partial)
