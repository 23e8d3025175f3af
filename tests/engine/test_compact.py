"""Tile operations of the sparse gradient against their formulae in float64."""

import pytest
import torch

from orpo_kernels import reference
from orpo_kernels.engine import compact, tiles
from tests.helpers import peak_bytes

OPTIONS = [(1.0, None), (0.3, None), (1.7, 5.0)]
# One row; one column; a width no vector divides; more rows than a strip holds.
SHAPES = [(1, 7), (5, 1), (3, 1003), (40, 9000)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
EPS = [0.0, 2.0**-10, 1.0]


def problem(shape, dtype, first_column=11, sets=1):
    logits = (torch.randn(shape, dtype=torch.float64) * 4).to(dtype)
    bias = torch.randn(shape[1]).to(dtype)
    labels = torch.randint(0, first_column + 2 * shape[1], (sets, shape[0]))
    labels[0, 0] = first_column
    labels[-1, -1] = -1
    return logits, bias, labels


def run(shape, dtype, scale=1.0, softcap=None, eps=2.0**-10, sets=1, capacity=None):
    """The operation on a tile; its inputs; and E in float64."""
    logits, bias, labels = problem(shape, dtype, sets=sets)
    row_max, sum_exp, _ = tiles.softmax_stats(logits, bias, labels, 11, scale, softcap)
    groups = torch.randint(0, 2, (shape[0],))
    groups[-1] = -1  # of none: its row is not in the tail
    tail = torch.ones(2, shape[1], dtype=row_max.dtype)
    before, total = logits.clone(), sum_exp + 0.5
    kept = compact.softmax_compact(
        logits, bias, labels, 11, row_max, total, eps, scale, softcap, groups, tail,
        shape[0] * shape[1] if capacity is None else capacity,
    )  # fmt: skip
    z, slope = reference.tile_logits(before.double(), bias.double(), labels, 11, scale, softcap)
    E = reference.softmax_grad(z, slope, row_max.double())
    return kept, (E, total.double(), groups, tail, logits, before)


def dense(kept, shape):
    """The kept entries as a matrix, from a product with the identity."""
    found = torch.zeros(shape, dtype=kept[0].dtype)
    compact.compact_matmul(found, kept, torch.eye(shape[1], dtype=kept[0].dtype))
    return found.double()


@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize(("scale", "softcap"), OPTIONS)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kept_and_dropped_add_up(dtype, shape, scale, softcap, eps):
    kept, (E, total, groups, tail, _, _) = run(shape, dtype, scale, softcap, eps, sets=2)
    found, wide = dense(kept, shape), kept[0].dtype
    rounding = {"rtol": 2e-6 if wide == torch.float32 else 1e-13, "atol": 1e-12}
    live = found != 0
    threshold = eps * total[:, None]
    assert not (~live & (threshold * (1 + 1e-5) < E)).any()  # a superset
    torch.testing.assert_close(found, torch.where(live, E, 0.0), **rounding)
    torch.testing.assert_close(kept[0].double(), found.sum(1), **rounding)
    assert kept[2].item() == live.sum() or eps == 0.0
    if softcap is None:
        assert kept[1].numel() == 0
    else:
        torch.testing.assert_close(kept[1].double(), E.sum(1), **rounding)
    shares = torch.where(live, 0.0, E) / total[:, None]
    for group in range(2):
        expected = 1.0 + shares[groups == group].sum(0)
        torch.testing.assert_close(tail[group].double(), expected, rtol=1e-6, atol=0)


def test_rows_of_more_than_one_strip():
    kept, (E, total, *_) = run(SHAPES[3], torch.float32)
    found = dense(kept, SHAPES[3])
    threshold = 2.0**-10 * total[:, None]
    expected = torch.where(threshold < E, E, 0.0)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)


