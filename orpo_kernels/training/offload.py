"""Inputs of checkpointed layers in the host's memory, as transformers does it with torch's hooks.

With checkpointing a layer keeps its input, S tokens of 2 H bytes (4 H in float32), from its forward
to its backward. Offloaded it is copied to pinned memory of the host and back, on the stream that
computes: L S 2 H bytes each way, which is also what the GPU holds less.
"""

from __future__ import annotations

import inspect
from typing import Any

import transformers
from transformers import PreTrainedModel

NOT_OF_TORCH = ("every_n_layers", "offload")
"""Options of checkpointing that transformers takes out before torch sees the others."""

_KWARGS = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")  # old name, new name


def set_offload(args: Any) -> None:
    """Ask for the offload, under whichever names this transformers reads.

    Args:
        args: arguments of the run, complete; changed.

    Raises:
        ValueError: without checkpointing there is no input to move.
        NotImplementedError: transformers does not have it.
    """
    if not args.gradient_checkpointing:
        raise ValueError(
            "activation_offload moves the inputs of checkpointed layers, and gradient_checkpointing"
            " is off: set it to true, or activation_offload to false"
        )
    model: Any = PreTrainedModel
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    if "offload" not in inspect.signature(enable).parameters:
        raise NotImplementedError(
            "activation_offload needs a transformers whose checkpointing has `offload`, as that of "
            f"5.23; this is {transformers.__version__}"
        )
    for name in _KWARGS:
        if hasattr(args, name):
            setattr(args, name, {**(getattr(args, name) or {}), "offload": True})


def refuse_offload_on_cpu(args: Any) -> None:
    """Refuse a run whose activations are in the host's memory already.

    Args:
        args: arguments of the run.

    Raises:
        ValueError: it is one.
    """
    if args.activation_offload and args.device.type == "cpu":
        raise ValueError(
            "activation_offload moves activations from a GPU to the host, and this run is on the "
            "CPU: leave it out"
        )


def of_torch(kwargs: Any) -> dict[str, Any] | None:
    """What of the options of checkpointing is for `torch.utils.checkpoint`."""
    if kwargs is None:
        return None
    return {name: value for name, value in kwargs.items() if name not in NOT_OF_TORCH}
