"""`linear_lse` on a device against float64, in bits, in its memory, and through the engine."""

import pytest
import torch

from orpo_kernels import linear_logps, reference
from orpo_kernels.engine.linear_lse import linear_lse
from tests.gpu.cases import pairwise
from tests.helpers import problem

pytestmark = pytest.mark.gpu

EPS32 = torch.finfo(torch.float32).eps
OPTIONS = [(1.0, None, False, 1), (0.3, None, True, 2), (-1.7, 3.0, True, 2)]
SHAPES = {
    "few rows": (8, 64, 300),
    "rows, columns and splits ragged": (1000, 4096, 32003),
    "odd H: single elements": (300, 4097, 8000),
    "H of one step and a half": (5000, 96, 16384),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operands(gpu, R, H, V, dtype, sets=1, with_bias=False):
    if not gpu.real:
        R, H, V = min(R, 20), min(H, 97), min(V, 1003)
    return problem(R, H, V, dtype, bias=with_bias, sets=sets, device=gpu.device)


@pytest.mark.parametrize(("shape", "option", "dtype"), pairwise(SHAPES, OPTIONS, DTYPES), ids=str)
def test_against_float64(gpu, shape, option, dtype):
    scale, softcap, with_bias, sets = option
    inputs = operands(gpu, *SHAPES[shape], dtype, sets, with_bias)
    found = linear_lse(*inputs, scale, softcap, True)
    again = linear_lse(*inputs, scale, softcap, True)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    hidden, weight, bias, labels = inputs
    wide = [None if each is None else each.double() for each in (hidden, weight, bias)]
    true_max, true_sum, true_dots, true_total = reference.linear_lse(*wide, labels, scale, softcap)
    terms = float(hidden.double().norm(dim=1).max() * weight.double().norm(dim=1).max())
    # Float32 sums of products; a CPU's 16-bit GEMM rounds its logits instead.
    eps = 8 * EPS32 if gpu.real or dtype == torch.float32 else torch.finfo(dtype).eps
    z_error = eps * max(1.0, abs(scale) * terms)
    row_max, sum_exp, dots, total = (each.double() for each in found)
    torch.testing.assert_close(row_max, true_max, rtol=0, atol=z_error)
    lse, true_lse = row_max + sum_exp.log(), true_max + true_sum.log()
    torch.testing.assert_close(lse, true_lse, rtol=0, atol=2 * z_error)
    torch.testing.assert_close(dots, true_dots, rtol=0, atol=8 * EPS32 * terms)
    torch.testing.assert_close(total, true_total, rtol=1e-4, atol=z_error * weight.shape[0])


def test_kilobytes(gpu):
    # The float32 logits would be 8 GiB; 64 partials of 8 bytes a row and the results are 8.6 MiB.
    gpu.needs_cuda()
    R, H, V = 16384, 256, 128256
    hidden, weight, _, labels = operands(gpu, R, H, V, torch.bfloat16)
    for _ in range(2):  # the first compiles, and loads the combination
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = linear_lse(hidden, weight, None, labels, 1.0, None, False)
        peak = torch.cuda.max_memory_allocated() - before
        del found
    assert peak <= 9 * 2**20


def test_a_budget_no_tile_fits(gpu):
    gpu.needs_cuda()
    hidden, weight, _, labels = operands(gpu, 1000, 4096, 32003, torch.bfloat16)
    labels.clamp_(min=0)
    small = linear_logps(hidden, weight, labels[0], workspace_bytes=2**19)
    torch.testing.assert_close(small, linear_logps(hidden, weight, labels[0]), rtol=0, atol=1e-3)


def test_more_than_2_31_weights(gpu):
    gpu.needs_cuda()
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB")
    V, H = 262_400, 8192
    weight = torch.zeros(V, H, dtype=torch.bfloat16, device=gpu.device)
    weight[-1, -1] = 50.0
    hidden = torch.ones(2, H, dtype=torch.bfloat16, device=gpu.device)
    labels = torch.tensor([[-1, V - 1]], device=gpu.device)
    row_max, sum_exp, dots, _ = linear_lse(hidden, weight, None, labels, 1.0, None, False)
    torch.testing.assert_close(row_max.cpu(), torch.tensor([50.0, 0.0]))
    torch.testing.assert_close(sum_exp.cpu(), torch.tensor([1.0, V - 1.0]))
    assert dots.tolist() == [[0.0, 50.0]]
