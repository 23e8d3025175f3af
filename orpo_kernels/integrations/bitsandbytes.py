"""Keeps a 4-bit model differentiable on CPUs for which bitsandbytes has a faster inference path."""

from __future__ import annotations

from typing import Any

from torch import nn


def keep_differentiable(model: nn.Module) -> int:
    """Undo and forbid the packed CPU layout of bitsandbytes' 4-bit layers.

    bitsandbytes (0.50 and before) repacks a layer's weight the first time it runs on a CPU with
    AVX512-BF16, in eval mode, on an input without gradient, and from then on computes it with
    `gemv_4bit`, which has no derivative. Training after any evaluation (or after a look at two
    logits) then goes on without the gradient through all base weights, with one warning of
    autograd's. Call this before training; inference stays correct, it only keeps the usual layout.

    Args:
        model: any; only `Linear4bit` layers are changed.

    Returns:
        How many layers were repacked.
    """
    unpacked = 0
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        layer: Any = module
        layer.support_avx512bf16_for_cpu = False
        state = getattr(layer.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

            unpack: Any = _convert_weight_packed_for_cpu_inverse
            layer.weight.data, state = unpack(layer.weight.data, state)
            layer.weight.quant_state = layer.quant_state = state
            unpacked += 1
    return unpacked
