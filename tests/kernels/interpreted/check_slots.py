"""What a trainable head keeps of the sparse gradient, and dW from it, in the strict interpreter.

Programs run in a random order; no two of them may touch one byte. What is not written is NaN.
"""

import math
from typing import NamedTuple

import pytest
import torch

from orpo_kernels import reference
from orpo_kernels.engine.sparse import plan
from orpo_kernels.engine.sparse.slot_gradient import (
    Kept,
    Part,
    Scratch,
    from_slots,
    ranges_of,
)
from orpo_kernels.kernels.certificate import certificate
from orpo_kernels.kernels.given_back import given_back
from orpo_kernels.kernels.inputs import Inputs
from orpo_kernels.kernels.keep_slots import KeepSlots
from orpo_kernels.kernels.order_entries import Listed, label_lists, order_entries
from orpo_kernels.kernels.remake_slots import remake_slots
from orpo_kernels.kernels.scan_state import scan_state
from orpo_kernels.kernels.slot_store import COLUMN_BYTES, SLOT_BYTES, ScanShape, SlotStore

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(hidden, labels, second=None, positions=None, weight=()):
    """Of a call without a bias, a scale or a softcap."""
    given = ((hidden,), weight, None, labels, second, positions, None, 1.0, None)
    return Inputs(*given, hidden.dtype, torch.float32)


def state_of(slots, blocks, columns, listed):
    weight = (torch.zeros(columns, 8),)
    given = inputs(torch.zeros(64 * blocks, 8), torch.zeros(64 * blocks).long())
    shape = ScanShape(64 * blocks, columns, slots, listed, 1)
    given, logits = given._replace(weight=weight), torch.empty(64 * blocks, 8)
    return scan_state(given, logits, shape, None, torch.zeros(1, columns), 64)


def fill(state, counts, dense):
    """As a forward leaves it: so many slots of every row block, of some columns, anywhere."""
    state.slots.normal_()
    state.heads.zero_()
    order, first = torch.randperm(len(state.slots)), 0
    for block, count in enumerate(counts):
        columns = torch.randperm(state.tail.shape[1])[:count]
        state.columns[block, :count] = columns.sort().values.int()
        state.addresses[block, :count] = 8 * order[first : first + count].int()
        state.ends[1, block] = count
        state.heads[0 if block % 2 else 3, block] = dense[block]  # now, or before
        first += count


def store_of(capacity, blocks, remade=False):
    size = COLUMN_BYTES if remade else SLOT_BYTES
    buffer = torch.empty(capacity * size, dtype=torch.uint8).fill_(255)
    return SlotStore.of(buffer, torch.full((blocks, 2), -1), remade=remade)


@pytest.mark.parametrize("remade", [False, True], ids=["slots", "columns alone"])
@pytest.mark.parametrize(
    ("capacity", "kept"),
    [
        pytest.param(400, [0, 1, 3, 4, 5], id="room for all but the dense one"),
        pytest.param(190, [0, 1, 3], id="the second chunk does not fit"),
        pytest.param(130, [0, 1], id="nor does the end of the first: none after it"),
    ],
)
def test_what_is_kept(capacity, kept, remade):
    # Two chunks of three row blocks: more slots than a program copies at once, none, a dense one.
    counts, dense = ([130, 0, 50], [40, 60, 1]), ([0, 0, 1], [0, 0, 0])
    store, state, first = store_of(capacity, 6, remade), state_of(200, 3, 300, 140), 0
    keep = KeepSlots(state, store, 1)
    for index in range(2):
        fill(state, counts[index], dense[index])
        keep(192 * index, 192 * index + 150, index)  # the last row block is ragged
        for block in range(3):
            table, count = store.table[3 * index + block].tolist(), counts[index][block]
            if 3 * index + block not in kept:
                assert table == [-1, -1]
                continue
            assert table == [first, count]
            mine, here = slice(first, first + count), state.addresses[block, :count].long() // 8
            assert torch.equal(store.columns[mine], state.columns[block, :count])
            assert remade or torch.equal(store.slots[mine], state.slots[here])
            first += count
    assert (store.columns[first:] == -1).all()


class Given(NamedTuple):
    """Slots of a few row blocks, and what dW of them is in float64, with its terms' size."""

    inputs: Inputs
    hidden: torch.Tensor
    kept: Kept
    lists: Listed
    counts: list[int]
    rest: torch.Tensor
    true: torch.Tensor
    size: torch.Tensor

    def order(self, edges):
        """Lists of slots, and the ranges of the vocabulary."""
        count = torch.tensor(sum(self.counts))
        order = order_entries(self.kept.store.columns, count, self.lists, edges)
        return order, ranges_of(edges, order.figures)

    def gradient(self, out, edges, room):
        """Fills `out`; whether it had room."""
        order, ranges = self.order(edges)
        part = Part(out, self.hidden, self.rest)
        return from_slots([part], self.inputs, self.kept, order, ranges, room, self.counts)

    def check(self, out, dtype):
        """Two operands rounded, the interpreter truncates; the result rounded once."""
        step = torch.finfo(torch.float16 if dtype == torch.float16 else torch.bfloat16).eps
        limit = 2 * step * self.size + 1e-5 * self.size
        limit += torch.finfo(out.dtype).eps * self.true.abs()
        assert ((out.double() - self.true).abs() <= limit + 1e-6).all()


