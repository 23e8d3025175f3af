"""A batch of preference pairs: (P, 2, T) where it travels, (2P, T) where it is computed.

Data loaders, `accelerate` and gathering cut, join and pad batches along dimension 0. Stacked, P
chosen sequences then P rejected ones, such a cut makes chosen answers "rejected" and nothing tells
them apart. With one pair in each row, chosen before rejected, every cut is between two pairs. The
stacked layout is made inside the model, where nothing cuts any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from orpo_kernels.constants import IGNORE_INDEX


def paired(stacked: Tensor) -> Tensor:
    """(2P, ...), chosen first, as (P, 2, ...)."""
    pairs = stacked.shape[0] // 2
    return stacked.view(2, pairs, *stacked.shape[1:]).transpose(0, 1).contiguous()


def stack_pairs(pairs: Tensor) -> Tensor:
    """(P, 2, ...) as (2P, ...), chosen first."""
    return pairs.transpose(0, 1).flatten(0, 1)


def is_in_pairs(arguments: Mapping[str, Any]) -> bool:
    """Whether the `labels` among the arguments of a model are a batch of pairs, (P, 2, T).

    Raises:
        ValueError: `labels` of three dimensions, of which the second is not 2.
    """
    labels = arguments.get("labels")
    if not isinstance(labels, Tensor) or labels.ndim != 3:
        return False
    if labels.shape[1] != 2:
        raise ValueError(
            "labels of a batch of pairs must be (P, 2, T), chosen and rejected of each pair, got "
            f"{tuple(labels.shape)}; something has cut or joined the batch along dimension 1"
        )
    return True


def stack_batch(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a model with the pairs of a batch stacked.

    Args:
        arguments: of the model's forward; with `labels` (P, 2, T) a batch of pairs, whose tensors
            (P, 2, ...) become (2P, ...). With other labels they are returned as they are.

    Returns:
        The arguments.

    Raises:
        ValueError: as `is_in_pairs`.
    """
    if not is_in_pairs(arguments):
        return dict(arguments)
    shape = arguments["labels"].shape[:2]
    return {
        name: stack_pairs(value)
        if isinstance(value, Tensor) and value.shape[:2] == shape
        else value
        for name, value in arguments.items()
    }


def pair_output(results: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a fused call has of each sequence, (2P, ...), as (P, 2, ...)."""
    return {name: paired(value) for name, value in results.items()}


def refuse_rejected_nll(nll_labels: Tensor) -> None:
    """Refuse NLL labels in rejected sequences, the trace of a stacked batch that was cut.

    Args:
        nll_labels: (2P, T), chosen first.

    Raises:
        ValueError: there is one in the second half. On CUDA devices, and in compiled code, an
            assertion of torch instead, which does not make the host wait.
    """
    absent = (nll_labels[len(nll_labels) // 2 :] == IGNORE_INDEX).all()
    if absent.is_cuda or torch.compiler.is_compiling():
        torch._assert_async(absent, _CUT_SHORT)
    elif not absent:
        raise ValueError(_CUT)


_CUT = (
    "nll_labels must be -100 in the rejected sequences, the second half of a stacked batch: their "
    "NLL is not part of the loss. If the batch was P chosen then P rejected sequences once, it has "
    "been cut along dimension 0 since (dispatch_batches, split_batches): make batches (P, 2, T) "
    "with PreferenceCollator, which can be cut"
)
_CUT_SHORT = (  # torch takes no longer one than 254 characters for a device
    "orpo_kernels: nll_labels must be -100 in rejected sequences; a stacked batch was cut along "
    "dimension 0 (dispatch_batches, split_batches): make batches (P, 2, T) with PreferenceCollator"
)
