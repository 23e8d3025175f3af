"""Checks of the sparse gradient: its tile operations, and the op against its definition."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels import reference
from orpo_kernels.constants import COMPACT_ROWS
from orpo_kernels.engine.compact import (
    compact_matmul,
    compact_pack,
    softmax_compact,
)
from orpo_kernels.engine.guard import density_guard
from orpo_kernels.engine.slots import KEPT_ROUNDING, tile_with_room
from orpo_kernels.engine.tiles import compact_weight_gradient, softmax_compact_online_
from orpo_kernels.kernels import has_slots
from orpo_kernels.kernels.segment_store import SEGMENT_COLUMNS
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

VARIANTS = (
    logps.Variant("frozen head", trains=(True, False)),
    logps.Variant("trainable head", bias=True),
    logps.Variant("all of it", label_sets=2, softcap=4.0, logit_scale=0.7, bias=True, rank=4),
)


class Compacted(NamedTuple):
    """A tile's kept entries as the backend has them, and as a matrix; true E, total; the tail."""

    kept: list[Tensor]
    entries: Tensor  # (R, C) float64, 0 where dropped
    E: Tensor
    total: Tensor
    groups: Tensor
    tail: Tensor
    rounded: float
    in_slots: bool


def cases(setting: Setting) -> Iterator[Case]:
    """The sparse gradient, in one dtype."""
    for transform in TRANSFORMS:
        yield Case("softmax_compact", transform.name, setting, _compact, (transform,))
    for transform in TRANSFORMS:
        name = "softmax_compact_online_"
        yield Case(name, transform.name, setting, _compact_online, (transform,))
    yield Case("compact_matmul", "float32 += kept entries", setting, _matmul)
    yield Case("compact_pack", "in order, and out of room", setting, _pack)
    yield Case("compact_weight_gradient", "some columns of a tile", setting, _weight_gradient)
    for variant in VARIANTS:
        yield Case("sparse_linear_logps", variant.name, setting, _linear_logps, (variant,))


def _in_slots(setting: Setting) -> bool:
    """Whether kept entries are a GPU's slots there: columns of 64 rows, in bfloat16."""
    return has_slots(setting.device, setting.dtype)


def _compacted(setting: Setting, transform: Transform, *, in_slots: bool) -> Compacted:
    generator = setting.generator()
    logits = setting.put(3.0 * torch.randn(ROWS, COLUMNS, generator=generator))
    if in_slots:
        logits = tile_with_room(logits)
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
    with setting.all_threads():
        kept = softmax_compact(
            logits, None if bias is None else bias.to(setting.device), labels.to(setting.device),
            FIRST_COLUMN, level.to(setting.device), total.to(setting.device), EPS, *options,
            groups.to(setting.device), tail, None if in_slots else ROWS * COLUMNS,
        )  # fmt: skip
        entries = torch.zeros(ROWS, COLUMNS, device=setting.device)
        compact_matmul(entries, kept, torch.eye(COLUMNS, device=setting.device))
    return Compacted(kept, exact(entries), E, total.double(), groups, tail, rounded, in_slots)


def _compact(setting: Setting, transform: Transform) -> Iterator[Figure]:
    tile = _compacted(setting, transform, in_slots=_in_slots(setting))
    kept, entries = tile.kept, tile.entries
    live, share = entries != 0, tile.E / tile.total[:, None]
    counted = _shared_columns(live) if tile.in_slots else live
    # Rounding decides about an entry this close to eps.
    lost = ~live & (share > EPS * (1 + (64 + tile.rounded) * EPS32))
    yield Figure("entries over eps that are dropped", float(lost.sum()), 0.0)
    yield Figure(
        "kept entries not counted", float((exact(kept[2]) - counted.sum()).abs().sum()), 0.0
    )
    yield _kept_entries(setting, tile)
    yield rounded_once("sum of the kept", kept[0], entries.sum(1))
    if transform.softcap is not None:
        yield rounded_once("sum of all", kept[1], tile.E.sum(1), tile.rounded)
    dropped = torch.where(live, 0.0, share)
    truth = torch.stack([dropped[tile.groups == group].sum(0) for group in (0, 1)])
    yield rounded_once("tail", tile.tail, truth, tile.rounded + 16)


