"""Both forms of a tile operation on the same CPU tensors: what is dispatched, and plain torch."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orpo_kernels.engine import tiles
from orpo_kernels.engine.tiles import native

EPS32 = torch.finfo(torch.float32).eps

needs_extension = pytest.mark.skipif(
    native.cpu_backend() != "c++", reason=f"no C++ tile operations: {native.cpu_backend_reason()}"
)


def plain(operation, *args):
    """The plain-torch form, whatever is registered for the CPU."""
    return operation.default._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *args)


class PlainForms(TorchDispatchMode):
    """Every operation of the package in plain torch, whatever is registered for the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace != "orpo_kernels":
            return func(*args, **(kwargs or {}))
        with self:
            key = torch._C.DispatchKey.CompositeExplicitAutograd
            return func._op_dk(key, *args, **(kwargs or {}))


FORMS = [
    pytest.param(lambda operation, *args: operation(*args), id="dispatched", marks=needs_extension),
    pytest.param(plain, id="plain torch"),
]


def no_labels(rows):
    return torch.full((1, rows), -1)


def exponentials(x, dtype=None):
    """`e^x` as the operations compute it, element by element, from float32."""
    tile = x.float().view(1, -1).clone()
    out = None if dtype is None else torch.empty_like(tile, dtype=dtype)
    tiles.softmax_grad_(tile, None, no_labels(1), 0, torch.zeros(1), 1.0, None, out)
    return (tile if out is None else out)[0]


def ulps(found, truth):
    """Distance from the float64 truth in float32 units of the last place, subnormal or not."""
    near = truth.abs().float()
    spacing = torch.nextafter(near, torch.tensor(torch.inf)).double() - near.double()
    return (found.double() - truth).abs() / spacing
