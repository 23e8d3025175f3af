"""The row kernels on a device against float64: dtypes, options, edges, bits, 64-bit offsets."""

import sys

import pytest
import torch

from orpo_kernels import reference
from orpo_kernels.engine import tiles
from orpo_kernels.kernels import gpu_backend
from tests.gpu.cases import pairwise
from tests.helpers import assert_accurate, assert_logit_sums

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [(1.0, None, False), (0.3, None, True), (1.7, 2.0, True), (-0.5, 30.0, False)]
SHAPES = {
    "one logit": (1, 1),
    "shorter than a vector": (3, 7),
    "Llama 3, few rows: split": (128, 128256),
    "no vector divides the rows": (130, 32003),
    "more rows than the device runs at once": (1500, 5000),
}


@pytest.mark.parametrize(("shape", "option", "dtype"), pairwise(SHAPES, OPTIONS, DTYPES), ids=str)
def test_stats_and_gradient(gpu, shape, option, dtype):
    (rows, columns), (scale, softcap, with_bias) = SHAPES[shape], option
    if not gpu.real:
        rows, columns = min(rows, 20), min(columns, 1003)
    logits = (torch.randn(rows, columns, device=gpu.device) * 4).to(dtype)
    bias = torch.randn(columns, device=gpu.device).to(dtype) if with_bias else None
    labels = torch.randint(0, 11 + 2 * columns, (2, rows), device=gpu.device)
    labels[:, ::3] = -1
    # The truth is made where the tile is: a core would take seconds for a large one.
    wide = None if bias is None else bias.double()
    z, slope = reference.tile_logits(logits.double(), wide, labels, 11, scale, softcap)
    args = (logits, bias, labels, 11, scale, softcap)
    found = tiles.softmax_stats(*args, with_logit_sum=True)
    again = tiles.softmax_stats(*args, with_logit_sum=True)
    without = tiles.softmax_stats(*args)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert torch.equal(found[0], without[0])
    torch.testing.assert_close(found[1], without[1], rtol=2e-6, atol=0)
    row_max, sum_exp, logit_sum = found
    assert_logit_sums(logit_sum, logits, bias, scale, softcap)
    some = ~torch.isinf(z).all(1)
    if some.any():
        assert_accurate(row_max[some], z.amax(1)[some])
    truth = torch.exp(z[some] - row_max[some].double()[:, None]).sum(1)
    torch.testing.assert_close(sum_exp[some].double(), truth, rtol=5e-6, atol=0)
    assert not sum_exp[~some].any()

    level = row_max + 0.5
    true = reference.softmax_grad(z, slope, level.double())
    for out_dtype in DTYPES:
        out = torch.empty_like(logits, dtype=out_dtype)
        tiles.softmax_grad_(logits, bias, labels, 11, level, scale, softcap, out)
        _close(out, true)
    twin = logits.clone()
    tiles.softmax_grad_(logits, bias, labels, 11, level, scale, softcap)
    tiles.softmax_grad_(twin, bias, labels, 11, level, scale, softcap)
    assert torch.equal(logits, twin)
    _close(logits, true)


def _close(found, true):
    # Approximate exp of a rounded difference, |z - reference| eps; then one rounding.
    eps = torch.finfo(found.dtype).eps / 2 + 2e-5
    atol = 6e-8 if found.dtype == torch.float16 else 1e-15  # half of float16's smallest step
    torch.testing.assert_close(found.double(), true, rtol=eps, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_sums(gpu, dtype):
    wide = torch.randn(1031, 8208, device=gpu.device).to(dtype)
    for view in (wide, wide[:, :8003], wide[3:, 8:4104]):
        weights = torch.randn(view.shape[0], device=gpu.device)
        found = tiles.column_sums(view, weights)
        assert torch.equal(found, tiles.column_sums(view, weights))
        truth = reference.column_sums(view.double(), weights.double())
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-4)


def test_the_kernels_ran(gpu):
    gpu.needs_cuda()
    if gpu_backend() != "triton":
        pytest.skip("triton is not installed or switched off")
    tiles.column_sums(torch.ones(2, 8, device=gpu.device), torch.ones(2, device=gpu.device))
    assert "orpo_kernels.kernels.column_sums" in sys.modules


def test_more_than_2_31_logits(gpu):
    # 16,800 rows of 128,256: the last rows lie beyond 2^31 elements.
    gpu.needs_cuda()
    rows, columns = 16800, 128256
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB")
    logits = torch.zeros(rows, columns, dtype=torch.bfloat16, device=gpu.device)
    logits[-1, -1] = 50.0
    labels = torch.full((1, rows), -1, device=gpu.device)
    row_max, sum_exp, logit_sum = tiles.softmax_stats(
        logits, None, labels, 0, 1.0, None, with_logit_sum=True
    )
    assert row_max[-1] == 50.0
    assert logit_sum.count_nonzero() == 1
    assert logit_sum[-1] == 50.0
    assert sum_exp[-1] == 1.0
    assert (sum_exp[:-1] == columns).all()
    tiles.softmax_grad_(logits, None, labels, 0, row_max, 1.0, None)
    assert logits[-1, -1] == 1.0
    assert logits[-1, 0] < 1e-20
    assert logits[-2].min() == 1.0


def test_another_device_than_the_current(gpu):
    gpu.needs_cuda()
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    tile = torch.ones(2, 8, device="cuda:1")
    assert tiles.column_sums(tile, torch.ones(2, device="cuda:1")).tolist() == [2.0] * 8
