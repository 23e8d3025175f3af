"""A head that is fused for the calls of one trainer, and for nobody else's.

For trainers that call the model themselves and compute their loss from log-probs. The model is not
fused between their calls: it generates, is saved, and is called by others as it ever was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from orpo_kernels.constants import IGNORE_INDEX
from orpo_kernels.integrations.transformers import FusedHead, causal_lm_of, fuse_head

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from orpo_kernels.layout import BatchLayout

_CALLS = "_orpo_kernels_calls"


class FuseKeywords(TypedDict, total=False):
    """The keywords of `fuse_head`, which documents them, that do not change what is computed."""

    workspace_bytes: int | None
    gradient: str
    eps: float | None
    compute_dtype: torch.dtype | None
    mean_logits: bool | str
    check: bool
    layout: BatchLayout | str


class FusedCalls:
    """Calls models with labels, each fused for the length of the call.

    Args:
        **options: of `fuse_head`.
    """

    def __init__(self, **options: Unpack[FuseKeywords]) -> None:
        self._options = options
        self._head: FusedHead | None = None

    @classmethod
    def of(cls, trainer: Any, **options: Unpack[FuseKeywords]) -> FusedCalls:
        """Those of `trainer`, made at its first call, with the options it has then."""
        calls = trainer.__dict__.get(_CALLS)
        if calls is None:
            calls = trainer.__dict__[_CALLS] = cls(**options)
        return calls  # type: ignore[no-any-return]

    def __call__(self, model: nn.Module, **inputs: Any) -> Any:
        """The output of `model` with `token_logps` on it, see `fuse_head`.

        Args:
            model: a causal LM as its trainer has wrapped it; the self-check is made for each model
                once.
            **inputs: of the model, `labels` among them.

        Raises:
            NotImplementedError: a model whose head cannot be fused.
        """
        causal_lm = causal_lm_of(model)
        if self._head is None or self._head.model is not causal_lm:
            self._head = fuse_head(model, **self._options)
            self._head.unfuse()
        with self._head.active():
            return model(**inputs)


def scored(labels: Tensor) -> Tensor:
    """Which positions of labels (B, T), unshifted, are scored from the one before; (B, T - 1)."""
    return labels[:, 1:] != IGNORE_INDEX


def mean_logps(token_logps: Tensor, labels: Tensor) -> Tensor:
    """Mean log-prob of each row's scored tokens, for a trainer that takes every row to have one.

    Waits for the device, as those trainers do for their metrics a moment later.

    Args:
        token_logps: (B, T) of a fused call.
        labels: (B, T) unshifted; B = 2P, chosen first.

    Returns:
        (B,) float32, nats.

    Raises:
        ValueError: a row without a scored token.
    """
    counts = scored(labels).sum(1)
    empty = (counts == 0).nonzero().flatten().tolist()
    if empty:
        pairs = len(counts) // 2
        rows = ", ".join(
            f"{'chosen' if row < pairs else 'rejected'} {row % pairs}" for row in empty
        )
        raise ValueError(
            f"no token of these answers is left in a batch of {pairs} pairs: {rows}; the trainer's "
            "own loss would be NaN. Allow longer sequences, or filter long prompts and empty "
            "answers; orpo_kernels.ORPOTrainer skips such pairs and counts them"
        )
    return token_logps.sum(1) / counts


def logits_of(output: Any, logps: Tensor) -> tuple[Tensor, Tensor]:
    """What stands for the logits of both sides where a trainer only takes their mean.

    Args:
        output: of a fused call.
        logps: (2P,), of its rows.

    Returns:
        Two (P, 1, 1) float32 without graph, whose mean is that of the logits; NaN where the fusing
        was not asked for mean logits.
    """
    means = output.mean_logits
    means = torch.full_like(logps.detach(), torch.nan) if means is None else means
    chosen, rejected = means[:, None, None].chunk(2)
    return chosen, rejected
