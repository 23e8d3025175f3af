"""What the attention of a model is told about rows of several sequences.

Each kind of attention layer of transformers takes its mask in its own form, and as one mask or as a
dictionary with one for each type of layer. Which types there are, and how far they see, stands in
the config; `layout_check` compares what comes of it with the padded batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from orpo_kernels.layout import BatchLayout, Rows, sees, visible

DENSE = ("sdpa", "eager")  # compute every entry of a mask
FLEX = "flex_attention"

_TYPES = {
    "full_attention": (),
    "sliding_attention": ("sliding_window",),
    "chunked_attention": ("attention_chunk_size",),
}
"""The types of attention layers whose masks are known, and where the config keeps their reach."""

REACHES = ("sliding_window", "attention_chunk_size")

_OTHER_REACHES = (
    "window_size", "attention_window", "attention_window_size", "local_attention",
    "local_attention_window_len", "index_topk", "index_topk_blocks", "block_size",
)  # fmt: skip
"""Names of reaches that layers apply by themselves, by the place in the row."""

_MLP_SHARE = 2.0  # of H: L at which masked attention costs as much as a layer's products, on a CPU


def text_config(decoder: nn.Module) -> Any:
    """The config of the language model that `decoder` is."""
    return decoder.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]


def attention_of(decoder: nn.Module) -> str:
    """How the layers attend: "sdpa", "eager", "flex_attention", or a flash attention's name."""
    return str(text_config(decoder)._attn_implementation)


def attention_scale(decoder: nn.Module) -> float | None:
    """See `layout.lay_out`."""
    if attention_of(decoder) not in DENSE:
        return None
    return _MLP_SHARE * float(text_config(decoder).hidden_size)


def refuse_unless_known(decoder: nn.Module, name: str, layout: BatchLayout) -> None:
    """Refuse, by name, a model whose layers carry more from token to token than a mask shows.

    Args:
        decoder: computes hidden states.
        name: of the model, for the message.
        layout: asked for.

    Raises:
        NotImplementedError: recurrent, convolutional, compressed or other layers than attention;
            ALiBi; an attention that takes no mask.
    """
    config, attention = text_config(decoder), attention_of(decoder)
    remedy = "; set batch_layout='padded' for this model"
    others = sorted(set(getattr(config, "layer_types", None) or ()) - set(_TYPES))
    if getattr(decoder, "_is_stateful", False) or others:
        kind = f"layers of the types {others}" if others else "recurrent layers"
        raise NotImplementedError(
            f"{name} has {kind}, which carry a state through the whole row, past the end of a "
            f"sequence{remedy}"
        )
    own = [name for name in _OTHER_REACHES if getattr(config, name, None)]
    if own:
        raise NotImplementedError(
            f"{name} has {own[0]}={getattr(config, own[0])!r}: its layers limit by themselves what "
            f"they see, by the place in the row{remedy}"
        )
    if getattr(config, "alibi", False) or config.model_type in ("bloom", "mpt"):
        raise NotImplementedError(
            f"{name} has ALiBi: its bias is a distance in the row, whatever position_ids say, and "
            f"is wrong for any but the first sequence{remedy}"
        )
    if attention in (*DENSE, FLEX):
        return
    if "flash" not in attention:
        raise NotImplementedError(
            f"{name} attends by {attention!r}, of whose masks nothing is known: load it with "
            "attn_implementation='sdpa' or 'flex_attention', or set batch_layout='padded'"
        )
    if layout.name == "shared_prompt":
        raise NotImplementedError(
            f"{name} attends by {attention!r}, which takes no mask, so that a rejected answer "
            "would see the chosen one: set batch_layout='packed', or load the model with "
            "attn_implementation='flex_attention' (a GPU) or 'sdpa'"
        )


def attention_arguments(decoder: nn.Module, rows: Rows, dtype: torch.dtype) -> dict[str, Any]:
    """What the forward of `decoder` takes to attend within the sequences of `rows`.

    Args:
        decoder: one that `refuse_unless_known` has let pass.
        rows: of a batch.
        dtype: of the embeddings, which masks that are added have.

    Returns:
        `attention_mask`: (R, 1, L, L) bool (sdpa) or `dtype` (eager), a FlexAttention `BlockMask`,
        or a dictionary of them by the type of the layer; or None and the limits of the sequences,
        for a flash attention.
    """
    attention = attention_of(decoder)
    if attention not in (*DENSE, FLEX):
        return _limits(rows)
    config = text_config(decoder)
    forms: dict[str, Callable[..., Any]] = {
        "sdpa": _bool_mask,
        "eager": partial(_added_mask, dtype=dtype),
        FLEX: _block_mask,
    }
    masks = {each: forms[attention](rows, *_reach(config, each)) for each in layer_types(config)}
    mask: Any = masks if len(masks) > 1 else next(iter(masks.values()))
    return {"attention_mask": mask}


def layer_types(config: Any) -> list[str]:
    """The types of attention layers, sorted; a config without them has layers of one type."""
    named = getattr(config, "layer_types", None)
    if named:
        return sorted(set(named))
    for kind in ("sliding_attention", "chunked_attention"):
        if any(getattr(config, name, None) is not None for name in _TYPES[kind]):
            return [kind]
    return ["full_attention"]


def _reach(config: Any, layer_type: str) -> tuple[int | None, int | None]:
    """Window and chunk of a type of layers."""
    reach = {name: getattr(config, name, None) for name in _TYPES[layer_type]}
    return reach.get("sliding_window"), reach.get("attention_chunk_size")


def _bool_mask(rows: Rows, window: int | None, chunk: int | None) -> Tensor:
    return visible(rows, window, chunk)[:, None]


def _added_mask(rows: Rows, window: int | None, chunk: int | None, dtype: torch.dtype) -> Tensor:
    hidden = ~visible(rows, window, chunk)[:, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
        hidden, torch.finfo(dtype).min
    )


def _block_mask(rows: Rows, window: int | None, chunk: int | None) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    bare = rows._replace(starts=(), unshared=0)  # numbers that a compiler would compile for

    def mask_mod(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return sees(bare, row, q, k, window, chunk)

    count, length = rows.tokens.shape
    device = rows.tokens.device
    # Compiled, the (L, L) entries are never written down.
    return create_block_mask(
        mask_mod, count, None, length, length, device=str(device), _compile=device.type == "cuda"
    )


def _limits(rows: Rows) -> dict[str, Any]:
    starts = torch.tensor(rows.starts, dtype=torch.int32, device="cpu")
    longest = int(starts.diff().max())
    starts = starts.to(rows.tokens.device, non_blocking=True)
    return {
        "attention_mask": None,
        "cu_seq_lens_q": starts,
        "cu_seq_lens_k": starts,
        "max_length_q": longest,
        "max_length_k": longest,
    }