def _compact_online(setting: Setting, transform: Transform) -> Iterator[Figure]:
    """One tile at a look: its list, what is summed instead, and the tile with too many entries."""
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
    share = e * slope / e.sum(1)[:, None]
    for capacity in (COLUMNS, 0):
        row_max = torch.full((ROWS,), torch.finfo(torch.float32).min, device=setting.device)
        sum_exp, tail = torch.zeros_like(row_max), torch.zeros(2, COLUMNS, device=setting.device)
        with setting.all_threads():
            _, offsets, columns, values, dropped = softmax_compact_online_(
                logits.clone(), None if bias is None else bias.to(setting.device),
                labels.to(setting.device), FIRST_COLUMN, row_max, sum_exp, None, None, None, EPS,
                torch.inf, ROWS, *options, groups.to(setting.device), tail, capacity,
            )  # fmt: skip
        yield rounded_once("max", row_max, level)
        yield Figure("sum", largest(exact(sum_exp) / e.sum(1) - 1.0), setting.eps / 8 + 64 * EPS32)
        if capacity == 0:
            refused = not tail.any() and dropped.numel() == columns.numel() == 0
            yield Figure("over the capacity, and not refused", float(not refused), 0.0)
            continue
        rows = torch.arange(ROWS).repeat_interleave(offsets.cpu().diff())
        entries = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
        entries[rows, columns.cpu().long()] = exact(values)
        live = entries != 0
        # Rounding decides about an entry this close to eps.
        sure = (share / EPS - 1).abs() > 2 * setting.eps
        wrong = (live != (share > EPS)) & sure
        yield Figure("entries chosen wrongly", float(wrong.sum()), 0.0)
        rest = torch.where(live, 0.0, share)
        truth = torch.stack([rest[groups == group].sum(0) for group in (0, 1)])
        limit = setting.eps + (64 + rounded) * EPS32
        yield Figure("values", largest((entries / (e * slope) - 1.0)[live]), limit)
        yield Figure("tail", largest(exact(tail) - truth) / largest(truth), limit)
        error = exact(dropped) - rest.sum(1) * e.sum(1)
        yield Figure("dropped", largest(error) / largest(e.sum(1)), limit)


def _kept_entries(setting: Setting, tile: Compacted) -> Figure:
    error = (tile.entries / tile.E - 1.0)[tile.entries != 0]
    step = max(setting.eps, KEPT_ROUNDING) if tile.in_slots else setting.eps
    return Figure("kept entries", largest(error), step + (64 + tile.rounded) * EPS32)


def _shared_columns(mask: Tensor) -> Tensor:
    """Of (R, C): where one of 64 rows in sequence has the column."""
    blocks = torch.split(mask, COMPACT_ROWS)
    return torch.cat([rows.any(0, keepdim=True).expand_as(rows) for rows in blocks])


def _matmul(setting: Setting) -> Iterator[Figure]:
    generator = setting.generator()
    tile = _compacted(setting, TRANSFORMS[0], in_slots=_in_slots(setting))
    weight = torch.randn(COLUMNS, WIDTH, generator=generator)
    # The product of slots rounds a float32 head to their dtype.
    weight = setting.put(weight.bfloat16() if tile.in_slots else weight)
    before = torch.randn(ROWS, WIDTH, generator=generator)
    sums = before.to(setting.device, copy=True)
    with setting.all_threads():
        compact_matmul(sums, tile.kept, weight)
    yield _kept_entries(setting, tile)
    yield rounded_once("sums", sums, before.double() + tile.entries @ exact(weight))


def _pack(setting: Setting) -> Iterator[Figure]:
    kept = _compacted(setting, TRANSFORMS[0], in_slots=False).kept
    store, table = _store(setting)
    compact_pack(kept, store, table, 0)
    compact_pack([], store, table, 1)
    compact_pack(kept, store, table, 2)
    first, size = (int(each) for each in table[2])
    compact_pack(kept, store[: first + size + 8], table, 3)
    found = table.tolist()
    yield Figure("packed over another", float(found[2][0] < found[0][0] + found[0][1]), 0.0)
    yield Figure("refused with room", float(found[0][1] <= 0) + float(size <= 0), 0.0)
    yield Figure("empty, and not refused", float(found[1][1] >= 0), 0.0)
    yield Figure("without room, and not refused", float(found[3][1] >= 0), 0.0)


