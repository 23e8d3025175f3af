"""Tile operations: their schemas, their plain-torch form, and C++ where it was built.

Where to add one: its schema in `schemas.py`, its plain form in `plain.py`, `collect.py` or
`compact.py`, a line in the table below, and a kernel in `csrc/` or `kernels/` where that is faster.
"""

from collections.abc import Callable
from typing import Any

import torch

from orpo_kernels.engine.tiles import collect, compact, native, plain
from orpo_kernels.engine.tiles.schemas import (
    NATIVE,
    accumulate_,
    column_sums,
    compact_weight_gradient,
    csr_matmul_,
    softmax_collect_,
    softmax_compact_online_,
    softmax_grad_,
    softmax_stats,
)
from orpo_kernels.kernels import register_tile_operation

__all__ = [
    "NATIVE",
    "accumulate_",
    "column_sums",
    "compact_weight_gradient",
    "csr_matmul_",
    "force_plain",
    "native",
    "softmax_collect_",
    "softmax_compact_online_",
    "softmax_grad_",
    "softmax_stats",
]

_PLAIN: dict[str, Callable[..., Any]] = {
    "softmax_stats": plain.softmax_stats,
    "softmax_grad_": plain.softmax_grad_,
    "column_sums": plain.column_sums,
    "accumulate_": plain.accumulate_,
    "softmax_collect_": collect.softmax_collect_,
    "csr_matmul_": collect.csr_matmul_,
    "softmax_compact_online_": compact.softmax_compact_online_,
    "compact_weight_gradient": compact.compact_weight_gradient,
}


def force_plain(forced: bool) -> None:
    """Whether CPU tensors get the plain-torch form of every operation, C++ or not."""
    native.stand_in({name: _PLAIN[name] for name in NATIVE} if forced else None)


_TRITON = ("softmax_stats", "softmax_grad_", "column_sums")


def _nothing(*args: object, **kwargs: object) -> None:
    """The fake of an operation that only writes into what it is given."""


for _name, _form in _PLAIN.items():
    torch.library.impl(f"orpo_kernels::{_name}", "CompositeExplicitAutograd", _form)
for _name in _TRITON:
    register_tile_operation(_name, _PLAIN[_name])
for _name, _fake in (
    ("softmax_stats", plain.softmax_stats_fake),
    ("column_sums", plain.column_sums_fake),
    ("softmax_grad_", _nothing),
    ("accumulate_", _nothing),
):
    torch.library.register_fake(f"orpo_kernels::{_name}", _fake)

native.load(f"orpo_kernels::{name}" for name in NATIVE)
