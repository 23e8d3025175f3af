"""Checks of the sparse gradient: its tile operations, and the op against its definition."""

import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orpo_kernels import reference
from orpo_kernels.constants import COMPACT_ROWS
from orpo_kernels.engine.sparse.plan import slot_pitch
from orpo_kernels.engine.sparse.slot_loop import KEPT_ROUNDING
from orpo_kernels.engine.tiles import compact_weight_gradient, softmax_compact_online_
from orpo_kernels.engine.tiles.collect import Entries
from orpo_kernels.engine.tiles.compact import pack_entries
from orpo_kernels.kernels import has_slots, launcher
from orpo_kernels.kernels.segment_store import SEGMENT_COLUMNS, Slots
from orpo_kernels.selftest import logps
from orpo_kernels.selftest.figures import (
    EPS32,
    Case,
    Figure,
    Setting,
    exact,
    largest,
    like_torch,
    rounded_once,
)
from orpo_kernels.selftest.tiles import TRANSFORMS, Transform

# 67 rows, a prime; 520 columns, 65 vectors of 16 bytes. Of the entries about one in fifty is kept.
ROWS, COLUMNS, FIRST_COLUMN, WIDTH = 67, 520, 1000, 33
EPS = 2.0**-8

# Of peaked logits slots keep a sixth of the columns and drop 6 % of the mass; of the others they
# would keep half and drop a third, and row blocks of a frozen head are done the exact way.
EPS_OF_PEAKED = 2.0**-6

VARIANTS = (
    (logps.Variant("frozen head, flat", trains=(True, False)), EPS),
    (logps.Variant("frozen head, peaked", trains=(True, False), peaked=True), EPS_OF_PEAKED),
    (logps.Variant("trainable head", bias=True), EPS),
    (
        logps.Variant("all of it", label_sets=2, softcap=4.0, logit_scale=0.7, bias=True, rank=4),
        EPS,
    ),
)


class Slotted(NamedTuple):
    """A tile's slots, and as a matrix; true E, total; the tail, and the groups of its rows."""

    slots: Slots
    entries: Tensor  # (R, C) float64, 0 where dropped
    E: Tensor
    total: Tensor
    groups: Tensor
    tail: Tensor
    rounded: float


class Listed(NamedTuple):
    """A tile after one look at it: its list, and as a matrix; true shares; what was summed."""

    entries: Entries
    matrix: Tensor  # (R, C) float64, 0 where dropped
    e: Tensor  # exp(z - m) of all
    slope: Tensor
    level: Tensor
    row_max: Tensor
    sum_exp: Tensor
    dropped: Tensor
    tail: Tensor
    groups: Tensor
    rounded: float


def cases(setting: Setting) -> Iterator[Case]:
    """The sparse gradient, in one dtype; slots where a GPU keeps them."""
    if has_slots(setting.device, setting.dtype):
        for transform in TRANSFORMS:
            yield Case("softmax_compact", transform.name, setting, _compact, (transform,))
        yield Case("slot_matmul", "float32 += kept entries", setting, _matmul)
    for transform in TRANSFORMS:
        name = "softmax_compact_online_"
        yield Case(name, transform.name, setting, _compact_online, (transform,))
    yield Case("pack_entries", "in order, and out of room", setting, _pack)
    yield Case("compact_weight_gradient", "some columns of a tile", setting, _weight_gradient)
    for variant, eps in VARIANTS:
        yield Case("linear_logps_sparse", variant.name, setting, _linear_logps, (variant, eps))


def _slotted(setting: Setting, transform: Transform) -> Slotted:
    generator = setting.generator()
    logits = _with_room(setting.put(3.0 * torch.randn(ROWS, COLUMNS, generator=generator)))
    bias = torch.randn(COLUMNS, generator=generator) if transform.bias else None
    labels = torch.randint(0, 2500, (2, ROWS), generator=generator)
    labels[:, ::7] = -1
    groups = torch.randint(0, 2, (ROWS,), generator=generator)
    options = (transform.logit_scale, transform.softcap)
    wide = None if bias is None else bias.double()
    z, slope = reference.tile_logits(exact(logits), wide, labels, FIRST_COLUMN, *options)
    rounded = 0.0 if wide is None else largest(exact(logits) + wide)
    level = (z.amax(1) + 0.25).float()  # the maximum may lie in an earlier tile
    E = reference.softmax_grad(z, slope, level.double())
    total = (torch.exp(z - level.double()[:, None]).sum(1) + 0.25).float()
    tail = torch.zeros(2, COLUMNS, device=setting.device)
    slots = launcher("softmax_compact", "softmax_compact")(
        logits, None if bias is None else bias.to(setting.device), labels.to(setting.device),
        FIRST_COLUMN, level.to(setting.device), total.to(setting.device), EPS, *options,
        groups.to(setting.device), tail,
    )  # fmt: skip
    entries = torch.zeros(ROWS, COLUMNS, device=setting.device)
    launcher("gather_matmul", "slot_matmul")(
        entries, slots, torch.eye(COLUMNS, device=setting.device)
    )
    return Slotted(slots, exact(entries), E, total.double(), groups, tail, rounded)


def _with_room(logits: Tensor) -> Tensor:
    """A copy of a tile that has the room for its slots."""
    rows, columns = logits.shape
    blocks = -(-rows // COMPACT_ROWS) * COMPACT_ROWS
    room = logits.new_empty(blocks, slot_pitch(columns))
    return room[:rows, :columns].copy_(logits)


def _compact(setting: Setting, transform: Transform) -> Iterator[Figure]:
    tile = _slotted(setting, transform)
    slots, entries = tile.slots, tile.entries
    live, share = entries != 0, tile.E / tile.total[:, None]
    # Rounding decides about an entry this close to eps.
    lost = ~live & (share > EPS * (1 + (64 + tile.rounded) * EPS32))
    yield Figure("entries over eps that are dropped", float(lost.sum()), 0.0)
    counted = exact(slots.entries) - _shared_columns(live).sum()
    yield Figure("kept entries not counted", float(counted.abs().sum()), 0.0)
    yield _kept_entries(setting, tile)
    yield rounded_once("sum of the kept", slots.mass, entries.sum(1))
    if transform.softcap is not None:
        yield rounded_once("sum of all", slots.row_sum, tile.E.sum(1), tile.rounded)
    dropped = torch.where(live, 0.0, share)
    truth = torch.stack([dropped[tile.groups == group].sum(0) for group in (0, 1)])
    yield rounded_once("tail", tile.tail, truth, tile.rounded + 16)


def _listed(setting: Setting, transform: Transform, capacity: int = COLUMNS) -> Listed:
    generator = setting.generator()
    logits = setting.put(3.0 * torch.randn(ROWS, COLUMNS, generator=generator))
    bias = torch.randn(COLUMNS, generator=generator) if transform.bias else None
    labels = torch.randint(0, 2500, (2, ROWS), generator=generator)
    groups = torch.randint(0, 2, (ROWS,), generator=generator)
    options = (transform.logit_scale, transform.softcap)
    wide = None if bias is None else bias.double()
    z, slope = reference.tile_logits(exact(logits), wide, labels, FIRST_COLUMN, *options)
    rounded = 0.0 if wide is None else largest(exact(logits) + wide)
    level = z.amax(1)
    e = torch.exp(z - level[:, None])
    row_max = torch.full((ROWS,), torch.finfo(torch.float32).min, device=setting.device)
    sum_exp, tail = torch.zeros_like(row_max), torch.zeros(2, COLUMNS, device=setting.device)
    with setting.all_threads():
        _, *lists, dropped = softmax_compact_online_(
            logits.clone(), None if bias is None else bias.to(setting.device),
            labels.to(setting.device), FIRST_COLUMN, row_max, sum_exp, None, None, None, EPS,
            torch.inf, ROWS, *options, groups.to(setting.device), tail, capacity,
        )  # fmt: skip
    entries = Entries(*lists)
    rows = torch.arange(ROWS).repeat_interleave(entries.offsets.cpu().diff())
    matrix = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    matrix[rows, entries.columns.cpu().long()] = exact(entries.values)
    sums = (level, row_max, sum_exp, dropped, tail, groups, rounded)
    return Listed(entries, matrix, e, slope, *sums)


def _compact_online(setting: Setting, transform: Transform) -> Iterator[Figure]:
    """One tile at a look: its list, what is summed instead, and the tile with too many entries."""
    for capacity in (COLUMNS, 0):
        tile = _listed(setting, transform, capacity)
        e, slope, matrix = tile.e, tile.slope, tile.matrix
        yield rounded_once("max", tile.row_max, tile.level)
        error = largest(exact(tile.sum_exp) / e.sum(1) - 1.0)
        yield Figure("sum", error, setting.eps / 8 + 64 * EPS32)
        if capacity == 0:
            empty = tile.dropped.numel() == tile.entries.columns.numel() == 0
            refused = not tile.tail.any() and empty
            yield Figure("over the capacity, and not refused", float(not refused), 0.0)
            continue
        live, share = matrix != 0, e * slope / e.sum(1)[:, None]
        # Rounding decides about an entry this close to eps.
        sure = (share / EPS - 1).abs() > 2 * setting.eps
        wrong = (live != (share > EPS)) & sure
        yield Figure("entries chosen wrongly", float(wrong.sum()), 0.0)
        rest = torch.where(live, 0.0, share)
        truth = torch.stack([rest[tile.groups == group].sum(0) for group in (0, 1)])
        limit = setting.eps + (64 + tile.rounded) * EPS32
        yield Figure("values", largest((matrix / (e * slope) - 1.0)[live]), limit)
        yield Figure("tail", largest(exact(tile.tail) - truth) / largest(truth), limit)
        error = largest(exact(tile.dropped) - rest.sum(1) * e.sum(1))
        yield Figure("dropped", error / largest(e.sum(1)), limit)


def _kept_entries(setting: Setting, tile: Slotted) -> Figure:
    error = (tile.entries / tile.E - 1.0)[tile.entries != 0]
    step = max(setting.eps, KEPT_ROUNDING)
    return Figure("kept entries", largest(error), step + (64 + tile.rounded) * EPS32)


def _shared_columns(mask: Tensor) -> Tensor:
    """Of (R, C): where one of 64 rows in sequence has the column."""
    blocks = torch.split(mask, COMPACT_ROWS)
    return torch.cat([rows.any(0, keepdim=True).expand_as(rows) for rows in blocks])


def _matmul(setting: Setting) -> Iterator[Figure]:
    generator = setting.generator()
    tile = _slotted(setting, TRANSFORMS[0])
    # The product of slots rounds a float32 head to their dtype.
    weight = setting.put(torch.randn(COLUMNS, WIDTH, generator=generator).bfloat16())
    before = torch.randn(ROWS, WIDTH, generator=generator)
    sums = before.to(setting.device, copy=True)
    launcher("gather_matmul", "slot_matmul")(sums, tile.slots, weight)
    yield _kept_entries(setting, tile)
    truth = before.double() + tile.entries @ exact(weight)
    summands = before.double().abs() + tile.entries.abs() @ exact(weight).abs()
    yield rounded_once("sums", sums, truth, summands=summands)


def _pack(setting: Setting) -> Iterator[Figure]:
    entries = _listed(setting, TRANSFORMS[0]).entries
    store, table = _store(setting)
    pack_entries(entries, store, table, 0)
    pack_entries(None, store, table, 1)
    pack_entries(entries, store, table, 2)
    first, size = (int(each) for each in table[2])
    pack_entries(entries, store[: first + size + 8], table, 3)
    found = table.tolist()
    yield Figure("packed over another", float(found[2][0] < found[0][0] + found[0][1]), 0.0)
    yield Figure("refused with room", float(found[0][1] <= 0) + float(size <= 0), 0.0)
    yield Figure("none, and not refused", float(found[1][1] >= 0), 0.0)
    yield Figure("without room, and not refused", float(found[3][1] >= 0), 0.0)


def _store(setting: Setting) -> tuple[Tensor, Tensor]:
    """Room for three tiles and more, and a table of four."""
    store = torch.empty(64 * ROWS * COLUMNS, dtype=torch.uint8, device=setting.device)
    return store, torch.zeros(4, 2, dtype=torch.int64, device=setting.device)


def _weight_gradient(setting: Setting) -> Iterator[Figure]:
    """From the second packed tile, which does not begin at the start of the store."""
    generator = setting.generator()
    hidden = setting.put(torch.randn(ROWS, WIDTH, generator=generator))
    coefficients = torch.randn(ROWS, generator=generator)
    store, table = _store(setting)
    tiles = [_listed(setting, each) for each in TRANSFORMS[:2]]
    for item, tile in enumerate(tiles):
        pack_entries(tile.entries, store, table, item)
    before = torch.randn(300, WIDTH, generator=generator)
    block = before.to(setting.device, copy=True)
    with setting.all_threads():
        compact_weight_gradient(
            block, store, table, 1, 50, coefficients.to(setting.device), hidden
        )  # fmt: skip
    scaled = coefficients.double()[:, None] * exact(hidden)
    truth = before.double() - tiles[1].matrix[:, 50:350].t() @ scaled
    yield rounded_once("block", block, truth, 16)


def _linear_logps(setting: Setting, variant: logps.Variant, eps: float) -> Iterator[Figure]:
    """Against its definition; what torch rounds is measured at the exact gradient."""
    here = logps.problem(setting, variant)
    true, eager = here.true(), here.evaluate(logps.materialised)
    groups = torch.randint(0, 2, (logps.ROWS,), generator=setting.generator())
    found = here.evaluate(logps.ours, gradient="sparse", eps=eps, tail_groups=groups)
    truth = true.evaluate(logps.definition)
    in_slots = has_slots(setting.device, setting.dtype)
    frozen = not variant.trains[1]
    changed = truth | _definition(true, groups, eps, in_slots=in_slots, frozen=frozen)
    for what, actual in found.items():
        rounded = changed[what] + (exact(eager[what]) - truth[what])
        dtype = torch.bfloat16 if in_slots else setting.dtype
        yield like_torch(what, actual, changed[what], rounded, dtype)


def _dense(columns: reference.SparseSoftmax, logit_scale: float) -> Tensor:
    """Of rows, which are done the exact way: as `kernels/live_columns.py`, or the whole call."""
    kernel = importlib.import_module("orpo_kernels.kernels.live_columns")
    loop = importlib.import_module("orpo_kernels.engine.sparse.scan_loop")
    dense = [
        (mass.mean() > kernel.MOST_LOST * abs(logit_scale))
        | (mask[0].sum() > mask.shape[1] // kernel.MOST_LIVE)
        for mass, mask in zip(
            torch.split(columns.mass, COMPACT_ROWS),
            torch.split(columns.mask, COMPACT_ROWS),
            strict=True,
        )
    ]
    if torch.stack(dense).double().mean() > loop.MOST_DENSE:
        return torch.ones(len(columns.mass), dtype=torch.bool)
    return torch.stack(dense).repeat_interleave(COMPACT_ROWS)[: len(columns.mass)]


def _definition(
    true: logps.Problem, groups: Tensor, eps: float, *, in_slots: bool, frozen: bool
) -> dict[str, Tensor]:
    """Its gradients, by entry; or of slots, in columns that one of 64 scored rows has over eps.

    In the gradient of the head, of slots, only a row that has one over eps in 64 columns keeps any.
    With a frozen head row blocks that would keep or drop too much are done the exact way.
    """
    leaves = {name: leaf.detach() for name, leaf in true.leaves.items()}
    ranks = [name for name in ("hidden", "hidden_r") if name in leaves]
    hidden = torch.cat([leaves[name] for name in ranks], 1)
    weight = torch.cat([leaves[name.replace("hidden", "weight")] for name in ranks], 1)

    def gradients(block: int, **masks: Any) -> reference.SparseGradients:
        return reference.sparse_gradients(
            hidden, weight, true.labels, true.coefficients, leaves.get("bias"), eps=eps,
            groups=groups, block=block, **masks, **true.options,
        )  # fmt: skip

    found = gradients(1)
    if in_slots and frozen:
        columns = gradients(COMPACT_ROWS).softmax
        found = gradients(COMPACT_ROWS, whole=_dense(columns, true.options["logit_scale"]))
    elif in_slots:
        over = found.softmax.mask
        live = torch.nn.functional.pad(over, (0, -over.shape[1] % SEGMENT_COLUMNS))
        live = live.view(len(over), -1, SEGMENT_COLUMNS).any(2)
        live = live.repeat_interleave(SEGMENT_COLUMNS, 1)[:, : over.shape[1]]
        found = gradients(COMPACT_ROWS, head_mask=_shared_columns(over) & live)
    widths = [leaves[name].shape[1] for name in ranks]
    named = {"dbias": found.dbias}
    parts = (torch.split(each, widths, 1) for each in (found.dhidden, found.dweight))
    for name, of_rows, of_head in zip(ranks, *parts, strict=True):
        named[f"d{name}"], named[f"d{name.replace('hidden', 'weight')}"] = of_rows, of_head
    return named
