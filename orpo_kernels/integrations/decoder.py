"""A fused call whose decoder computes rows of several sequences, and nothing else knows of it.

The causal LM is called with the padded batch (B, T) as ever. Its decoder, the part that makes
hidden states, is overridden on the instance: it gets the tokens in rows (R, L), with their
positions and the mask of their sequences (`orpo_kernels.layout`), and what comes out is put back to
(B, T) before the head, the auxiliary loss of a mixture of experts or anything else sees it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from orpo_kernels.constants import IGNORE_INDEX
from orpo_kernels.integrations.attention import (
    DENSE,
    FLEX,
    attention_arguments,
    attention_of,
    attention_scale,
    refuse_unless_known,
)
from orpo_kernels.integrations.override import THREAD, ForwardOverride
from orpo_kernels.layout import BatchLayout, Rows, lay_out

_ON_PADDING = (  # torch takes no longer one than 254 characters for a device
    "labels (or nll_labels) score tokens that follow padding (attention_mask 0), of which "
    "batch_layout='packed' and 'shared_prompt' compute nothing: set labels to -100 on padding, or "
    "batch_layout='padded'"
)
_OWN = ("attention_mask", "position_ids", "use_cache", "past_key_values", "cache_position")


def decoder_of(model: nn.Module) -> nn.Module:
    """What computes the hidden states of a causal LM, without its head."""
    found: Any = model.get_decoder()  # type: ignore[operator]
    head = model.get_output_embeddings()  # type: ignore[operator]
    if found is model or found is head:  # Llama 4, whose name for it transformers does not look
        found = getattr(model, "model", model)  # for; ModernBERT's decoder, whose head it finds
    decoder: nn.Module = getattr(found, "_fsdp_wrapped_module", found)
    if decoder is model:
        raise NotImplementedError(
            f"{type(model).__name__} has no decoder apart from its head (get_decoder() returns the "
            "model): set batch_layout='padded'"
        )
    return decoder


class RowsCall:
    """The rows of one fused call of `model`, with the arguments (B, T) it is called with.

    `terms` say what the layout saved, see `fuse_head`.

    Raises:
        NotImplementedError: a model that `refuse_unless_known` refuses, arguments that are not of
            tokens (images), a call without `input_ids`.
        ValueError: as `lay_out`.
    """

    def __init__(
        self, model: nn.Module, layout: BatchLayout, arguments: Mapping[str, Any], shape: torch.Size
    ) -> None:
        self.decoder = decoder_of(model)
        self.name = type(model).__name__
        refuse_unless_known(self.decoder, self.name, layout)
        per_token = _per_token(arguments, shape)
        self.rows = laid_out(self.decoder, layout, per_token, arguments.get("attention_mask"))
        self.terms = _terms(self.rows)
        self.is_done = False

    def forward(self, own: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        """Compute the rows.

        Args:
            own: the forward of the decoder.
            arguments: what it is called with, by name.

        Returns:
            Its output, hidden states (B, T, H) with zeros on padding.
        """
        self._refuse_unless_plain(arguments)
        output = own(**in_rows(self.decoder, self.rows, arguments))
        self.is_done = True
        return in_batch(self.rows, output)

    def refuse_unless_computed(self, *label_sets: Tensor | None) -> None:
        """Refuse labels that are scored from padding, whose hidden states no row has.

        Args:
            *label_sets: (B, T), shifted; None or of another shape: left alone.

        Raises:
            ValueError: there is one. On CUDA devices an assertion of torch instead, which does not
                make the host wait.
        """
        for labels in label_sets:
            if labels is None or labels.shape != self.rows.real.shape:
                continue
            real = self.rows.real.to(labels.device)
            computed = (real | (labels == IGNORE_INDEX)).all()
            if computed.is_cuda:
                torch._assert_async(computed, _ON_PADDING)
            elif not computed:
                raise ValueError(_ON_PADDING)

    def token_means(self, means: Tensor, of_padding: Tensor | float) -> Tensor:
        """Means over tokens, of means (B,) over T - 1 positions, padding's being `of_padding`."""
        real = self.rows.real[:, :-1].sum(1).to(means.device)
        total = means * (self.rows.real.shape[1] - 1)
        padding = self.rows.real.shape[1] - 1 - real
        return (total - padding * of_padding) / real.clamp(min=1)

    def _refuse_unless_plain(self, arguments: Mapping[str, Any]) -> None:
        for name in ("past_key_values", "output_attentions"):
            if arguments.get(name) not in (None, False):
                raise NotImplementedError(
                    f"{name} is of one sequence in a row, which batch_layout='packed' and "
                    "'shared_prompt' do not have; leave it out (use_cache=False, for models that "
                    "make it themselves), or set batch_layout='padded'"
                )