def given_slots(dtype, rows, V, H, counts):
    """Where the store has room for 30 more, of which nothing is known."""
    N, blocks = rows + 9, -(-rows // 64)
    everything = torch.randn(2, N, H + H % 2).to(dtype)[:, :, :H]  # rows at two strides
    positions = torch.randperm(2 * N)[:rows]
    labels, second = (torch.randint(-1, V, (rows,)) for _ in range(2))
    labels[::3] = 5  # a token that comes often
    store = store_of(sum(counts) + 30, blocks)
    store.slots.copy_(torch.rand(store.slots.shape))
    matrix, first = torch.zeros(blocks * 64, V, dtype=torch.float64), 0
    for block, count in enumerate(counts):
        store.table[block] = torch.tensor([first, count])
        mine = slice(first, first + count)
        store.columns[mine] = torch.randint(0, V, (count,)).sort().values.int()
        matrix[64 * block : 64 * block + 64].index_add_(
            1, store.columns[mine].long(), store.slots[mine].double().t()
        )
        first += count
    figures, unit = torch.rand(5, rows) + 0.5, torch.tensor([0.25])
    mean, rest = torch.rand(2, V), torch.randn(2, H)
    matrix = -figures[1].double()[:, None] * matrix[:rows]
    for of_set, share in ((labels, figures[2]), (second, figures[3])):
        some = of_set >= 0
        matrix[some, of_set[some]] += share[some].double()
    hidden = everything.reshape(2 * N, H)[positions].double()
    tail = mean.double().t() @ rest.double()
    true, size = matrix.t() @ hidden - tail, matrix.abs().t() @ hidden.abs() + tail.abs()
    lists = label_lists(torch.stack((labels, second)), V)
    kept = Kept(store, figures, unit if dtype == torch.float16 else None, mean)
    given = inputs(everything, labels, second, positions)
    return Given(given, everything, kept, lists, counts, rest, true, size)


# Rows, columns, H, columns of a panel.
SHAPES = [
    pytest.param(64, 40, 32, 32, id="one row block, one panel"),
    pytest.param(150, 300, 200, 128, id="ragged rows, two panels"),
    pytest.param(70, 130, 33, 40, id="H that no vector divides"),
]


@pytest.mark.parametrize(("rows", "V", "H", "panel"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_slots(dtype, rows, V, H, panel):
    given = given_slots(dtype, rows, V, H, [90, 0, 17][: -(-rows // 64)])
    for out_dtype in {dtype, torch.float32}:
        out = torch.full((V, H), torch.nan, dtype=out_dtype)
        assert given.gradient(out, [0, V], 4 * sum(given.counts) * panel)
        given.check(out, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_lie_in_what_is_not_written_yet(dtype, monkeypatch):
    # Three row blocks in four ranges: products of the last one alone take the budget's memory.
    rows, V, H, edges = 150, 400, 64, [0, 200, 300, 350, 400]
    given = given_slots(dtype, rows, V, H, [160, 70, 90])
    _, ranges = given.order(edges)
    slots, room = [each.slots for each in ranges], 4 * 64 * ranges[-1].slots
    assert room < 4 * 64 * max(slots)
    seen, products = [], Scratch.products

    def noted(self, part, each, width):
        found = products(self, part, each, width)
        seen.append((width, found.data_ptr() - part.target.data_ptr()))
        assert self.own.nbytes <= self.room
        return found

    monkeypatch.setattr(Scratch, "products", noted)
    out, whole = (torch.full((V, H), torch.nan, dtype=torch.float32) for _ in range(2))
    assert given.gradient(out, edges, room)
    given.check(out, dtype)
    for (width, place), each in zip(seen[:3], ranges, strict=False):
        assert width == 64
        assert each.last * H * 4 <= place <= V * H * 4 - 256 * each.slots
    # No bit of it depends on ranges, panels and memory.
    assert given.gradient(whole, [0, V], 2**20)
    assert torch.equal(out, whole)
    # A matrix with gaps lends nothing.
    apart = torch.full((V, 2 * H), torch.nan, dtype=torch.float32)[:, :H]
    assert not given.gradient(apart, edges, room)
    assert apart.isnan().all()
    assert given.gradient(apart, edges, 4 * 64 * max(slots))
    assert torch.equal(apart, whole)


def test_what_lends_its_memory_comes_last():
    # A bias and a low-rank part have the whole of dW; without it the budget's memory, or none.
    given = given_slots(torch.bfloat16, 150, 400, 64, [160, 70, 90])
    order, ranges = given.order([0, 400])
    narrow = given.hidden[..., :8]
    of_bias = torch.ones(1, 1).bfloat16().expand(given.hidden[..., 0].numel(), 1)
    parts = [
        Part(torch.full((400, 64), torch.nan), given.hidden, given.rest),
        Part(torch.full((400, 8), torch.nan), narrow, given.rest[:, :8].contiguous()),
        Part(torch.full((400, 1), torch.nan), of_bias, given.rest[:, :1].contiguous()),
    ]
    arguments = (given.inputs, given.kept, order, ranges)
    assert from_slots(parts, *arguments, 4 * 64 * 320, given.counts)
    given.check(parts[0].target, torch.bfloat16)
    found = [part.target.clone() for part in parts]
    torch.testing.assert_close(found[1], found[0][:, :8], rtol=1e-5, atol=1e-5)
    assert from_slots(parts[1:], *arguments, 4 * 8 * 320, given.counts)
    assert all(torch.equal(part.target, each) for part, each in zip(parts, found, strict=True))
    assert not from_slots(parts[1:], *arguments, 4 * 8 * 320 - 1, given.counts)


@pytest.mark.parametrize("everything", [False, True], ids=["plain", "all options"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_slots_are_made_again(dtype, everything):
    # As `pack_slots` defines them: labels 0, E to a reference that is a power of two. H and r of
    # one vector and a half; a float32 head, and 16-bit logits, among the options.
    rows, V, H, r, counts = 150, 300, 60, 12, [140, 0, 17]
    head = torch.float32 if everything else dtype
    positions, N = torch.randperm(200)[:rows], 200
    widths = [H, r] if everything else [H]
    hidden = tuple(torch.randn(2, N // 2, each).to(dtype) for each in widths)
    weight = tuple((torch.randn(V, each) / each**0.5).to(head) for each in widths)
    bias = torch.randn(V) if everything else None
    labels, second = (torch.randint(-1, V, (rows,)) for _ in range(2))
    scale, softcap = (-0.7, 4.0) if everything else (1.3, None)
    wide = torch.float16 if everything and dtype == torch.float16 else torch.float32
    given = Inputs(
        hidden, weight, bias, labels, second if everything else None, positions, None, scale,
        softcap, dtype, wide,
    )  # fmt: skip
    store, first = store_of(sum(counts) + 5, 3, remade=True), 0
    for block, count in enumerate(counts):
        store.table[block] = torch.tensor([first, count])
        # Of three columns there are two slots.
        columns = torch.randperm(V)[:count]
        columns[: min(3, count // 2)] = columns[-min(3, count // 2) :]
        store.columns[first : first + count] = columns.sort().values.int()
        first += count
    labels[0] = store.columns[0]
    power = torch.randint(-3, 6, (rows,))
    figures = torch.rand(5, rows)
    figures[0] = power * math.log(2.0)

    found = remake_slots(store, given, figures, counts)
    assert found.slots.shape == (sum(counts), 64)
    x = sum(h.flatten(0, 1)[positions].double() @ w.to(dtype).double().t()
            for h, w in zip(hidden, weight, strict=True))  # fmt: skip
    raw = x.to(wide).double()
    sets = torch.stack((labels, second)) if everything else labels[None]
    z, slope = reference.transform(raw if bias is None else raw + bias, scale, softcap)
    u = torch.exp(z - figures[0].double()[:, None]) * slope
    for each in sets:
        u[each >= 0, each[each >= 0]] = 0.0
    first = 0
    for block, count in enumerate(counts):
        here = slice(64 * block, min(64 * block + 64, rows))
        mine = slice(first, first + count)
        true = u[here][:, store.columns[mine].long()].t()
        again = store.columns[mine].diff(prepend=torch.tensor([-1])) == 0
        assert again.sum() == min(3, count // 2)
        product, step = (4e-3 if wide == torch.float16 else 1e-4), torch.finfo(torch.bfloat16).eps
        lanes, slots = true.shape[1], found.slots[mine].double()
        error = (slots[:, :lanes] - true).abs()
        assert (error <= (product + step / 2) * true.abs())[~again].all()
        both = (slots[again.roll(-1)] + slots[again])[:, :lanes]
        assert ((both - true[again]).abs() <= (product + step**2) * true[again].abs()).all()
        assert (slots[:, lanes:] == 0).all()
        first += count
    assert found.slots[0, 0] == 0


def test_sums_come_in_the_order_of_rows_and_the_heavy_columns_first():
    columns = torch.tensor([7, 2, 7, 0, 7, 9, -5], dtype=torch.int32)  # the last two are not there
    labels = torch.tensor([[2, -1, 9], [7, 2, -1]])
    order = order_entries(columns, torch.tensor(5), label_lists(labels, 10), [0, 10])
    assert order.places.tolist()[:5] == [2, 1, 3, 0, 4]
    assert order.ends.tolist() == [0, 1, 1, 2, 2, 2, 2, 2, 5, 5, 5]
    assert order.targets[order.label_ends[0] :].tolist() == [0, 4, 3, 2]
    assert order.columns[:2].tolist() == [7, 2]
    assert order.columns.sort().values.tolist() == list(range(10))
    assert order.figures.tolist() == [5, 0]


def test_ranges_have_their_own_columns_and_split_the_heavy_ones():
    columns = torch.tensor([7] * 20 + [2] * 17 + [8] * 16, dtype=torch.int32)
    labels = label_lists(torch.tensor([[8, 1, 1]]), 10)
    edges = [0, 3, 8, 10]
    order = order_entries(columns, torch.tensor(53), labels, edges)
    assert order.columns.tolist() == [2, 1, 0, 7, 3, 4, 5, 6, 8, 9]
    assert order.places.tolist() == [*range(17, 37), *range(17), *range(37, 53)]
    # Seventeen entries are too many for a lane: of 8, with a label, too.
    assert ranges_of(edges, order.figures) == [
        (0, 3, 1, 0, 17), (3, 8, 4, 17, 37), (8, 10, 9, 37, 53),
    ]  # fmt: skip


@pytest.mark.parametrize("groups", [1, 2])
def test_what_is_given_back(groups):
    # Rows of no group, and a row that is nothing but its label.
    rows, H, N = 150, 40, 200
    hidden, positions = torch.randn(N, H).bfloat16(), torch.randperm(N)[:rows]
    statistics, figures = torch.rand(8, N), torch.rand(5, rows)
    statistics[1:3, positions[3]] = 0.0
    group = torch.randint(-1, groups, (rows,))
    given = inputs(hidden, torch.zeros(rows).long(), positions=positions)
    found = given_back(hidden, given, statistics, figures, group, groups)
    of_rows = statistics[:, positions].double()
    mass = figures[1].double() * (of_rows[2] / of_rows[1]).nan_to_num(0.0) * of_rows[7]
    for index in range(groups):
        weights = torch.where(group == index, mass, 0.0)
        true = weights @ hidden[positions].double()
        scale = float(weights.abs() @ hidden[positions].double().abs().amax(1))
        torch.testing.assert_close(found[index].double(), true, rtol=0, atol=1e-6 * scale)


def test_panels_fit():
    # Few slots take the widest panel, more of them even ones of whole vectors, or none.
    for columns, count, room, expected in (
        (4096, 1000, 2**30, 4096), (4096, 500_000, 2**30, 512), (4096, 190_000, 2**28, 320),
        (4096, 200_000, 2**29, 640), (4096, 2**20, 2**28, 64), (4096, 2**20 + 1, 2**28, 0),
        (33, 100, 16_000, 40), (33, 100, 15_999, 0), (1, 100, 3200, 8), (100, 100, 40_000, 64),
    ):  # fmt: skip
        assert plan.panel_columns(columns, count, room) == expected


@pytest.mark.parametrize("rounding", [0.0, 2.0**-8])
def test_the_certificate(rounding):
    # Three blocks of rows, the last one ragged; a tenth is not scored and holds what means nothing.
    N, vocabulary, scale, eps = 2500, 1000, 0.7, 2.0**-12
    labels = torch.randint(0, vocabulary, (N,))
    statistics = torch.rand(8, N)
    unscored = torch.rand(N) < 0.1
    labels[unscored] = -1
    statistics[:, unscored] = float("nan")
    entries = torch.randint(0, 64 * vocabulary, (40,))
    rho = rounding / (1 - rounding)

    fields = certificate(labels, statistics, entries, vocabulary, (scale, eps, rho))
    beside, dropped = statistics[2].double()[~unscored], statistics[7].double()[~unscored]
    mass = dropped * beside / scale  # of statistics that have the scale in them, a probability
    residual = (eps * (mass + rho * (beside - mass).clamp(min=0))).sqrt()
    share = entries.sum().double() / vocabulary / len(mass)
    expected = torch.stack([share, mass.mean(), mass.amax(), residual.mean(), residual.amax()])
    torch.testing.assert_close(fields, expected.float(), rtol=1e-6, atol=0)

    statistics[7, 0], labels[0] = float("nan"), 1  # a scored row that went wrong is not hidden
    fields = certificate(labels, statistics, entries, vocabulary, (scale, eps, rho))
    assert fields[1:].isnan().all()
