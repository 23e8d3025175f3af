"""The tile operations as Triton kernels, behind the schemas of `engine/tiles.py` and the custom ops.

What is registered here for the CUDA (and ROCm) and XPU dispatch keys is a thin function: triton and
the kernels are imported when the first such tensor arrives. Without triton one warning says so and
the plain-torch form stands in. A dtype without a kernel (float64) takes the plain-torch form too.

`ORPO_KERNELS_GPU_BACKEND=torch` turns the kernels off, for a device or driver they fail on.
"""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

SWITCH = "ORPO_KERNELS_GPU_BACKEND"
DEVICES = ("cuda", "xpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Function = Callable[..., Any]

_MODULES = {
    "softmax_stats": "softmax_stats",
    "softmax_grad_": "softmax_grad",
    "linear_lse": "linear_lse",
    "column_sums": "column_sums",
    "sequence_mean": "sequence_mean",
    "sequence_mean_backward": "sequence_mean",
    "pair_loss": "pair_loss",
    "odds_ratio": "odds_ratio",
    "odds_ratio_backward": "odds_ratio",
}


_forced_plain = False


def force_plain(forced: bool) -> None:
    """Whether GPU tensors get plain torch, Triton or not."""
    global _forced_plain
    _forced_plain = forced


def gpu_backend() -> str:
    """Form of the row operations that CUDA, ROCm and XPU tensors get: "triton" or "torch"."""
    return "torch" if _forced_plain else _installed_backend()


@functools.cache
def _installed_backend() -> str:
    if os.environ.get(SWITCH, "triton") == "torch":
        return "torch"
    if importlib.util.find_spec("triton") is not None:
        return "triton"
    warnings.warn(
        "orpo_kernels: triton is not installed, so the GPU uses the plain torch form of the row "
        "operations, with the same results and memory bound but several times slower; install "
        f"it (pip install triton), or set {SWITCH}=torch to silence this",
        RuntimeWarning,
        stacklevel=2,
    )
    return "torch"


def runs_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a call with GEMMs in `dtype` takes the loop that launches Triton kernels."""
    return device.type in DEVICES and dtype in DTYPES and gpu_backend() == "triton"


@functools.cache
def launcher(module: str, name: str) -> Function:
    """A launcher of `kernels/<module>.py`; triton is imported now, and not before."""
    return getattr(importlib.import_module(f"{__name__}.{module}"), name)  # type: ignore[no-any-return]


def _has_kernel(first: Tensor, *others: Any) -> bool:
    """Whether a kernel takes these: not float64, nor empty, columns apart, three label sets."""
    if first.dtype not in DTYPES or first.numel() == 0:
        return False
    tiles = [each for each in (first, *others) if isinstance(each, Tensor) and each.ndim == 2]
    tiles = [tile for tile in tiles if tile.dtype != torch.bool]
    labels = [tile for tile in tiles if tile.dtype == torch.int64]
    apart = any(tile.shape[1] > 1 and tile.stride(1) != 1 for tile in tiles)
    return not apart and all(1 <= sets.shape[0] <= 2 for sets in labels)


@functools.cache
def has_tensor_cores(device: torch.device) -> bool:
    """Whether Triton multiplies on tensor cores there: not before sm_80."""
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _has_gemm(hidden: Tensor, weight: Tensor, *others: Any) -> bool:
    """Whether a GEMM kernel takes these: of one dtype, none empty, on tensor cores."""
    alike = hidden.dtype == weight.dtype and weight.numel() > 0
    return alike and _has_kernel(hidden, weight, *others) and has_tensor_cores(hidden.device)


def has_slots(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the sparse gradient keeps slots there, which its product takes on tensor cores."""
    return runs_triton(device, dtype) and _multiplies_slots(device)


@functools.cache
def _multiplies_slots(device: torch.device) -> bool:
    # Without a card: a plan for a machine that has one.
    planned = device.type == "cuda" and not torch.cuda.is_available()
    return planned or has_tensor_cores(device)


def _small_and_float32(first: Tensor, *others: Any) -> bool:
    """Whether a kernel of the loss takes these: float32, and none of them empty."""
    tensors = [each for each in (first, *others) if isinstance(each, Tensor)]
    return first.dtype == torch.float32 and all(each.numel() > 0 for each in tensors)


_TAKES: dict[str, Callable[..., bool]] = {
    "sequence_mean": _small_and_float32,
    "sequence_mean_backward": _small_and_float32,
    "pair_loss": _small_and_float32,
    "linear_lse": _has_gemm,
}


def _chooser(name: str, plain: Function) -> Function:
    takes = _TAKES.get(name, _has_kernel)

    @functools.wraps(plain)
    def choose(*args: Any, **kwargs: Any) -> Any:
        if takes(*args, *kwargs.values()) and gpu_backend() == "triton":
            return launcher(_MODULES[name], name)(*args, **kwargs)
        return plain(*args, **kwargs)

    return choose


def register_tile_operation(name: str, plain: Function) -> None:
    """Puts the kernel behind `orpo_kernels::name` for GPU tensors, `plain` behind the kernel."""
    for device in DEVICES:
        torch.library.impl(f"orpo_kernels::{name}", device, _chooser(name, plain))


def register_custom_op(name: str, operation: Any) -> None:
    """The same for an operation that `torch.library.custom_op` made of its plain form."""
    for device in DEVICES:
        operation.register_kernel(device, _chooser(name, operation._init_fn))
