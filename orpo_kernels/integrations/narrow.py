"""A frozen head whose entries are all 16-bit numbers, kept in 16 bits for as long as it is fused.

`peft.prepare_model_for_kbit_training` widens a head to float32 that was trained, saved and loaded
in 16 bits: 2 V H bytes for nothing, and under autocast a cast of the whole head in every call. Here
its weight gets the narrower dtype back while the head is fused, if not one entry changes by it.
What the head computes stays what it was: it multiplies, and is saved, in its own dtype.
"""

import inspect
import os
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

_BLOCK_ELEMENTS = 2**24  # of the head that are looked at, or widened, at a time
_NARROW = (torch.bfloat16, torch.float16)
_SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


class NarrowLinear(nn.Linear):
    """The class of a head that is kept in 16 bits; `wide_dtype` is its own dtype."""

    wide_dtype: torch.dtype
    users: int

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden (..., H), multiplied in the head's own dtype, or autocast's."""
        if self.weight.requires_grad:  # since it was narrowed
            widen(self)
            return nn.Linear.forward(self, hidden)
        kind = self.weight.device.type
        if torch.is_autocast_enabled(kind) or self.weight.dtype == self.wide_dtype:
            return super().forward(hidden)
        logits: Tensor = _WideProduct.apply(hidden, self.weight, self.wide_dtype)  # type: ignore[no-untyped-call]
        return logits if self.bias is None else logits + self.bias

    def _apply(self, fn: Any, recurse: bool = True) -> nn.Module:
        # `model.to(dtype)` gives it that dtype for good; another device does not change it.
        if fn(self.weight.new_empty(0, dtype=self.wide_dtype)).dtype != self.wide_dtype:
            widen(self)
        changed: nn.Module = nn.Linear._apply(self, fn, recurse)  # type: ignore[no-untyped-call]
        return changed

    def extra_repr(self) -> str:
        """With the dtype that it is kept in."""
        kept = str(self.weight.dtype).removeprefix("torch.")
        return f"{super().extra_repr()}, kept in {kept} by orpo_kernels"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        name = f"{prefix}weight"
        destination[name] = destination[name].detach().to(self.wide_dtype)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        widen(self)  # what is loaded may be no 16-bit numbers
        nn.Linear._load_from_state_dict(self, *args, **kwargs)


class _WideProduct(torch.autograd.Function):
    """`hidden @ weight.T` in a wider dtype than the weight's, widened block by block."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = dtype
        wide = hidden.to(dtype)
        return torch.cat([wide @ block.t() for block in _blocks(weight, dtype)], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        dhidden = dlogits.new_zeros((*dlogits.shape[:-1], weight.shape[1]))
        start = 0
        for block in _blocks(weight, ctx.dtype):
            dhidden += dlogits[..., start : start + block.shape[0]] @ block
            start += block.shape[0]
        return dhidden, None, None


def narrow(model: nn.Module, head: nn.Module) -> bool:
    """Keep `head` in 16 bits, once more, where that loses nothing; says whether it is so now.

    Args:
        model: whose head it is: another module of it may share the weight.
        head: the output head.

    Returns:
        True if the head is kept in 16 bits, and `widen` is to be called for it.
    """
    if isinstance(head, NarrowLinear):
        head.users += 1
        return True
    if not _may_be_narrowed(head, model):
        return False
    dtype = next((dtype for dtype in _NARROW if _is_exact(head.weight, dtype)), None)
    if dtype is None:
        return False
    head.wide_dtype, head.users = head.weight.dtype, 1  # type: ignore[assignment]
    head.weight.data = _cast(head.weight, dtype)
    head.__class__ = NarrowLinear
    return True


def widen(head: nn.Module, *, users: int | None = None) -> None:
    """Give the head its own dtype back: when its last user leaves; without `users` at once."""
    if not isinstance(head, NarrowLinear):
        return
    head.users -= head.users if users is None else users
    if head.users > 0:
        return
    head.weight.data = head.weight.data.to(head.wide_dtype)
    head.__class__ = nn.Linear  # type: ignore[assignment]
    for name in ("wide_dtype", "users"):
        delattr(head, name)


def own_dtype(head: nn.Linear) -> torch.dtype:
    """The dtype of a head's weight, whatever it is kept in."""
    return head.wide_dtype if isinstance(head, NarrowLinear) else head.weight.dtype


def _may_be_narrowed(head: nn.Module, model: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is a plain, frozen, float32 matrix of its own that nobody wraps."""
    if type(head) is not nn.Linear or "_hf_hook" in head.__dict__:
        return False
    weight = head.weight
    plain = type(weight) is nn.Parameter and not weight.is_meta
    if not plain or weight.requires_grad or weight.dtype != torch.float32:
        return False
    if _reads_dtype(model):
        return False
    if any(os.environ.get(each, "").lower() in ("1", "true") for each in _SHARDED):
        return False  # pieces of several parameters become one tensor, of one dtype
    alike = (each for each in model.parameters() if each.shape == weight.shape)
    return sum(each.data_ptr() == weight.data_ptr() for each in alike) == 1 and not any(
        module is not head and getattr(module, "weight", None) is weight
        for module in model.modules()
    )


def _reads_dtype(model: nn.Module) -> bool:
    """Whether the model casts hidden states to the dtype of its head's weight, as Mamba does."""
    names = getattr(inspect.unwrap(model.forward), "__code__", _reads_dtype.__code__).co_names
    return {"weight", "dtype"} <= set(names)


def _is_exact(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether every entry is a number of `dtype`."""
    blocks = torch.split(weight.detach(), _rows(weight))
    return all(torch.equal(block, block.to(dtype).to(block.dtype)) for block in blocks)


def _cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The entries in `dtype`; through the host where the device has no room for both."""
    try:
        return weight.detach().to(dtype)
    except torch.OutOfMemoryError:
        there, device = torch.empty(weight.shape, dtype=dtype), weight.device
        for start in range(0, weight.shape[0], _rows(weight)):
            here = slice(start, start + _rows(weight))
            there[here] = weight.detach()[here]
        weight.data = weight.new_empty(0)
        return there.to(device)


def _blocks(weight: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    return (block.to(dtype) for block in torch.split(weight, _rows(weight)))


def _rows(weight: Tensor) -> int:
    return max(1, _BLOCK_ELEMENTS // weight.shape[1])
