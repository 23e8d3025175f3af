"""What one `fuse_head` asked for, and what its checks have found out about the model so far."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from orpo_kernels.integrations.attention import attention_of
from orpo_kernels.integrations.call import FuseOptions
from orpo_kernels.integrations.head import LogitTransform, OutputHead, logit_transforms


class Fusing:
    """What one `fuse_head` asked for, and how its self-check read the model's logit transform."""

    def __init__(self, options: FuseOptions, transform: LogitTransform | None) -> None:
        self.options = options
        self.transform = transform  # None: to be found by the self-check
        self._checked: tuple[Any, ...] | None = None
        self._decoder: tuple[Any, ...] | None = None  # that computes rows as it should

    def settled(self, model: nn.Module, head: OutputHead) -> LogitTransform | None:
        """The transform that holds for `head` as it is now; None: the self-check has to find it."""
        if not self.options.check:
            if not torch.compiler.is_compiling():  # the config may have changed
                self.transform = logit_transforms(model)[0]
            return self.transform
        if self._checked is None:
            return None
        module, parts, around = self._checked
        if module() is not head.module or parts != (head.linear.out_features, head.adapters):
            return None
        if not torch.compiler.is_compiling() and around != _around(model, head):
            return None
        return self.transform

    def settle(self, model: nn.Module, head: OutputHead, transform: LogitTransform) -> None:
        """Note that the self-check found `transform` for `head` as it is now."""
        self.transform = transform
        parts = (head.linear.out_features, head.adapters)
        self._checked = (weakref.ref(head.module), parts, _around(model, head))

    def computes_rows(self, decoder: nn.Module) -> bool:
        """Whether `decoder`, as it attends now, has been found to compute rows as it should."""
        known = self._decoder
        return known is not None and known[0]() is decoder and known[1] == attention_of(decoder)

    def settle_decoder(self, decoder: nn.Module) -> None:
        """Note that it does."""
        self._decoder = (weakref.ref(decoder), attention_of(decoder))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_checked": None, "_decoder": None}  # another model's modules


def _around(model: nn.Module, head: OutputHead) -> tuple[Any, ...]:
    """What may change the logits of `head` without `head` being another: the config, and hooks."""
    return tuple(logit_transforms(model)), tuple(head.module._forward_hooks)
