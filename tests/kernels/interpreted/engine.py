"""Makes the engine take CPU tensors as a GPU's, so that its launchers run in the interpreter."""

import sys

import torch

from orpo_kernels import linear_logps
from orpo_kernels.engine import chunks, exact, sparse, weight_gradient


def as_on_a_gpu(monkeypatch, *, widens):
    """With `widens`, as from sm_80 on: the GEMM of 16-bit operands writes float32, E goes to a tile
    of its own, rows of both start on 16 bytes. Without, as on cards before: the logits are 16-bit,
    fp16 ones too, which a CPU would not choose."""
    monkeypatch.setattr(chunks.Sizes, "on_cpu", False)
    module = sys.modules[linear_logps.__module__]
    monkeypatch.setattr(
        module, "choose_compute_dtype", lambda hidden, weight, _: torch.promote_types(
            hidden.dtype, weight.dtype)
    )  # fmt: skip
    if not widens:
        return

    def matmul_into(out, a, b):
        return out.copy_(a.float() @ b.float())

    monkeypatch.setattr(chunks, "gemm_widens", lambda device, dtype: dtype.itemsize == 2)
    monkeypatch.setattr(chunks, "matmul_into", matmul_into)
    for module in (exact, sparse, weight_gradient):
        monkeypatch.setattr(module, "matmul_into", matmul_into)
    for module in (chunks, exact, weight_gradient):
        monkeypatch.setattr(module, "row_pitch", lambda columns, _: -(-columns // 8) * 8)