class DecoderOverride(ForwardOverride):
    """The forward of a decoder: this thread's fused call in rows, or the decoder's own."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the decoder."""
        module = self.module
        for call in reversed(THREAD.calls):
            if call.in_rows is not None and call.in_rows.decoder is module:
                if args:
                    signature = inspect.signature(self.__wrapped__)
                    kwargs = {**signature.bind_partial(*args).arguments, **kwargs}
                return call.in_rows.forward(self.own, kwargs)
        return self.own(*args, **kwargs)


def in_rows(decoder: nn.Module, rows: Rows, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a decoder's forward, its tokens (B, T) in the places (R, L) of `rows`.

    Raises:
        NotImplementedError: a tensor that is not of tokens.
    """
    shape, at = rows.real.shape, rows.tokens
    moved: dict[str, Any] = {"use_cache": False, "position_ids": rows.positions}
    for name, value in arguments.items():
        if name in _OWN:
            continue
        if isinstance(value, Tensor) and value.ndim:
            if value.shape[:2] != shape:
                raise NotImplementedError(
                    f"{name} {tuple(value.shape)} has no value for each of the tokens "
                    f"{tuple(shape)}, so that it cannot follow them to another place in a row: set "
                    "batch_layout='padded'"
                )
            value = value.flatten(0, 1)[at]
        moved[name] = value
    positions = arguments.get("position_ids")
    if positions is not None:  # (B, T), or several of them
        positions = positions.expand(*positions.shape[:-2], *shape)
        moved["position_ids"] = positions.flatten(-2)[..., at]
    weight = decoder.get_input_embeddings().weight  # type: ignore[operator]
    embedded = moved.get("inputs_embeds")
    dtype = weight.dtype if embedded is None else embedded.dtype
    return moved | attention_arguments(decoder, rows, dtype)


def in_batch(rows: Rows, output: Any) -> Any:
    """The output of a decoder with its tensors (R, L, ...) and (R * L, ...) of the tokens (B, T).

    Raises:
        NotImplementedError: a tensor that is neither.
    """
    if isinstance(output, ModelOutput):
        return type(output)(**{name: in_batch(rows, value) for name, value in output.items()})
    if isinstance(output, tuple | list):
        return type(output)(in_batch(rows, value) for value in output)
    if not isinstance(output, Tensor) or output.ndim == 0:
        return output
    if output.shape[:2] == rows.tokens.shape:
        found = output.flatten(0, 1).index_select(0, rows.places.to(output.device))
        found = found.view(*rows.real.shape, *found.shape[1:])
        padding = ~rows.real.to(output.device)
        return found.masked_fill_(padding.view(*padding.shape, *[1] * (found.ndim - 2)), 0)
    if output.shape[0] == rows.computed:
        return output.index_select(0, rows.places.to(output.device))
    raise NotImplementedError(
        f"the decoder returned a tensor {tuple(output.shape)} that is not of the places "
        f"{tuple(rows.tokens.shape)} it was given: set batch_layout='padded'"
    )


def _terms(rows: Rows) -> dict[str, Tensor]:
    """What the layout saved: (1,) int64 by name, which gathering can concatenate."""
    counts = {
        "computed_tokens": rows.computed,  # places of all rows
        "padded_tokens": rows.padded,  # of the padded batch
        "unshared_pairs": rows.unshared,
    }
    device = rows.tokens.device
    return {
        name: torch.full((1,), count, dtype=torch.int64, device=device)
        for name, count in counts.items()
    }


def laid_out(
    decoder: nn.Module, layout: BatchLayout, per_token: list[Tensor], attention_mask: Tensor | None
) -> Rows:
    """`lay_out` as the attention of `decoder` takes it on this device."""
    attention = attention_of(decoder)
    multiple_of = 1
    if per_token[0].device.type != "cpu":  # whole vectors of a mask, whole blocks of FlexAttention
        multiple_of = 128 if attention == FLEX else 8
    flat = attention not in (*DENSE, FLEX)  # the limit of a row would save nothing
    return lay_out(
        BatchLayout(layout.name) if flat else layout,
        per_token,
        attention_mask,
        attention_scale=attention_scale(decoder),
        multiple_of=1 if flat else multiple_of,
    )


def _per_token(arguments: Mapping[str, Any], shape: torch.Size) -> list[Tensor]:
    """Every tensor (B, T) among the arguments of a call but the mask."""
    if arguments.get("input_ids") is None:
        raise NotImplementedError(
            "batch_layout='packed' and 'shared_prompt' need input_ids, from which they see what "
            "the sequences of a pair share; set batch_layout='padded' for inputs_embeds"
        )
    found = []
    for name, value in arguments.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            continue
        if value.shape != shape:
            raise NotImplementedError(
                f"{name} {tuple(value.shape)} is not of tokens {tuple(shape)}: images and whatever "
                "else belongs to a sequence as a whole need batch_layout='padded'"
            )
        if name != "attention_mask":
            found.append(value)
    return found
