"""How the budget of a sparse call is divided: arithmetic, no tensor is looked at.

Kept entries take one of two forms, for a whole call. Lists (CSR), a row by itself, are what a CPU
and plain torch keep. Slots are what a GPU keeps whose tensor cores multiply them, in a dtype with
kernels (`kernels/softmax_compact.py`): a column is kept for 64 rows, and takes the place of logits
of its own tile. Every such tile therefore has the room for all of it: rows of a multiple of 128
elements, whole blocks of 64 rows.

A trainable head keeps its entries from forward to backward: lists in an eighth of the budget, a
GPU's segments in a quarter. Segments are packed from the whole vocabulary at once: where no such
tile of 64 rows fits beside the store there is none, and the backward recomputes every tile.
"""

import contextlib
from dataclasses import replace
from typing import NamedTuple

import torch

from orpo_kernels.constants import COMPACT_COLUMNS, COMPACT_ROWS, PARTIAL_SHARE
from orpo_kernels.engine.budget import (
    Plan,
    Sizes,
    TooSmallError,
    first_fit,
    forward_units,
    plan_backward,
    shapes,
)
from orpo_kernels.engine.gpu.card import card_of
from orpo_kernels.engine.gpu.model import job_of
from orpo_kernels.engine.gpu.plan import plan_scan
from orpo_kernels.kernels import has_slots
from orpo_kernels.kernels.segment_store import ScanShape, list_bytes, table_bytes

_LIST_SHARE, _SEGMENT_SHARE = 8, 4  # a store is at most this part of the budget
_SEGMENT_ROW_BYTES = 2**15  # nor more than this for a row; 5 % of Llama 3's vocabulary are 13 KB
_LIST_ROW_BYTES = 2**11  # a row of a list keeps about 50 entries, 400 bytes
_PACKED_ROWS = (8192, 4096, 2048, 1024, 512, 256, 128, 64)
_MANY_ROWS = 8192  # more than any chunk has


class SparsePlan(NamedTuple):
    """How the budget is divided: nothing here depends on which rows are scored, it can be traced.

    Attributes:
        tile: shape of the forward.
        blocks: vocabulary blocks.
        items: tiles, at most.
        store_bytes: of the kept entries of a trainable head; 0: its backward recomputes them.
        reserved_bytes: taken beside a tile, in the forward and in the backward.
        slots: whether kept entries are slots.
        scan: of slots of a head that is not trained, the shape of their forward.
    """

    tile: Plan
    blocks: int
    items: int
    store_bytes: int
    reserved_bytes: int
    slots: bool
    scan: ScanShape | None = None


def takes_slots(sizes: Sizes) -> bool:
    """Whether the kept entries of a call are slots."""
    return sizes.on_triton and has_slots(sizes.device, sizes.compute_dtype)


def live_share(device: torch.device) -> float:
    """Kept entries of a tile, at most, as a share of it; over it the exact way is faster.

    A CPU adds kept entries one by one, at a twentieth of the rate of a 16-bit GEMM.
    """
    return 1 / 32 if device.type == "cpu" else 1 / 4


