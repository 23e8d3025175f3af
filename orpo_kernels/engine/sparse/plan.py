"""How the budget of a sparse call is divided: arithmetic, no tensor is looked at.

Kept entries take one of two forms, for a whole call. Lists (CSR), a row by itself, are what a CPU
and plain torch keep. Slots are what a GPU keeps whose tensor cores multiply them, in a dtype with
kernels (`kernels/scan.py`): a column is kept for 64 rows.

A trainable head keeps its entries from forward to backward: lists in an eighth of the budget, slots
in a quarter, or their columns alone, by the cost model: the backward then makes them again, and the
forward has nearly the whole budget for its tiles. Lists that do not fit are recomputed. Where any
slots do not fit dW is the exact loop's; where they are likely not to, there is no store.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Sequence
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
from orpo_kernels.engine.gpu.model import (
    Job,
    job_of,
    remade_seconds,
    scan_seconds,
    slot_gradient_seconds,
)
from orpo_kernels.engine.gpu.plan import plan_backward as plan_sweeps
from orpo_kernels.engine.gpu.plan import plan_scan, text_columns
from orpo_kernels.engine.gpu.shapes import pitch
from orpo_kernels.kernels import has_slots
from orpo_kernels.kernels.slot_store import COLUMN_BYTES, SLOT_BYTES, ScanShape, aligned

_LIST_SHARE, _SLOT_SHARE = 8, 4  # a store is at most this part of the budget
_LIST_ROW_BYTES = 2**11  # a row of a list keeps about 50 entries, 400 bytes
# So many columns of 64 rows for each that has room in the store, least and, of a vocabulary that is
# not small, most: text keeps one in 75.
_MOST_KEPT, _LEAST_KEPT = 8, 64
_MANY_ROWS = 8192  # more than any chunk has

LEAST_PANEL = 64
"""Columns of the products of slots, at least: in 64 panels they take two fifths of what the exact
loop takes (`engine/gpu/model.py`, `slot_gradient_seconds`)."""

_ROW_STEP, _ROOM_STEP = 512, 2**20  # rows and bytes that ranges are planned for
# Times that the vocabulary is halved, at most; of slots, the last range has at most one in so many.
_MOST_HALVINGS, _LAST_SHARE = 6, 8

# Of a slot in the backward: what sorts them, and its place in the order.
_ORDER_BYTES, _PLACE_BYTES = 36, 4


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
        remakes: whether the store has the columns of slots alone.
    """

    tile: Plan
    blocks: int
    items: int
    store_bytes: int
    reserved_bytes: int
    slots: bool
    scan: ScanShape | None = None
    remakes: bool = False

    @property
    def capacity(self) -> int:
        """Slots that have room in the store."""
        return self.store_bytes // (COLUMN_BYTES if self.remakes else SLOT_BYTES)


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
    if slots:
        return _slots_planned(sizes, groups, budget, trainable=trainable)
    store = 0
    if trainable:
        row_bytes = _LIST_ROW_BYTES if sizes.on_cpu else 16 * _LIST_ROW_BYTES
        store = min(budget // _LIST_SHARE, sizes.rows * row_bytes) // 16 * 16
    if store > 0:
        with contextlib.suppress(TooSmallError):
            return _lists_planned(sizes, groups, budget, store, trainable)
    return _lists_planned(sizes, groups, budget, 0, trainable)


def _slots_planned(sizes: Sizes, groups: int, budget: int, *, trainable: bool) -> SparsePlan:
    job, card = job_of(sizes, sizes.wide_bytes), card_of(sizes.device)

    def planned(store: Store) -> SparsePlan:
        left = budget - store.size
        shape, need = plan_scan(job, groups, left, card)
        if trainable:  # rows that are recomputed, whichever they are
            plan_sweeps(replace(job, in_result=False), left, card)
        tile = Plan(shape.rows, shape.columns, need + store.size, COMPACT_ROWS)
        blocks = -(-sizes.vocabulary // shape.columns)
        items = -(-sizes.rows // COMPACT_ROWS)
        return SparsePlan(tile, blocks, items, store.size, store.size, True, shape, store.remade)

    def seconds(plan: SparsePlan) -> float:
        left = budget - plan.store_bytes
        return trainable_seconds(job, groups, left, plan.scan, plan.capacity, plan.remakes, card)

    found = []
    for store in slot_stores(sizes, groups, budget) if trainable else []:
        with contextlib.suppress(TooSmallError):
            found.append(planned(store))
    return min(found, key=seconds) if found else planned(Store(0, False))


@functools.lru_cache(maxsize=1024)
def trainable_seconds(
    job: Job, groups: int, left: int, scan: ScanShape | None, capacity: int, remakes: bool,
    card: Card,
) -> float:  # fmt: skip
    """What a forward of slots and dW from them should take, with so many bytes beside the store."""
    if scan is None:
        return math.inf
    slots = min(capacity, _slots(job, _LEAST_KEPT))
    backward = gradient_seconds(job, groups, left, slots, capacity, card, remakes=remakes)
    return scan_seconds(job, scan, card) + backward


def gradient_seconds(
    job: Job, groups: int, left: int, slots: int, capacity: int, card: Card, *, remakes: bool
) -> float:
    """What dW from so many slots should take, of a store for `capacity`; infinite without room."""

    def room(remade: int) -> int:
        return left - gradient_bytes(job, groups, capacity, remade * remakes)

    edges = planned_edges(job, capacity, room(capacity), card)
    ranges = range_panels(job, edges, even_slots(edges, slots), room(slots))
    if ranges is None:
        return math.inf
    remade = remade_seconds(job, slots, card) if remakes else 0.0
    return remade + slot_gradient_seconds(job, ranges, card)


class Store(NamedTuple):
    """Bytes that a trainable head keeps of its slots; `remade`: of their columns alone."""

    size: int
    remade: bool


def slot_stores(sizes: Sizes, groups: int, budget: int) -> list[Store]:
    """Stores a trainable head may have, none where text would not have room in any.

    The backward takes it, lists of its slots and, at least, a panel of the products of a last range
    of the vocabulary with an 8th of them; those of the others lie in dW. Slots of 16-bit products
    can be made again, in the backward's memory.
    """
    job = job_of(sizes, sizes.wide_bytes)
    room = budget - gradient_bytes(job, groups, 0)
    last = 4 * LEAST_PANEL // _LAST_SHARE
    of_slots = SLOT_BYTES + max(_ORDER_BYTES, _PLACE_BYTES + last)
    of_columns = COLUMN_BYTES + max(_ORDER_BYTES, _PLACE_BYTES + 2 * COMPACT_ROWS + last)
    counts = [(min(room // of_slots, budget // _SLOT_SHARE // SLOT_BYTES), SLOT_BYTES, False)]
    if job.item == 2:
        counts.append((room // of_columns, COLUMN_BYTES, True))
    most = max(job.vocabulary // _MOST_KEPT, min(job.vocabulary // 3, text_columns(job.vocabulary)))
    most *= -(-job.rows // COMPACT_ROWS)
    return [
        Store(aligned(min(count, most) * size), remade)
        for count, size, remade in counts
        if count >= _slots(job, _LEAST_KEPT)
    ]


def gradient_bytes(job: Job, groups: int, slots: int, remade: int = 0) -> int:
    """What the gradient of the head takes for so many kept slots, beside them and their products.

    Lists of the vocabulary and what sorts them; of labels, likewise; coefficients; the tail; of
    slots, their places; and those that are made again.
    """
    of_rows = job.rows * (20 + 32 * job.label_sets)
    of_slots = slots * _PLACE_BYTES + 2 * COMPACT_ROWS * remade
    return of_rows + job.vocabulary * (64 + 4 * groups) + 64 * job.columns + of_slots


def even_slots(edges: Sequence[int], slots: int) -> list[int]:
    """Slots of every range, where they are evenly in the vocabulary."""
    spread = [slots * edge // edges[-1] for edge in edges]
    return [last - first for first, last in itertools.pairwise(spread)]


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
    job: Job, edges: Sequence[int], slots: list[int], room: int
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


def planned_edges(job: Job, capacity: int, room: int, card: Card) -> tuple[int, ...]:
    """Where ranges of the vocabulary begin and end, as is fastest for what text keeps.

    Each is half of what is left, and so is the last. Made for numbers rounded, and remembered.
    """
    many = replace(job, rows=-(-job.rows // _ROW_STEP) * _ROW_STEP)
    slots = min(capacity, _slots(many, _LEAST_KEPT))
    if room > 8 * _ROOM_STEP:
        room = room // _ROOM_STEP * _ROOM_STEP
    return _edges(many, slots, room, card)


@functools.lru_cache(maxsize=1024)
def _edges(job: Job, slots: int, room: int, card: Card) -> tuple[int, ...]:
    vocabulary = job.vocabulary

    def edges(halvings: int) -> tuple[int, ...]:
        begins = {vocabulary - (vocabulary >> k) for k in range(halvings + 1)}
        return *sorted(begins), vocabulary

    def seconds(halvings: int) -> float:
        ranges = range_panels(job, edges(halvings), even_slots(edges(halvings), slots), room)
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
