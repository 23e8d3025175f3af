"""What `linear_logps` accepts, the strategy it takes, and the dtype its GEMMs run in."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from orpo_kernels.constants import DEFAULT_EPS, IGNORE_INDEX

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GRADIENTS = ("exact", "sparse", "auto")


@dataclass(frozen=True)
class Options:
    """The keyword arguments of `linear_logps`, which documents them."""

    logit_scale: float = 1.0
    softcap: float | None = None
    ignore_index: int = IGNORE_INDEX
    gradient: str = "exact"
    eps: float = DEFAULT_EPS
    tail_groups: Tensor | None = None
    compute_dtype: torch.dtype | None = None
    workspace_bytes: int | None = None
    low_rank: tuple[Tensor, Tensor] | None = None

    def validate(self, labels: Tensor) -> None:
        """Refuse values out of range, and groups that do not belong to `labels`."""
        if self.gradient not in GRADIENTS:
            raise NotImplementedError(
                f"gradient={self.gradient!r} is not available; use one of {GRADIENTS}"
            )
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise ValueError(
                f"softcap must be positive and finite, got {self.softcap}; None means no cap"
            )
        if not 0 <= self.eps <= 1:
            raise ValueError(f"eps must be a probability, from 0 to 1, got {self.eps}")
        if self.gradient == "sparse" and not self.logit_scale > 0:
            raise ValueError(
                f"gradient='sparse' needs a positive logit_scale, got {self.logit_scale}; "
                "use gradient='exact'"
            )
        if self.tail_groups is not None:
            _validate_groups(self.tail_groups, labels)

    def is_sparse(self, dtype: torch.dtype) -> bool:
        """Whether the sparse strategy is taken with GEMMs in `dtype`."""
        if self.gradient == "auto":
            return dtype.itemsize == 2 and self.logit_scale > 0
        return self.gradient == "sparse"


def _validate_groups(groups: Tensor, labels: Tensor) -> None:
    if groups.is_floating_point() or groups.is_complex():
        raise TypeError(f"tail_groups must be integer, 0 or 1, got {groups.dtype}")
    if groups.shape != labels.shape:
        raise ValueError(
            f"tail_groups must have the shape of labels, {tuple(labels.shape)}, got "
            f"{tuple(groups.shape)}"
        )


def validate(
    hidden: Tensor,
    weight: Tensor,
    label_sets: tuple[Tensor, ...],
    bias: Tensor | None,
    low_rank: tuple[Tensor, Tensor] | None,
) -> None:
    """Refuse dtypes and shapes that `linear_logps` cannot take."""
    low = {} if low_rank is None else {"low_rank[0]": low_rank[0], "low_rank[1]": low_rank[1]}
    floating = {"hidden": hidden, "weight": weight, "bias": bias, **low}
    for name, tensor in floating.items():
        if tensor is not None and tensor.dtype not in FLOATING:
            hint = "; dequantise the head first" if name == "weight" else ""
            raise TypeError(
                f"{name} must be floating point, 16 to 64 bits, got {tensor.dtype}{hint}"
            )
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "hidden must be (..., H) and weight (V, H), got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}; weight is not transposed"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (V,) = ({weight.shape[0]},), got {tuple(bias.shape)}")
    if low_rank is not None:
        expected = (*hidden.shape[:-1], low_rank[1].shape[-1])
        if low_rank[0].shape != expected or low_rank[1].shape[:-1] != weight.shape[:1]:
            raise ValueError(
                "low_rank must be (hidden_r (..., r), weight_r (V, r)), got "
                f"{tuple(low_rank[0].shape)} and {tuple(low_rank[1].shape)}"
            )
    _validate_labels(hidden, label_sets)


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Refuse inputs with a tangent: an op without forward-mode formula gives a tangent of 0."""
    if getattr(forward_ad, "_current_level", -1) < 0:
        return
    for tensor in tensors:
        if tensor is None:
            continue
        dual = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
        if dual.tangent is not None:
            raise NotImplementedError("linear_logps has no forward-mode derivative; use backward")


def _validate_labels(hidden: Tensor, label_sets: tuple[Tensor, ...]) -> None:
    if len(label_sets) not in (1, 2):
        raise ValueError(f"labels must be a tensor or a tuple of two, got {len(label_sets)}")
    for labels in label_sets:
        if not isinstance(labels, Tensor):
            raise TypeError(
                f"labels must be a tensor or a tuple of two, got {type(labels).__name__}"
            )
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be integer token ids, got {labels.dtype}")
        if labels.shape != hidden.shape[:-1]:
            raise ValueError(
                f"labels must have the shape of hidden without H, {tuple(hidden.shape[:-1])}, got "
                f"{tuple(labels.shape)}; labels are shifted: labels[t] is scored from hidden[t]"
            )


def choose_compute_dtype(hidden: Tensor, weight: Tensor, asked: torch.dtype | None) -> torch.dtype:
    """Dtype of the GEMM operands: what is asked for, autocast's, or the promoted one."""
    kind = weight.device.type
    dtype = asked
    if dtype is None:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
    if dtype not in FLOATING:
        raise TypeError(f"compute_dtype must be floating point, got {dtype}")
    # A CPU multiplies fp16 matrices 3 times slower than fp32 ones, and overflows besides.
    return torch.float32 if kind == "cpu" and dtype == torch.float16 else dtype
