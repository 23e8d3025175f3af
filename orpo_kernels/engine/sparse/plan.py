"""How the budget of a sparse call is divided: arithmetic, no tensor is looked at.

Kept entries take one of two forms, for a whole call. Lists (CSR), a row by itself, are what a CPU
and plain torch keep. Slots are what a GPU keeps whose tensor cores multiply them, in a dtype with
kernels (`kernels/scan.py`): a column is kept for 64 rows.

A trainable head keeps its entries from forward to backward: lists in an eighth of the budget, slots
in a quarter, or less, so that the backward has room for their products. Lists that do not fit are
recomputed. Where any slots do not fit dW is the exact loop's; where they are likely not to, there
is no store.
"""

import contextlib
import functools
import itertools
import math
from dataclasses import replace
from typing import NamedTuple

import torch

from orpo_kernels.constants import COMPACT_ROWS
from orpo_kernels.engine.budget import (
    Plan,
    Sizes,
    TooSmallError,
    first_fit,
    forward_units,
    plan_backward,
    shapes,
)
from orpo_kernels.engine.gpu.card import Card, card_of
from orpo_kernels.engine.gpu.model import Job, job_of, slot_gradient_seconds
from orpo_kernels.engine.gpu.plan import plan_backward as plan_sweeps
from orpo_kernels.engine.gpu.plan import plan_scan
from orpo_kernels.engine.gpu.shapes import pitch
from orpo_kernels.kernels import has_slots
from orpo_kernels.kernels.slot_store import SLOT_BYTES, ScanShape, aligned

_LIST_SHARE, _SLOT_SHARE = 8, 4  # a store is at most this part of the budget
_LIST_ROW_BYTES = 2**11  # a row of a list keeps about 50 entries, 400 bytes
# So many columns of 64 rows for each that has room in the store, least and most: text keeps one in
# 75.
_MOST_KEPT, _LEAST_KEPT = 8, 64
_MANY_ROWS = 8192  # more than any chunk has

LEAST_PANEL = 64
"""Columns of the products of slots, at least: in 64 panels they take two fifths of what the exact
loop takes (`engine/gpu/model.py`, `slot_gradient_seconds`)."""

# Times that the vocabulary is halved, at most; of slots, the last range has at most one in so many.
_MOST_HALVINGS, _LAST_SHARE = 6, 8

_ORDER_BYTES = 36  # of a slot in the backward: its place in the lists, and what sorts them


