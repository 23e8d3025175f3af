"""What a model cannot take: ids beyond its vocabulary, sequences beyond its positions."""

from __future__ import annotations

import logging
import re
from typing import Any

from torch import Tensor, nn

_POSITION_NAME = re.compile(r"(^|[._])(wpe|pos|positions?)([._]|$)")
_TOWER = re.compile(r"vision|visual|image|audio|speech")  # whose positions are not those of tokens

logger = logging.getLogger(__name__)


def vocabulary_size(model: Any) -> int:
    """How many token ids a model can read and score.

    Args:
        model: a causal LM of transformers, or a wrapper around one.

    Returns:
        Rows of the input embedding, or of the output embedding where those are fewer.
    """
    weights = (model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    # ZeRO-3 leaves an empty tensor and keeps the real shape aside.
    return min(int(getattr(weight, "ds_shape", weight.shape)[0]) for weight in weights)


def learned_positions(model: nn.Module) -> int | None:
    """Positions of a model that looks them up in a table (GPT-2, OPT, BioGPT, GPT-J, CTRL, ...).

    Args:
        model: a causal LM of transformers, or a wrapper around one.

    Returns:
        Their number; None for positions that are computed (most rotary ones, ALiBi), which have no
        such end.
    """
    configured = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    counts = []
    for path, module in model.named_modules():
        if _TOWER.search(path):
            continue
        if isinstance(module, nn.Embedding) and _POSITION_NAME.search(path):
            # Some count from behind the padding index.
            before = 0 if module.padding_idx is None else module.padding_idx + 1
            counts.append(module.num_embeddings - before)
        # Tables that are not learned are buffers or, in CTRL, plain attributes.
        for name, tensor in (*module.named_buffers(recurse=False), *vars(module).items()):
            if isinstance(tensor, Tensor) and tensor.ndim == 2 and _POSITION_NAME.search(name):
                counts += [configured] if len(tensor) == configured else []
    if not counts:
        return None
    # Some embeddings have rows of their own in front, OPT's for one: those the config leaves out.
    return min(*counts, configured or counts[0])


def bounded_length(max_length: int, model: nn.Module) -> int:
    """`max_length`, or the model's learned positions where these are fewer; says so.

    Args:
        max_length: tokens of prompt + answer.
        model: as in `learned_positions`.

    Returns:
        The smaller of both.
    """
    positions = learned_positions(model)
    if positions is None or max_length <= positions:
        return max_length
    logger.warning(
        "max_length=%d is more than the %d positions that the model has: %d is used",
        max_length,
        positions,
        positions,
    )
    return positions
