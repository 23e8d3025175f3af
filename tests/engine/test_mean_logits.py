"""The mean-logit metric against the logits it avoids."""

import pytest
import torch

from orpo_kernels import reference
from orpo_kernels.engine.mean_logits import mean_logits, row_mean_logits
from tests.helpers import peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("bias", [False, True])
def test_mean_logits(dtype, softcap, bias):
    base = torch.randn(4, 10, 24).to(dtype)
    hidden, weight = base[:, :-1], torch.randn(999, 24).to(dtype)  # a slice without (N, H) view
    b = torch.randn(999).to(dtype) if bias else None
    options = {"logit_scale": 0.6, "softcap": softcap}
    true = reference.mean_logits(
        hidden.double(), weight.double(), None if b is None else b.double(), **options
    )
    found = mean_logits(hidden, weight, b, **options)
    assert found.dtype == torch.float32
    tolerance = 1e-6 if dtype == torch.float32 else 2e-4
    torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=tolerance)


def test_autocast_does_not_reach_it():
    hidden, weight = torch.randn(2, 5, 24), torch.randn(99, 24)
    expected = mean_logits(hidden, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mean_logits(hidden, weight)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_softcap_costs_no_more_than_the_workspace(dtype):
    # 4 MB of logits in bf16, in 1 MiB: several chunks of rows and blocks of the vocabulary.
    hidden, weight = torch.randn(2, 100, 32).to(dtype), torch.randn(10007, 32).to(dtype)
    bias, options = torch.randn(10007), {"softcap": 3.0, "workspace_bytes": 2**20}
    found = mean_logits(hidden, weight, bias, **options)
    wide = [each.double() for each in (hidden, weight, bias)]
    true = reference.mean_logits(*wide, softcap=3.0)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-4
    torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=tolerance)
    assert peak_bytes(lambda: mean_logits(hidden, weight, bias, **options)) <= 2**20


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_no_positions(softcap):
    assert mean_logits(torch.randn(2, 0, 8), torch.randn(9, 8), softcap=softcap).shape == (2,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_low_rank", [False, True])
def test_of_each_row(dtype, softcap, with_low_rank):
    def draw(*shape):
        return torch.randn(*shape).to(dtype)

    # 2 x 3 slices without (N, H) view; V 999: no block divides it.
    hidden, weight, bias = draw(2, 3, 10, 24)[:, :, :-1], draw(999, 24), draw(999)
    low_rank = (draw(2, 3, 9, 5), draw(999, 5)) if with_low_rank else None
    options = {"logit_scale": 0.6, "softcap": softcap, "workspace_bytes": 2**18}
    found = row_mean_logits(hidden, weight, bias, low_rank=low_rank, **options)
    logits = hidden.double() @ weight.double().t() + bias.double()
    if low_rank is not None:
        logits = logits + low_rank[0].double() @ low_rank[1].double().t()
    z, _ = reference.transform(logits, 0.6, softcap)
    assert found.shape == (2, 3, 9)
    assert found.dtype == torch.float32
    # A softcap's tile is rounded to bf16 on a CPU; the sums are float32.
    tolerance = 1e-6 if dtype == torch.float32 or softcap is None else 1e-3
    torch.testing.assert_close(found.double(), z.mean(-1), rtol=1e-5, atol=tolerance)


def test_of_no_row():
    assert row_mean_logits(torch.randn(0, 8), torch.randn(9, 8)).shape == (0,)