def _store(setting: Setting) -> tuple[Tensor, Tensor]:
    """Room for three tiles and more in any form, and a table of four."""
    store = torch.empty(64 * ROWS * COLUMNS, dtype=torch.uint8, device=setting.device)
    return store, torch.zeros(4, 2, dtype=torch.int64, device=setting.device)


def _weight_gradient(setting: Setting) -> Iterator[Figure]:
    """From the second packed tile, which does not begin at the start of the store."""
    generator = setting.generator()
    hidden = setting.put(torch.randn(ROWS, WIDTH, generator=generator))
    coefficients = torch.randn(ROWS, generator=generator)
    store, table = _store(setting)
    tiles = [_compacted(setting, each, in_slots=False) for each in TRANSFORMS[:2]]
    for item, tile in enumerate(tiles):
        compact_pack(tile.kept, store, table, item)
    before = torch.randn(300, WIDTH, generator=generator)
    block = before.to(setting.device, copy=True)
    with setting.all_threads():
        compact_weight_gradient(
            block, store, table, 1, 50, coefficients.to(setting.device), hidden
        )  # fmt: skip
    scaled = coefficients.double()[:, None] * exact(hidden)
    truth = before.double() - tiles[1].entries[:, 50:350].t() @ scaled
    yield rounded_once("block", block, truth, 16)


def _linear_logps(setting: Setting, variant: logps.Variant) -> Iterator[Figure]:
    """Against its definition; what torch rounds is measured at the exact gradient."""
    here = logps.problem(setting, variant)
    true, eager = here.true(), here.evaluate(logps.materialised)
    groups = torch.randint(0, 2, (logps.ROWS,), generator=setting.generator())
    density_guard.forget()  # of a head that lay in the same memory
    found = here.evaluate(logps.ours, gradient="sparse", eps=EPS, tail_groups=groups)
    truth, in_slots = true.evaluate(logps.definition), _in_slots(setting)
    changed = truth | _definition(true, groups, in_slots=in_slots)
    for what, actual in found.items():
        rounded = changed[what] + (exact(eager[what]) - truth[what])
        dtype = torch.bfloat16 if in_slots else setting.dtype
        yield like_torch(what, actual, changed[what], rounded, dtype)


def _definition(true: logps.Problem, groups: Tensor, *, in_slots: bool) -> dict[str, Tensor]:
    """Its gradients, by entry; or of slots, in columns that one of 64 scored rows has over eps.

    In the gradient of the head, of slots, only a row that has one over eps in 64 columns keeps any.
    """
    leaves = {name: leaf.detach() for name, leaf in true.leaves.items()}
    ranks = [name for name in ("hidden", "hidden_r") if name in leaves]
    hidden = torch.cat([leaves[name] for name in ranks], 1)
    weight = torch.cat([leaves[name.replace("hidden", "weight")] for name in ranks], 1)

    def gradients(block: int, head_mask: Tensor | None = None) -> reference.SparseGradients:
        return reference.sparse_gradients(
            hidden, weight, true.labels, true.coefficients, leaves.get("bias"), eps=EPS,
            groups=groups, block=block, head_mask=head_mask, **true.options,
        )  # fmt: skip

    found = gradients(1)
    if in_slots:
        over = found.softmax.mask
        live = torch.nn.functional.pad(over, (0, -over.shape[1] % SEGMENT_COLUMNS))
        live = live.view(len(over), -1, SEGMENT_COLUMNS).any(2)
        live = live.repeat_interleave(SEGMENT_COLUMNS, 1)[:, : over.shape[1]]
        found = gradients(COMPACT_ROWS, _shared_columns(over) & live)
    widths = [leaves[name].shape[1] for name in ranks]
    named = {"dbias": found.dbias}
    parts = (torch.split(each, widths, 1) for each in (found.dhidden, found.dweight))
    for name, of_rows, of_head in zip(ranks, *parts, strict=True):
        named[f"d{name}"], named[f"d{name.replace('hidden', 'weight')}"] = of_rows, of_head
    return named
