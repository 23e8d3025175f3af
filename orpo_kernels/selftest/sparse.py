"""Checks of the sparse gradient: its tile operations, and the op against its definition."""

import importlib
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orpo_kernels import reference
from orpo_kernels.constants import COMPACT_ROWS
from orpo_kernels.engine.tiles import compact_weight_gradient, softmax_compact_online_
from orpo_kernels.engine.tiles.collect import Entries
from orpo_kernels.engine.tiles.compact import pack_entries
from orpo_kernels.kernels import has_slots
from orpo_kernels.kernels.slot_store import KEPT_ROUNDING, SlotStore
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
ROWS, COLUMNS, FIRST_COLUMN, WIDTH, SLOTS = 67, 520, 1000, 33, 150
ALIGNED = 72  # nine vectors, more than a step of the product
EPS = 2.0**-8

# Of a call 72 to 80 rows are scored: in two blocks of 64.
OF_A_CALL = 80

# Of peaked logits slots keep a sixth of the columns and drop 6 % of the mass; of the others they
# would keep half and drop a third, and row blocks are done the exact way.
EPS_OF_PEAKED = 2.0**-6

_VARIANTS = (
    (logps.Variant("trainable head, peaked", bias=True, peaked=True), EPS_OF_PEAKED),
    (logps.Variant("frozen head, flat", trains=(True, False)), EPS),
    (
        logps.Variant(
            "frozen head, peaked", trains=(True, False), peaked=True, vocabulary=logps.WHOLE
        ),
        EPS_OF_PEAKED,
    ),
    (
        logps.Variant("all of it", label_sets=2, softcap=4.0, logit_scale=0.7, bias=True, rank=4),
        EPS,
    ),
)
VARIANTS = tuple((variant._replace(rows=OF_A_CALL), eps) for variant, eps in _VARIANTS)


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
        yield Case("slot_gradient", "of kept slots and labels", setting, _slot_gradient)
        if setting.dtype.itemsize == 2:
            yield Case("slot_gradient", "slots made again", setting, _remade_slots)
    for transform in TRANSFORMS:
        name = "softmax_compact_online_"
        yield Case(name, transform.name, setting, _compact_online, (transform,))
    yield Case("pack_entries", "in order, and out of room", setting, _pack)
    yield Case("compact_weight_gradient", "some columns of a tile", setting, _weight_gradient)
    for variant, eps in VARIANTS:
        yield Case("sparse_token_logps", variant.name, setting, _linear_logps, (variant, eps))


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