def plan_sparse(
    sizes: Sizes, groups: int, budget: int, *, trainable: bool, slots: bool = False
) -> SparsePlan:
    """The shapes of `sizes.rows` rows, scored or not, in `groups` groups.

    A trainable head whose kept entries have no room is left a store of 0 bytes: its backward
    recomputes every tile.

    Raises:
        ValueError: the budget is too small for one tile, forward or backward.
    """
    if slots and not trainable:
        job = job_of(sizes, sizes.wide_bytes)
        shape, need = plan_scan(job, groups, budget, card_of(sizes.device))
        tile = Plan(shape.rows, shape.columns, need, COMPACT_ROWS)
        blocks = -(-sizes.vocabulary // shape.columns)
        items = blocks * -(-sizes.rows // shape.rows)
        return SparsePlan(tile, blocks, items, 0, 0, slots, shape)
    store, lists = 0, 0
    if trainable and slots:
        store, lists = segment_bytes(sizes, budget)
    elif trainable:
        row_bytes = _LIST_ROW_BYTES if sizes.on_cpu else _SEGMENT_ROW_BYTES
        store = min(budget // _LIST_SHARE, sizes.rows * row_bytes) // 16 * 16
    if store > 0:
        with contextlib.suppress(TooSmallError):
            return _divided(sizes, groups, budget, (store, lists), trainable, slots)
    return _divided(sizes, groups, budget, (0, 0), trainable, slots)


def _divided(
    sizes: Sizes, groups: int, budget: int, stored: tuple[int, int], trainable: bool, slots: bool
) -> SparsePlan:
    many, (store, lists) = replace(sizes, rows=_MANY_ROWS), stored
    # Sums of the tail, and those of one tile at most once more.
    reserved = 2 * groups * (sizes.vocabulary + sizes.hidden_columns) * sizes.wide_bytes + store
    record = 2 * sizes.rows * sizes.wide_bytes if store > 0 else 0
    if slots:
        tile = plan_slots(many, budget, (reserved, record), groups, packs=store > 0)
    else:
        tile = plan_lists(many, budget, (reserved, record), live_share(sizes.device))
    blocks = -(-sizes.vocabulary // tile.columns)
    if trainable:
        reserved += blocks * record + lists
        rows = tile.rows * (2 if slots else 1)  # of a chunk, and scaled
        reserved += rows * sizes.hidden_columns * sizes.compute_dtype.itemsize
        plan_backward(many, budget, sizes.hidden_columns, recompute=True, reserved=reserved)
    items = blocks * -(-sizes.rows // tile.rows)
    return SparsePlan(tile, blocks, items, store, reserved, slots)


def plan_lists(sizes: Sizes, budget: int, reserved: tuple[int, int], entry_share: float) -> Plan:
    """Shape of a forward whose kept entries are lists: the exact one's, and the entries of a tile.

    Args:
        sizes: of the problem.
        budget: bytes.
        reserved: bytes of it that are taken, whatever the shape, and for each vocabulary block.
        entry_share: entries kept of a tile, at most, as a share of it.

    Returns:
        The plan.
    """
    entry_bytes = entry_share * (4 + sizes.wide_bytes)
    if sizes.on_cpu:
        # Lists that grow, of entries with both E; and column sums of 64 rows, in up to two groups.
        entry_bytes += entry_share * 2 * (4 + 2 * sizes.wide_bytes) + sizes.wide_bytes / 32
    per_cell = sizes.product_dtype.itemsize
    if sizes.widens:
        per_cell += sizes.compute_dtype.itemsize
    per_row, per_column = forward_units(sizes, with_gradient=True)
    units = (per_row - sizes.list_bytes + 128, per_column, per_cell)
    lists = (sizes.list_bytes, entry_bytes)  # of kept entries, or in the exact way of large ones
    return first_fit(sizes, budget, units, shapes(sizes), reserved, either=lists)


def plan_slots(
    sizes: Sizes, budget: int, reserved: tuple[int, int], groups: int, *, packs: bool
) -> Plan:
    """Shape of a forward whose kept entries are slots.

    Beside the tile: mask, lists and sums of the tail by row block, and the partial products of the
    kept entries with the head, three rows of float32 per row or a share of the tile.

    Args:
        sizes: of the problem.
        budget: bytes.
        reserved: bytes of it that are taken, whatever the shape, and for each vocabulary block.
        groups: of the tail.
        packs: whether the kept entries are packed: of the whole vocabulary, then.

    Returns:
        The plan; its rows are a multiple of 64.

    Raises:
        ValueError: nothing of the kind fits.
    """
    per_row, per_column = forward_units(sizes, with_gradient=True)
    per_row += 128 + 12 * sizes.hidden_columns
    tile = sizes.product_dtype.itemsize
    per_cell = tile + tile / PARTIAL_SHARE + (10 + 4 * groups) / COMPACT_ROWS
    units = (per_row + int(COMPACT_COLUMNS * per_cell), per_column, per_cell)
    tiles = [(rows, sizes.vocabulary) for rows in _PACKED_ROWS] if packs else shapes(sizes)
    return first_fit(sizes, budget, units, tiles, reserved, COMPACT_ROWS)


def slot_pitch(columns: int) -> int:
    """Elements from a row of a tile to the next where it has the room for its slots."""
    return -(-columns // COMPACT_COLUMNS) * COMPACT_COLUMNS


def segment_bytes(sizes: Sizes, budget: int) -> tuple[int, int]:
    """Bytes of the store of a trainable head, and of the lists made from it; 0 for no room."""
    tables = table_bytes(sizes.rows, sizes.vocabulary, -(-sizes.rows // COMPACT_ROWS))
    store = min(budget // _SEGMENT_SHARE, tables + sizes.rows * _SEGMENT_ROW_BYTES) // 16 * 16
    if store < 2 * tables:
        return 0, 0
    return store, list_bytes(sizes.rows, sizes.vocabulary, store)
