"""A head that is fused for the calls of one trainer, and for nobody else's.

For trainers that call the model themselves and compute their loss from log-probs. The model is not
fused between their calls: it generates, is saved, and is called by others as it ever was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import nn

from orpo_kernels.integrations.transformers import FusedHead, causal_lm_of, fuse_head

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from orpo_kernels.layout import BatchLayout


class FuseKeywords(TypedDict, total=False):
    """The keywords of `fuse_head`, which documents them, that do not change what is computed."""

    workspace_bytes: int | None
    gradient: str
    eps: float
    compute_dtype: torch.dtype | None
    mean_logits: bool
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
