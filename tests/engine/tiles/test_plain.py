"""Tile operations against their formulae in float64: every dtype, option and edge of a tile."""

import pytest
import torch

from orpo_kernels import reference
from orpo_kernels.engine import tiles
from orpo_kernels.engine.budget import accumulation_dtype
from orpo_kernels.engine.tiles.plain import add_at_, merge
from tests.helpers import assert_accurate, assert_logit_sums, problem

OPTIONS = [(1.0, None), (0.3, None), (1.0, 5.0), (1.7, 2.0)]
# One row; one column; a width no vector divides; more rows than a strip holds.
SHAPES = [(1, 7), (5, 1), (3, 1003), (40, 9000)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize(("scale", "softcap"), OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stats_and_gradient(dtype, shape, scale, softcap, sets):
    given = problem(shape[0], 32, shape[1], dtype, bias=True, sets=sets, first_column=11)
    logits, bias, labels = given.tile, given.bias, given.labels
    z, slope = reference.tile_logits(logits.double(), bias.double(), labels, 11, scale, softcap)
    args = (logits, bias, labels, 11, scale, softcap)
    row_max, sum_exp, not_asked = tiles.softmax_stats(*args)
    some = ~torch.isinf(z).all(1)
    true_max, true_sum = reference.softmax_stats(z[some])
    assert_accurate(row_max[some].float(), true_max)
    truth = true_sum * torch.exp(true_max - row_max[some].double())
    torch.testing.assert_close(sum_exp[some].double(), truth, rtol=2e-6, atol=0)
    assert not sum_exp[~some].any()
    assert not_asked.shape == (0,)
    *same, logit_sum = tiles.softmax_stats(*args, with_logit_sum=True)
    assert all(torch.equal(a, b) for a, b in zip(same, (row_max, sum_exp), strict=True))
    assert_logit_sums(logit_sum, logits, bias, scale, softcap)

    level = row_max + 0.5
    out = torch.empty_like(logits, dtype=torch.bfloat16)
    tiles.softmax_grad_(logits.clone(), bias, labels, 11, level, scale, softcap, out)
    before = logits.clone()
    tiles.softmax_grad_(logits, bias, labels, 11, level, scale, softcap)
    true = reference.softmax_grad(z, slope, level.double())
    eps = max(torch.finfo(dtype).eps, 1e-5)  # exp of a float32 difference: |z| times its eps
    torch.testing.assert_close(logits.double(), true, rtol=eps, atol=1e-7)
    torch.testing.assert_close(out.double(), true, rtol=8e-3, atol=1e-7)
    assert not torch.equal(before, logits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_sums(dtype):
    tile, weights = torch.randn(300, 2000).to(dtype), torch.randn(300)
    weights = weights.to(accumulation_dtype(dtype))
    found = tiles.column_sums(tile, weights)
    torch.testing.assert_close(
        found.double(), reference.column_sums(tile.double(), weights.double()), rtol=1e-5, atol=1e-4
    )


def test_rows_of_a_wider_matrix():
    # A kept E is sliced by vocabulary block: rows are contiguous, the tile is not.
    wide = torch.randn(5, 40)
    labels = torch.full((1, 5), -1)
    found = tiles.softmax_stats(wide[:, 8:20], None, labels, 8, 1.0, None)
    true = tiles.softmax_stats(wide[:, 8:20].contiguous(), None, labels, 8, 1.0, None)
    assert all(torch.equal(a, b) for a, b in zip(found, true, strict=True))
    sums = tiles.column_sums(wide[:, 8:20], torch.ones(5))
    torch.testing.assert_close(sums, wide[:, 8:20].sum(0))


def test_values_of_one_index_are_added_in_order_and_rounded_once():
    # 300 values of 2^-9 on a bfloat16 of 1: each by itself would be rounded away.
    index, values = torch.zeros(300, dtype=torch.int64), torch.full((300, 2), 2.0**-9)
    target = torch.ones(3, 2, dtype=torch.bfloat16)
    add_at_(target, index, values)
    assert target.tolist() == [[1.5859375] * 2, [1.0] * 2, [1.0] * 2]
    wide = torch.zeros(3, 2)
    add_at_(wide, index, values)
    assert wide[0].tolist() == [300 * 2.0**-9] * 2


def test_merge_is_one_softmax_of_two_parts():
    z = torch.randn(5, 40, dtype=torch.float64) * 20
    z[0, :20] = -torch.inf  # nothing yet: a finite maximum stands for it
    parts = [(each.amax(1).clamp(min=-1e308), each) for each in z.split(20, 1)]
    sums = [(top, torch.exp(each - top[:, None]).sum(1)) for top, each in parts]
    merged = merge(*sums[0], *sums[1])
    torch.testing.assert_close(merged.row_max + merged.sum_exp.log(), z.logsumexp(1))
    torch.testing.assert_close(
        merged.sum_exp, sums[0][1] * merged.rescale + merged.second_sum, rtol=0, atol=0
    )
