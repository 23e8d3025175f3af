"""`linear_lse` in plain torch against its definition in float64, and the memory it takes."""

import pytest
import torch

from orpo_kernels import reference
from orpo_kernels.engine import linear_lse as module
from orpo_kernels.engine.linear_lse import linear_lse
from tests.helpers import peak_bytes, problem

OPTIONS = [(1.0, None, False), (0.3, None, True), (-1.7, 2.0, True)]
# One row and column; several blocks of rows and of columns, both ragged.
SHAPES = [(1, 3, 1), (300, 24, 8200)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize(("scale", "softcap", "with_bias"), OPTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_float64(dtype, shape, scale, softcap, with_bias, sets):
    hidden, weight, bias, labels = problem(*shape, dtype, spread=1.0, bias=with_bias, sets=sets)
    labels[-1, 0] = shape[2] - 1
    found = linear_lse(hidden, weight, bias, labels, scale, softcap, True)
    wide = [None if each is None else each.double() for each in (hidden, weight, bias)]
    truth = reference.linear_lse(*wide, labels, scale, softcap)
    # A 16-bit GEMM on a CPU rounds every logit, of 4 at most here; the dots are exact.
    eps = max(2e-6, torch.finfo(dtype).eps)
    some = ~torch.isinf(truth[0])
    torch.testing.assert_close(found[0][some].double(), truth[0][some], rtol=2 * eps, atol=2 * eps)
    lse = [top[some].double() + total[some].double().log() for top, total in (found[:2], truth[:2])]
    torch.testing.assert_close(*lse, rtol=eps, atol=2 * eps)
    assert not found[1][~some].any()
    torch.testing.assert_close(found[2].double(), truth[2], rtol=1e-5, atol=1e-5)
    bound = eps * shape[2] ** 0.5 * 4
    torch.testing.assert_close(found[3].double(), truth[3], rtol=1e-5, atol=bound)


def test_without_the_sum_and_without_rows():
    hidden, weight, _, labels = problem(4, 8, 20)
    assert linear_lse(hidden, weight, None, labels, 1.0, None, False)[3].shape == (0,)
    empty = linear_lse(hidden[:0], weight, None, labels[:, :0], 1.0, None, True)
    assert [tuple(each.shape) for each in empty] == [(0,), (0,), (1, 0), (0,)]


def test_memory_does_not_grow(monkeypatch):
    monkeypatch.setattr(module, "_COLUMNS", 1024)
    peaks = []
    for R, V in ((256, 2048), (2048, 16384)):
        args = problem(R, 32, V)
        peaks.append(peak_bytes(lambda args=args: linear_lse(*args, 1.0, None, False)))
    results = 2048 * 4 * 8  # per row, and what merges two blocks of it
    assert peaks[1] <= peaks[0] + results


def test_schema():
    hidden, weight, bias, labels = problem(5, 8, 20, bias=True, sets=2)
    torch.library.opcheck(
        torch.ops.orpo_kernels.linear_lse.default, (hidden, weight, bias, labels, 0.5, 3.0, True),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip
