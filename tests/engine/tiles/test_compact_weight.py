"""Kept entries between forward and backward: packed in order, and multiplied into dW."""

import pytest
import torch

from orpo_kernels.engine import tiles
from orpo_kernels.engine.tiles.collect import Entries
from orpo_kernels.engine.tiles.compact import pack_entries
from tests.csrc.forms import FORMS, needs_extension

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def kept_of(shape, dtype, eps):
    """What one look at a random tile lists."""
    logits = (torch.randn(shape, dtype=torch.float64) * 4).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    row_max = torch.full(shape[:1], torch.finfo(wide).min, dtype=wide)
    tail = torch.zeros(1, shape[1], dtype=wide)
    nothing = torch.full((1, shape[0]), -1)
    _, *entries, _ = tiles.softmax_compact_online_(
        logits, None, nothing, 0, row_max, torch.zeros_like(row_max), None, None, None, eps,
        torch.inf, 256, 1.0, None, torch.zeros(shape[0], dtype=torch.int64), tail, shape[1],
    )  # fmt: skip
    return Entries(*entries)


def dense(kept, shape):
    """The kept entries as a matrix."""
    found = torch.zeros(shape, dtype=torch.float64)
    rows = torch.arange(shape[0]).repeat_interleave(kept.offsets.diff())
    found[rows, kept.columns.long()] = kept.values.double()
    return found


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_entries_come_back_as_a_weight_gradient(dtype, form):
    shape = (40, 300)
    store = torch.empty(200_000, dtype=torch.uint8)
    table = torch.zeros(4, 2, dtype=torch.int64)
    tiles_kept = [kept_of(shape, dtype, eps=2.0**-6) for _ in range(3)]
    pack_entries(tiles_kept[0], store, table, 0)
    pack_entries(None, store, table, 1)  # a tile done the exact way
    pack_entries(tiles_kept[1], store, table, 2)
    pack_entries(tiles_kept[2], store[: int(table[2].sum()) + 8], table, 3)  # no room
    assert table[1, 1] < 0
    assert table[3, 1] < 0
    wide = tiles_kept[0].values.dtype
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
    kept = kept_of((40, 300), torch.float32, eps=2.0**-6)
    store, table = torch.empty(200_000, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int64)
    pack_entries(kept, store, table, 0)
    pack_entries(None, store, table, 1)
    rest = (torch.ones(40), torch.ones(40, 8))
    for item, arguments in ((1, (store, table)), (2, (store, table)), (0, (store[:64], table))):
        with pytest.raises(RuntimeError, match=r"not in the store|have row 2"):
            tiles.compact_weight_gradient(torch.zeros(300, 8), *arguments, item, 0, *rest)
    with pytest.raises(RuntimeError, match="go together"):
        tiles.compact_weight_gradient(
            torch.zeros(300, 8), store, table, 0, 0, *rest, torch.ones(1, 300)
        )
    for tail in (torch.ones(1, 299), torch.ones(3, 300)):
        rows = torch.ones(tail.shape[0], 8)
        with pytest.raises(RuntimeError, match=r"tail must be .*, G = 1 or 2"):
            tiles.compact_weight_gradient(
                torch.zeros(300, 8), store, table, 0, 0, *rest, tail, rows
            )


@needs_extension
def test_the_number_of_threads_does_not_matter():
    kept = kept_of((200, 3000), torch.float32, eps=2.0**-9)
    store, table = torch.empty(2**21, dtype=torch.uint8), torch.zeros(1, 2, dtype=torch.int64)
    pack_entries(kept, store, table, 0)
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