def test_over_capacity_nothing_happens():
    kept, (_, _, _, tail, logits, before) = run((30, 500), torch.float32, capacity=20)
    assert kept == []
    assert bool((tail == 1).all())
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matmul_adds(dtype):
    shape = (40, 300)
    kept, _ = run(shape, dtype, eps=2.0**-6)
    # Wide enough that one strip of gathered rows does not hold all entries.
    weight = torch.randn(shape[1], 3000).to(dtype)
    found = torch.randn(shape[0], 3000, dtype=kept[0].dtype)
    expected = found.double() + dense(kept, shape) @ weight.double()
    compact.compact_matmul(found, kept, weight)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("scale", "softcap"), OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_refined_entries_are_those_of_logits_that_are_not_rounded(dtype, scale, softcap):
    # Several lists of gathered rows: H is wide, and some 800 to 3,000 entries are kept.
    R, C, H = 40, 300, 3000
    hidden, weight = torch.randn(R, H).to(dtype), (torch.randn(C, H) * 4 / H**0.5).to(dtype)
    raw = hidden.double() @ weight.double().t()
    logits, bias, labels = raw.to(dtype), torch.randn(C).to(dtype), torch.full((1, R), -1)
    row_max, sum_exp, _ = tiles.softmax_stats(logits, bias, labels, 0, scale, softcap)
    kept = compact.softmax_compact(
        logits, bias, labels, 0, row_max, sum_exp, 2.0**-9, scale, softcap,
        torch.zeros(R, dtype=torch.int64), torch.zeros(1, C), R * C,
    )  # fmt: skip
    live = dense(kept, (R, C)) != 0
    assert live.sum() > 500
    operands = (hidden, weight)
    added = compact.refine(kept, logits, bias, row_max, scale, softcap, *operands)
    options = (bias.double(), labels, 0, scale, softcap)
    z, slope = reference.tile_logits(raw, *options)
    true = reference.softmax_grad(z, slope, row_max.double())
    torch.testing.assert_close(
        dense(kept, (R, C)), torch.where(live, true, 0.0), rtol=5e-5, atol=1e-9
    )
    rounded, _ = reference.tile_logits(logits.double(), *options)
    level = row_max.double()[:, None]
    expected = torch.where(live, torch.exp(z - level) - torch.exp(rounded - level), 0.0).sum(1)
    torch.testing.assert_close(added.double(), expected, rtol=1e-4, atol=1e-5)
    assert expected.abs().amax() > 1e-3  # there was something to redo


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_entries_come_back_as_a_weight_gradient(dtype):
    shape = (40, 300)
    store = torch.empty(200_000, dtype=torch.uint8)
    table = torch.zeros(4, 2, dtype=torch.int64)
    tiles_kept = [run(shape, dtype, eps=2.0**-6)[0] for _ in range(3)]
    compact.compact_pack(tiles_kept[0], store, table, 0)
    compact.compact_pack([], store, table, 1)  # a tile done the exact way
    compact.compact_pack(tiles_kept[1], store, table, 2)
    compact.compact_pack(tiles_kept[2], store[: int(table[2].sum()) + 8], table, 3)  # no room
    assert table[1, 1] < 0
    assert table[3, 1] < 0
    wide = tiles_kept[0][0].dtype
    coefficients, hidden = torch.randn(shape[0], dtype=wide), torch.randn(shape[0], 24).to(dtype)
    for item, kept in ((0, tiles_kept[0]), (2, tiles_kept[1])):
        block = torch.randn(100, 24, dtype=wide)
        scaled = coefficients.double()[:, None] * hidden.double()
        expected = block.double() - dense(kept, shape)[:, 50:150].t() @ scaled
        compact.compact_weight_gradient(block, store, table, item, 50, coefficients, hidden)
        torch.testing.assert_close(block.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_row_without_a_total_keeps_and_drops_nothing():
    # V = 1 and a row that is not scored: no exponential is known, and 0 / 0 must not get anywhere.
    logits, labels = torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64)
    tail = torch.zeros(1, 1)
    kept = compact.softmax_compact(
        logits, None, labels, 0, torch.zeros(1), torch.zeros(1), 0.5, 1.0, None,
        torch.zeros(1, dtype=torch.int64), tail, 1,
    )  # fmt: skip
    assert not kept[0].any()
    assert not tail.any()


def test_scratch_is_bounded():
    # All live, the worst case: 300 x 20,000 entries would be 6 M; the capacity is 1/16 of that.
    logits, labels = torch.zeros(300, 20_000), torch.full((1, 300), -1)
    ones = torch.ones(300)
    capacity = logits.numel() // 16

    def step():
        return compact.softmax_compact(
            logits, None, labels, 0, ones, ones, 0.0, 1.0, None,
            torch.zeros(300, dtype=torch.int64), torch.zeros(1, 20_000), capacity,
        )  # fmt: skip

    assert step() == []
    assert peak_bytes(step) <= 8 * capacity + tiles.strip_bytes(logits.device) + 2**20
