"""Makes the engine take CPU tensors as a GPU's, so that its launchers run in the interpreter.

The plugin says that CPU tensors are a device of Triton's: the loops for such devices run. What is
left to pretend is how a GPU multiplies.
"""

import sys

import torch

from orpo_kernels import linear_logps
from orpo_kernels.engine import gemm, problem


def as_on_a_gpu(monkeypatch, *, widens):
    """With `widens`, as from sm_80 on: the GEMM of 16-bit operands writes float32, E goes to a tile
    of its own. Without, as on cards before: the logits are 16-bit, fp16 ones too, which a CPU would
    not choose."""
    module = sys.modules[linear_logps.__module__]
    monkeypatch.setattr(
        module, "choose_compute_dtype", lambda hidden, weight, _: torch.promote_types(
            hidden.dtype, weight.dtype)
    )  # fmt: skip
    if not widens:
        return
    for module in (gemm, problem):
        monkeypatch.setattr(module, "gemm_widens", lambda device, dtype: dtype.itemsize == 2)
    monkeypatch.setattr(gemm, "_widening_mm", lambda out, a, b: out.copy_(a.float() @ b.float()))
    monkeypatch.setattr(gemm, "_widening_addmm", lambda out, a, b: out.add_(a.float() @ b.float()))
