"""NaN and infinite logits, and the same bits whatever the number of threads."""

import pytest
import torch

from orpo_kernels.engine import tiles
from tests.csrc.forms import needs_extension, no_labels, plain

pytestmark = needs_extension

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INF, NAN = torch.inf, torch.nan
ROWS = [
    ("nan", [NAN]),
    ("inf", [INF]),
    ("-inf", [-INF]),
    ("inf and nan", [INF, NAN]),
    ("inf and -inf", [INF, -INF]),
]


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [row[1] for row in ROWS], ids=[row[0] for row in ROWS])
def test_special_logits_as_in_torch(special, dtype, softcap):
    # 2,049 + 1 columns: the special ones stand in the first chunk, the second, and both.
    tile = torch.randn(4, 2050).to(dtype)
    tile[0, 5 : 5 + len(special)] = torch.tensor(special, dtype=dtype)
    tile[1, -len(special) :] = torch.tensor(special, dtype=dtype)
    tile[2] = special[0]
    args = (None, no_labels(4), 0)
    found = tiles.softmax_stats(tile, *args, 1.0, softcap, with_logit_sum=True)
    torch_form = plain(tiles.softmax_stats, tile, *args, 1.0, softcap, True)
    for each, other, atol in zip(found, torch_form, (1e-6, 1e-6, 1e-3), strict=True):
        torch.testing.assert_close(each, other, rtol=1e-5, atol=atol, equal_nan=True)
    ours, theirs = tile.clone(), tile.clone()
    tiles.softmax_grad_(ours, *args, found[0], 1.0, softcap)
    plain(tiles.softmax_grad_, theirs, *args, found[0], 1.0, softcap)
    rtol = max(torch.finfo(dtype).eps, 1e-5)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_a_negative_nan_is_not_lost(dtype):
    # Its sign bit makes it the smallest of the keys the maximum is taken of.
    tile = torch.randn(1, 3000).to(dtype)
    tile[0, 2500] = -torch.tensor(NAN, dtype=dtype)
    assert tiles.softmax_stats(tile, None, no_labels(1), 0, 1.0, None)[1].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_vocabulary_padded_with_minus_infinity(dtype):
    # More than a chunk of padding: a chunk without a maximum of its own.
    tile, bias = torch.randn(1, 4200).to(dtype), torch.zeros(4200)
    bias[100:4100] = -INF
    row_max, sum_exp, _ = tiles.softmax_stats(tile, bias, no_labels(1), 0, 1.0, None)
    kept = torch.cat((tile[0, :100], tile[0, 4100:])).to(row_max.dtype)
    torch.testing.assert_close(row_max[0], kept.max())
    torch.testing.assert_close(sum_exp[0], (kept - kept.max()).exp().sum())
    tiles.softmax_grad_(tile, bias, no_labels(1), 0, row_max, 1.0, None)
    assert not tile[0, 100:4100].any()


def test_differences_that_overflow():
    tile = torch.tensor([[1e30, -1e30, 3.4e38, 1e-45]])
    row_max, sum_exp, _ = tiles.softmax_stats(tile, None, no_labels(1), 0, 1.0, None)
    assert (row_max.item(), sum_exp.item()) == (torch.tensor(3.4e38).item(), 1.0)
    tiles.softmax_grad_(tile, None, no_labels(1), 0, row_max, 1.0, None)
    assert tile.tolist() == [[0.0, 0.0, 1.0, 0.0]]


def test_a_label_far_above_the_reference_is_zero():
    tile, labels = torch.tensor([[500.0, 1.0, 0.0]]), torch.zeros(1, 1, dtype=torch.int64)
    row_max, *_ = tiles.softmax_stats(tile, None, labels, 0, 1.0, None)
    tiles.softmax_grad_(tile, None, labels, 0, row_max, 1.0, None)
    assert row_max.item() == 1.0
    assert tile[0, 0] == 0.0


def test_accumulate_passes_nan_and_inf_on():
    sums, partial = torch.zeros(3, 40), torch.zeros(3, 40).bfloat16()
    partial[0, 7], partial[1, 9], sums[2, 3] = NAN, -INF, INF
    tiles.accumulate_(sums, partial, torch.tensor([1.0, 1.0, 0.0]), -1.0)
    assert sums[0, 7].isnan()
    assert sums[1, 9] == INF
    assert sums[2, 3].isnan()  # 0 * inf
    assert sums.isfinite().sum() == 120 - 3


def _everything(dtype):
    torch.manual_seed(3)
    # 300 rows of 2,500: several tasks per thread, the last shorter.
    tile, bias = torch.randn(300, 2500).to(dtype), torch.randn(2500)
    labels = torch.randint(0, 2500, (2, 300))
    results = list(tiles.softmax_stats(tile, bias, labels, 0, 0.7, 20.0, with_logit_sum=True))
    results += tiles.softmax_stats(tile, None, labels, 0, 1.0, None, with_logit_sum=True)
    partial, sums = tile.clone(), torch.randn(300, 2500)
    tiles.softmax_grad_(tile, None, labels, 0, results[3], 1.0, None)
    tiles.accumulate_(sums, partial, results[4], 0.5)
    return [*results, tile, tiles.column_sums(tile, results[0]), sums]


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_same_bits_with_one_thread_and_with_two(dtype):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        once, again = _everything(dtype), _everything(dtype)
        torch.set_num_threads(2)
        with_two = _everything(dtype)
    finally:
        torch.set_num_threads(threads)
    for each in (again, with_two):
        assert all(torch.equal(a, b) for a, b in zip(once, each, strict=True))
