"""Token ids without an embedding, named before the embedding fails on them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def check_token_ids(model: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Refuse ids that the input embedding of `model` does not have.

    torch's own error is an IndexError that names neither the id nor the vocabulary, and on a GPU an
    assertion that ends the process. Waits for the device: for the first call of a fused model.

    Args:
        model: a causal LM; models of several modalities are left alone, whose placeholders for
            images may lie outside the vocabulary.
        arguments: of its forward; `input_ids` (B, T) integer.

    Raises:
        ValueError: an id below 0, or not below the number of embeddings.
    """
    ids, config = arguments.get("input_ids"), getattr(model, "config", None)
    embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
    rows = getattr(embedding, "num_embeddings", None)
    several = config is not None and config.get_text_config() is not config
    if rows is None or several or not isinstance(ids, Tensor) or ids.numel() == 0:
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= rows:
        raise ValueError(
            f"input_ids must be in [0, {rows}), the vocabulary of {type(model).__name__}, got ids "
            f"from {low} to {high}; after adding tokens (a pad token, say) call "
            "model.resize_token_embeddings(len(tokenizer)), or pad with a token that is there"
        )
