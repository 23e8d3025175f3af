"""One call of `linear_logps`, as its registered op receives it: made once, read everywhere below.

An op turns its flat arguments into a `Problem` and hands it to `engine/run.py`. Nothing here looks
at the values of a tensor, so a problem can be made while the op is traced.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orpo_kernels.engine.budget import Sizes, workspace_budget
from orpo_kernels.engine.gemm import gemm_widens
from orpo_kernels.engine.gpu.model import Job, job_of
from orpo_kernels.kernels import runs_triton


class Transform(NamedTuple):
    """Of raw logits x: `softcap * tanh(scale * x / softcap)`; without a softcap `scale * x`."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Problem:
    """What is multiplied, what is scored, and how; `low-rank` is a LoRA on the head.

    Attributes:
        hidden: (..., H) floating.
        weight: (V, H) floating.
        labels: (K, ...) int64, K label sets, 1 or 2.
        bias: (V,) floating.
        hidden_r: (..., r) floating, low-rank part of hidden.
        weight_r: (V, r) floating, low-rank part of the weight.
        transform: of the logits.
        ignore_index: label of positions that are not scored.
        dtype: of the GEMMs' operands.
        workspace_bytes: as the caller gave it, None for the default.
        trainable: whether the head needs a gradient, so that the forward provides for its backward.
        groups: (...) int64 in [0, 2), tail groups of the sparse gradient; None: one.
        eps: of the sparse gradient, of entries `p d`.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None
    hidden_r: Tensor | None
    weight_r: Tensor | None
    transform: Transform
    ignore_index: int
    dtype: torch.dtype
    workspace_bytes: int | None
    trainable: bool
    groups: Tensor | None = None
    eps: float = 0.0

    @property
    def hiddens(self) -> tuple[Tensor, ...]:
        """Hidden states, and their low-rank part where there is one."""
        return (self.hidden,) if self.hidden_r is None else (self.hidden, self.hidden_r)

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """The weight, and its low-rank part where there is one."""
        return (self.weight,) if self.weight_r is None else (self.weight, self.weight_r)

    @property
    def count(self) -> int:
        """N: all positions, scored or not."""
        return self.labels[0].numel()

    @property
    def group_count(self) -> int:
        """G: how many averages the dropped entries of the sparse gradient have."""
        return 1 if self.groups is None else 2

    @property
    def budget(self) -> int:
        """Bytes the workspace may take."""
        return workspace_budget(self.workspace_bytes, self.weight.device)

    @property
    def in_rows(self) -> bool:
        """Whether the entries of the head lie in rows, as the loops for a GPU read them."""
        return all(each.stride(1) == 1 or each.shape[1] == 1 for each in self.weights)

    def job(self, sizes: Sizes, *, gathers: bool = True, in_result: bool | None = None) -> Job:
        """`sizes` of this problem, as the plans of a GPU count them.

        `gathers`, `in_result`: of `Job`; by default dW lends its memory where it is one matrix.
        """
        items = [each.element_size() for each in self.weights]
        lends = len(items) == 1 if in_result is None else in_result
        return job_of(sizes, max(items), gathers=gathers, result_item=min(items), in_result=lends)

    def sizes(self, rows: int) -> Sizes:
        """Sizes of `rows` scored rows of this problem."""
        return Sizes(rows, *self._facts)

    @functools.cached_property
    def _facts(self) -> tuple[Any, ...]:
        """The fields of `Sizes` after the rows."""
        device, dtype = self.weight.device, self.dtype
        columns = sum(part.shape[-1] for part in self.hiddens)
        copied = len(self.weights) > 1 or self.weight.dtype != dtype or self.weight.stride(1) != 1
        return (
            self.weight.shape[0], columns, self.labels.shape[0], dtype, copied, device,
            gemm_widens(device, dtype), runs_triton(device, dtype),
        )  # fmt: skip
