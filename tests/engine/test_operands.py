"""Under CUDA graph capture every row is processed: the same results, whatever padding holds."""

import pytest
import torch

from orpo_kernels import linear_logps
from orpo_kernels.engine import gemm, scoring


# Kept E, recomputed tiles, and hidden states whose rows have no (N, H) view.
@pytest.mark.parametrize("workspace", [None, 200_000])
@pytest.mark.parametrize("sliced", [False, True])
def test_all_rows_under_capture(monkeypatch, workspace, sliced):
    hidden, weight = torch.randn(3, 8, 16), torch.randn(70, 16, requires_grad=True)
    bias = torch.randn(70, requires_grad=True)
    labels = torch.randint(0, 70, (2, 3, 7 if sliced else 8))
    labels[0, :, ::3] = -100
    labels[1] = labels[0]
    labels[1, 0, 1] = 5
    labels[1, 2, 2] = -100
    weights = torch.randn(labels.shape)

    def run(hidden):
        hidden = hidden.clone().requires_grad_()
        view = hidden[:, :-1] if sliced else hidden
        logps = torch.stack(
            linear_logps(view, weight, tuple(labels), bias, workspace_bytes=workspace)
        )
        return logps, *torch.autograd.grad((logps * weights).sum(), (hidden, weight, bias))

    plain = run(hidden)
    nothing = (labels == -100).all(0)
    padded = hidden.clone()
    padded[:, : labels.shape[2]][nothing] = torch.nan  # attention over nothing, for one
    monkeypatch.setattr(scoring, "is_capturing", lambda device: True)
    for found, expected in zip(run(padded), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gemm_widens_by_capability(monkeypatch):
    cuda = torch.device("cuda")
    gemm.gemm_widens.cache_clear()
    assert not gemm.gemm_widens(torch.device("cpu"), torch.bfloat16)
    assert not gemm.gemm_widens(cuda, torch.float32)  # nothing to widen
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not gemm.gemm_widens(cuda, torch.float16)
    gemm.gemm_widens.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert gemm.gemm_widens(cuda, torch.bfloat16)
    gemm.gemm_widens.cache_clear()


def test_gemm_widens_asks_a_rocm_build(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: torch.ones(2, 2))

    def answers(error):
        def matmul(*tensors):
            if error is not None:
                raise error

        gemm.gemm_widens.cache_clear()
        monkeypatch.setattr(gemm, "matmul_into", matmul)
        return gemm.gemm_widens(cuda, torch.bfloat16)

    assert answers(None)
    # A build that refuses the GEMM gets 16-bit logits; a full card is not a refusal.
    assert not answers(RuntimeError("out_dtype is not supported"))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        answers(torch.cuda.OutOfMemoryError("out of memory"))
    gemm.gemm_widens.cache_clear()