class SparsePlan(NamedTuple):
    """How the budget is divided: nothing here depends on which rows are scored, it can be traced.

    Attributes:
        tile: shape of the forward.
        blocks: vocabulary blocks.
        items: tiles, at most; of slots, blocks of 64 rows.
        store_bytes: of the kept entries of a trainable head; 0: its backward recomputes them.
        reserved_bytes: taken beside a tile, in the forward and in the backward.
        slots: whether kept entries are slots.
        scan: of slots, the shape of their forward.
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
    planned = _slots_planned if slots else _lists_planned
    store = 0
    if trainable and slots:
        store = slot_store_bytes(sizes, groups, budget)
    elif trainable:
        row_bytes = _LIST_ROW_BYTES if sizes.on_cpu else 16 * _LIST_ROW_BYTES
        store = min(budget // _LIST_SHARE, sizes.rows * row_bytes) // 16 * 16
    if store > 0:
        with contextlib.suppress(TooSmallError):
            return planned(sizes, groups, budget, store, trainable)
    return planned(sizes, groups, budget, 0, trainable)


def _slots_planned(
    sizes: Sizes, groups: int, budget: int, store: int, trainable: bool
) -> SparsePlan:
    job, card = job_of(sizes, sizes.wide_bytes), card_of(sizes.device)
    shape, need = plan_scan(job, groups, budget - store, card)
    if trainable:  # rows that are recomputed, whichever they are
        plan_sweeps(replace(job, in_result=False), budget - store, card)
    tile = Plan(shape.rows, shape.columns, need + store, COMPACT_ROWS)
    blocks = -(-sizes.vocabulary // shape.columns)
    items = -(-sizes.rows // COMPACT_ROWS)
    return SparsePlan(tile, blocks, items, store, store, True, shape)


def slot_store_bytes(sizes: Sizes, groups: int, budget: int) -> int:
    """Bytes of the store of a trainable head, 0 where text would not have room in it.

    The backward takes it, lists of its slots and, at least, a panel of the products of a last range
    of the vocabulary with an 8th of them; those of the others lie in dW.
    """
    each = SLOT_BYTES + _ORDER_BYTES + 4 * LEAST_PANEL // _LAST_SHARE
    room = budget - gradient_bytes(job_of(sizes, sizes.wide_bytes), groups, 0)
    blocks = -(-sizes.rows // COMPACT_ROWS)
    most, least = (blocks * -(-sizes.vocabulary // k) for k in (_MOST_KEPT, _LEAST_KEPT))
    count = min(most, budget // _SLOT_SHARE // SLOT_BYTES, room // each)
    return aligned(count * SLOT_BYTES) if count >= least else 0


def gradient_bytes(job: Job, groups: int, slots: int) -> int:
    """What the gradient of the head takes for so many kept slots, beside them and their products.

    Lists of the vocabulary and what sorts them; of labels, likewise; coefficients; the tail.
    """
    of_rows = job.rows * (20 + 32 * job.label_sets)
    return of_rows + job.vocabulary * (64 + 4 * groups) + 64 * job.columns + slots * _ORDER_BYTES


def panel_columns(columns: int, slots: int, room: int) -> int:
    """Columns of a panel of the products of so many slots, in so many bytes.

    Panels are even, of whole vectors; 0 where the narrowest that is worth it has no room.
    """
    whole, vector = pitch(columns), pitch(1)
    fitting = min(whole, room // (4 * max(1, slots)))
    unit = LEAST_PANEL if fitting >= LEAST_PANEL else vector
    fitting = fitting // unit * unit if fitting < whole else whole
    if fitting < min(LEAST_PANEL, whole):
        return 0
    count = -(-whole // fitting)
    return min(fitting, -(-whole // (count * unit)) * unit)


def range_panels(
    job: Job, edges: list[int], slots: list[int], room: int
) -> list[tuple[int, int, int]] | None:
    """Columns, slots and panel of every range of the vocabulary, None where one has no room.

    Products lie in what of dW comes after the range, or in so many bytes.
    """
    found = []
    for (first, last), count in zip(itertools.pairwise(edges), slots, strict=True):
        lent = (job.vocabulary - last) * job.columns * job.result_item if job.in_result else 0
        panel = panel_columns(job.columns, count, max(room, lent))
        if panel == 0:
            return None
        found.append((last - first, count, panel))
    return found


@functools.lru_cache(maxsize=1024)
def planned_edges(job: Job, capacity: int, room: int, card: Card) -> list[int]:
    """Where ranges of the vocabulary begin and end, as is fastest for what text keeps.

    Each is half of what is left, and so is the last.
    """
    slots, vocabulary = min(capacity, _slots(job, _LEAST_KEPT)), job.vocabulary

    def edges(halvings: int) -> list[int]:
        begins = {vocabulary - (vocabulary >> k) for k in range(halvings + 1)}
        return sorted(begins | {vocabulary})

    def seconds(halvings: int) -> float:
        spread = [slots * edge // vocabulary for edge in edges(halvings)]
        counts = [last - first for first, last in itertools.pairwise(spread)]
        ranges = range_panels(job, edges(halvings), counts, room)
        return math.inf if ranges is None else slot_gradient_seconds(job, ranges, card)

    return edges(min(range(_MOST_HALVINGS + 1), key=seconds))


def _slots(job: Job, columns: int) -> int:
    """Of a call that keeps one in so many columns of 64 rows."""
    return -(-job.rows // COMPACT_ROWS) * -(-job.vocabulary // columns)


def _lists_planned(
    sizes: Sizes, groups: int, budget: int, store: int, trainable: bool
) -> SparsePlan:
    many = replace(sizes, rows=_MANY_ROWS)
    # Sums of the tail, and those of one tile at most once more.
    reserved = 2 * groups * (sizes.vocabulary + sizes.hidden_columns) * sizes.wide_bytes + store
    record = 2 * sizes.rows * sizes.wide_bytes if store > 0 else 0
    tile = plan_lists(many, budget, (reserved, record), live_share(sizes.device))
    blocks = -(-sizes.vocabulary // tile.columns)
    if trainable:
        reserved += blocks * record
        reserved += tile.rows * sizes.hidden_columns * sizes.compute_dtype.itemsize
        plan_backward(many, budget, sizes.hidden_columns, recompute=True, reserved=reserved)
    items = blocks * -(-sizes.rows // tile.rows)
    return SparsePlan(tile, blocks, items, store, reserved, False)


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
