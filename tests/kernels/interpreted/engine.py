"""Makes the engine take CPU tensors as a GPU's, so that its launchers run in the interpreter.

The plugin says that CPU tensors are a device of Triton's: the loops for such devices run. What is
left to pretend is how a GPU multiplies.
"""

import sys

import torch

from orpo_kernels import linear_logps
from orpo_kernels.engine import gemm, problem
from orpo_kernels.kernels import tuning

# Elements of a step of the loops' kernels: short, for the interpreter's sake.
_STEPS = {
    "take_rows": 16, "label_terms": 16, "finish_rows": 16, "scale_rows": 16, "reach": 16,
    "softmax_block": 256, "weight_probs": 256, "softmax_rows": 64, "softmax_few_rows": 64,
    "column_totals": 32,
}  # fmt: skip


def short_steps(monkeypatch):
    """Blocks of a few elements, up to 256 columns of a row that is held."""
    for kernel, step in _STEPS.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            key = (kernel, "datacenter", dtype)
            rows = tuning.TABLE[key] if kernel in ("softmax_block", "weight_probs") else ()
            monkeypatch.setitem(tuning.TABLE, key, (*rows, tuning.Row(step, 4)))


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