def _slot_gradient(setting: Setting) -> Iterator[Figure]:
    """The gradient of a head from two row blocks of slots: kept, and to be left out."""
    generator = setting.generator()
    gradient = importlib.import_module("orpo_kernels.engine.sparse.slot_gradient")
    hidden = setting.put(torch.randn(ROWS, WIDTH, generator=generator))
    labels = torch.randint(0, COLUMNS, (ROWS,), generator=generator)
    labels[::7], labels[1::7] = -1, 3  # a token that comes often
    columns = torch.randint(0, COLUMNS, (SLOTS,), generator=generator, dtype=torch.int32)
    for each in (columns[: SLOTS - 9], columns[SLOTS - 9 :]):  # in order, of a row block
        each.copy_(each.sort().values)
    slots = torch.rand(SLOTS, COMPACT_ROWS, generator=generator).bfloat16()
    slots[SLOTS - 9 :, ROWS - COMPACT_ROWS :] = 0.0  # rows that are not there
    table = torch.tensor([[0, SLOTS - 9], [SLOTS - 9, 9]])
    figures = torch.rand(5, ROWS, generator=generator)
    mean, rest = (torch.rand(2, each, generator=generator) for each in (COLUMNS, WIDTH))
    store = SlotStore(*(each.to(setting.device) for each in (slots, columns, table)))
    out = torch.empty(COLUMNS, WIDTH, device=setting.device)
    on_device = (labels.to(setting.device), figures.to(setting.device), mean.to(setting.device))
    inputs = _inputs(hidden, on_device[0])
    lists = gradient.label_lists(on_device[0][None], COLUMNS)
    kept = gradient.Kept(store, on_device[1], None, on_device[2])
    parts = [gradient.Part(out, hidden, rest.to(setting.device))]
    # Two ranges: products of the first lie in the rows of the second.
    edges, count = [0, COLUMNS // 2, COLUMNS], torch.tensor(SLOTS, device=setting.device)
    order = gradient.order_entries(store.columns, count, lists, edges)
    ranges = gradient.ranges_of(edges, order.figures)
    counts = table[:, 1].tolist()
    room = 4 * SLOTS * (WIDTH + 7)
    has_room = gradient.from_slots(parts, inputs, kept, order, ranges, room, counts)
    yield Figure("without room for products", float(not has_room), 0.0)

    dense = torch.zeros(2, COMPACT_ROWS, COLUMNS, dtype=torch.float64)
    for block, (first, count) in enumerate(table.tolist()):
        here = slice(first, first + count)
        dense[block].index_add_(1, columns[here].long(), exact(slots[here]).t())
    matrix = -figures[1].double()[:, None] * dense.view(-1, COLUMNS)[:ROWS]
    scored = labels >= 0
    matrix[scored, labels[scored]] += figures[2].double()[scored]
    rows = exact(hidden)
    truth = matrix.t() @ rows - mean.double().t() @ rest.double()
    # Coefficients times slots are rounded to 16 bits, and hidden states where they are float32.
    rounding = setting.eps if setting.dtype == torch.float16 else 2 * KEPT_ROUNDING
    rounding *= 2 if setting.dtype == torch.float32 else 1
    size = matrix.abs().t() @ rows.abs()
    error = (exact(out) - truth).abs() - rounding * size - 64 * EPS32 * (size + truth.abs())
    yield Figure("gradient of the head", max(0.0, float(error.amax())), 0.0)


def _remade_slots(setting: Setting) -> Iterator[Figure]:
    """Slots of two row blocks, of which the store has the columns alone."""
    generator = setting.generator()
    kernel = importlib.import_module("orpo_kernels.kernels.remake_slots")
    hidden = setting.put(torch.randn(ROWS, ALIGNED, generator=generator) / ALIGNED**0.5)
    weight = setting.put(torch.randn(COLUMNS, ALIGNED, generator=generator))
    labels = torch.randint(-1, 9, (ROWS,), generator=generator)
    rest = (9 + torch.randperm(COLUMNS - 9, generator=generator)[: SLOTS - 9]).sort().values
    rest[1::9] = rest[::9][: len(rest[1::9])]  # of which there are two slots
    columns, counts = torch.cat((rest, torch.arange(9))), [SLOTS - 9, 9]  # labels in the second
    figures = torch.rand(5, ROWS, generator=generator)
    figures[0] = math.log(2.0) * torch.randint(-3, 4, (ROWS,), generator=generator)
    table = torch.tensor([[0, SLOTS - 9], [SLOTS - 9, 9]])
    store = SlotStore(None, columns.int().to(setting.device), table.to(setting.device))
    inputs = _inputs(hidden, labels.to(setting.device), (weight,))
    found = kernel.remake_slots(store, inputs, figures.to(setting.device), counts).slots

    u = torch.exp(exact(hidden) @ exact(weight).t() - figures[0].double()[:, None])
    scored = labels >= 0
    u[scored, labels[scored]] = 0.0
    truth = torch.zeros(2 * COMPACT_ROWS, COLUMNS, dtype=torch.float64)
    truth[:ROWS] = u
    block = torch.arange(2).repeat_interleave(torch.tensor(counts))
    truth = truth.view(2, COMPACT_ROWS, COLUMNS)[block, :, columns]
    size = truth.clamp(min=torch.finfo(torch.float32).tiny)
    again = columns.diff(prepend=torch.tensor([-1])) == 0
    values = exact(found)
    error = ((values - truth).abs() / size)[~again]
    yield Figure("slots", float(error.amax()), KEPT_ROUNDING)
    both = values[again.roll(-1)] + values[again]
    error = (both - truth[again]).abs() / size[again]
    yield Figure("two of a column", float(error.amax()), KEPT_ROUNDING**2 + 1024 * EPS32)


def _inputs(hidden: Tensor, labels: Tensor, weight: tuple[Tensor, ...] = ()) -> Any:
    """What the kernels are told of a call, but for its head."""
    kernel = importlib.import_module("orpo_kernels.kernels.inputs")
    given = ((hidden,), weight, None, labels, None, None, None, 1.0, None)
    return kernel.Inputs(*given, hidden.dtype, torch.float32)


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
    groups = torch.randint(0, 2, (variant.rows,), generator=setting.generator())
    found = here.evaluate(logps.ours, gradient="sparse", eps=eps, tail_groups=groups)
    truth = true.evaluate(logps.definition)
    in_slots = has_slots(setting.device, setting.dtype)
    changed = truth | _definition(true, groups, eps, in_slots=in_slots)
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
    true: logps.Problem, groups: Tensor, eps: float, *, in_slots: bool
) -> dict[str, Tensor]:
    """Its gradients, by entry; or of slots, in columns that one of 64 scored rows has over eps.

    Of slots, row blocks that would keep or drop too much are done the exact way; none where all
    are: the exact ones.
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

    found = gradients(COMPACT_ROWS if in_slots else 1)
    if in_slots:
        whole = _dense(found.softmax, true.options["logit_scale"])
        if whole.all():
            return {}
        if whole.any():
            found = gradients(COMPACT_ROWS, whole=whole)
    widths = [leaves[name].shape[1] for name in ranks]
    named = {"dbias": found.dbias}
    parts = (torch.split(each, widths, 1) for each in (found.dhidden, found.dweight))
    for name, of_rows, of_head in zip(ranks, *parts, strict=True):
        named[f"d{name}"], named[f"d{name.replace('hidden', 'weight')}"] = of_rows, of_head
    return named
