"""Tile operations of the sparse gradient against their formulae in float64."""

import pytest
import torch

from orpo_kernels import reference
from orpo_kernels.engine import compact, tiles
from tests.csrc.forms import FORMS, needs_extension
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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_entries_come_back_as_a_weight_gradient(dtype, form):
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
        change = dense(kept, shape)[:, 50:150].t() @ scaled
        expected = block.double() - change
        entries = (store, table, item, 50, coefficients, hidden)
        form(tiles.compact_weight_gradient, block, *entries)
        torch.testing.assert_close(block.double(), expected, rtol=1e-5, atol=1e-5)
        # With a tail the block is written, in any dtype, whatever was in it; of a wider matrix.
        for groups, out_dtype in ((1, wide), (2, dtype)):
            tail = torch.randn(groups, 300, dtype=wide)[:, 50:150]
            tail_rows = torch.randn(groups, 25, dtype=wide)[:, 1:]
            out = torch.full((100, 30), torch.nan, dtype=out_dtype)
            form(tiles.compact_weight_gradient, out[:, 3:27], *entries, tail, tail_rows)
            expected = tail.double().t() @ tail_rows.double() - change
            eps = max(torch.finfo(out_dtype).eps, 1e-6)
            torch.testing.assert_close(out[:, 3:27].double(), expected, rtol=eps, atol=10 * eps)
            assert bool(out[:, 27:].isnan().all())


@needs_extension
def test_a_weight_gradient_is_of_what_is_in_the_store():
    kept, _ = run((40, 300), torch.float32, eps=2.0**-6)
    store, table = torch.empty(200_000, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int64)
    compact.compact_pack(kept, store, table, 0)
    compact.compact_pack([], store, table, 1)
    rest = (torch.ones(40), torch.ones(40, 8))
    for item, arguments in ((1, (store, table)), (2, (store, table)), (0, (store[:64], table))):
        with pytest.raises(RuntimeError, match=r"not in the store|have row 2"):
            tiles.compact_weight_gradient(torch.zeros(300, 8), *arguments, item, 0, *rest)
    with pytest.raises(RuntimeError, match="go together"):
        tiles.compact_weight_gradient(
            torch.zeros(300, 8), store, table, 0, 0, *rest, torch.ones(1, 300)
        )
    with pytest.raises(RuntimeError, match=r"tail must be \(G, C\)"):
        tiles.compact_weight_gradient(
            torch.zeros(300, 8), store, table, 0, 0, *rest, torch.ones(1, 299), torch.ones(1, 8)
        )


@needs_extension
def test_the_number_of_threads_does_not_matter():
    kept, _ = run((200, 3000), torch.float32, eps=2.0**-9)
    store, table = torch.empty(2**21, dtype=torch.uint8), torch.zeros(1, 2, dtype=torch.int64)
    compact.compact_pack(kept, store, table, 0)
    assert table[0, 1] > 0
    entries = (store, table, 0, 0, torch.randn(200), torch.randn(200, 64))
    tail = (torch.randn(2, 3000), torch.randn(2, 64))
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            block = torch.empty(3000, 64, dtype=torch.bfloat16)
            tiles.compact_weight_gradient(block, *entries, *tail)
            results.append(block)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


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
