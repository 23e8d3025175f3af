"""Who owns the head: which packages have put functions of theirs in the place of a model's own.

Liger, Cut Cross Entropy, Unsloth, Axolotl and TRL replace forwards of model classes, of single
models and of heads, some of them so that no head is called any more. What a function is called does
not tell whose it is, as wrappers copy names; the module it was compiled in does. Nothing is
imported for an answer: where nobody has imported a package, it has patched nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

from torch import nn

PACKAGES = {
    "axolotl": "Axolotl",
    "cut_cross_entropy": "Cut Cross Entropy",
    "liger_kernel": "Liger",
    "llamafactory": "LLaMA-Factory",
    "orpo_kernels": "orpo_kernels",
    "trl": "TRL",
    "unsloth": "Unsloth",
}
"""Top-level modules to what people call them."""

SWITCHES = ("AXOLOTL_", "LIGER_", "ORPO_KERNELS_", "TRITON_", "TRL_", "UNSLOTH_")
"""Beginnings of environment variables that change what a patch does."""

_MODELS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")


class Owner(NamedTuple):
    """Who has replaced what: `place`, `LlamaForCausalLM.forward` say; `function`, where it is."""

    name: str
    place: str
    function: str

    def __str__(self) -> str:
        return f"{self.name} ({self.place} is {self.function})"


def head_owners(model: nn.Module) -> tuple[Owner, ...]:
    """Who owns the forward of `model`, of its output head, and its loss.

    Args:
        model: a causal LM of transformers, unwrapped.

    Returns:
        One for each replaced function, outermost first; empty where everything is the model's own.
    """
    kind = type(model)
    places: list[tuple[str, Any]] = [
        (f"{kind.__name__}.forward of this model", vars(model).get("forward")),
        (f"{kind.__name__}.forward", kind.forward),
        (f"{kind.__name__}.loss_function", vars(model).get("_loss_function")),
    ]
    getter = getattr(model, "get_output_embeddings", None)
    head = None if getter is None else getter()
    if isinstance(head, nn.Module):
        places.append((f"forward of its {type(head).__name__} head", vars(head).get("forward")))
    return tuple(owner for place, function in places for owner in _owners(place, function))


def class_owners() -> tuple[Owner, ...]:
    """Who has replaced forwards of the model classes, and methods of TRL's ORPOTrainer, so far."""
    places: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models.") and ".modeling_" in name:
            for key, value in list(vars(module).items()):
                if isinstance(value, type) and key.endswith(_MODELS):
                    places[f"{key}.forward"] = getattr(value, "forward", None)
    trainer = vars(sys.modules.get("trl.experimental.orpo", sys)).get("ORPOTrainer")
    for method in ("concatenated_forward", "compute_loss"):
        function = getattr(trainer, method, None)
        if _top(function) != "trl":
            places[f"trl.experimental.orpo.ORPOTrainer.{method}"] = function
    return tuple(owner for place, function in places.items() for owner in _owners(place, function))


def switches() -> dict[str, str]:
    """Environment variables that are set and change what somebody's patch does."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(SWITCHES)}


def _owners(place: str, function: Any) -> Iterator[Owner]:
    for each in _layers(function):
        top = _top(each)
        # Unsloth compiles classes into modules named unsloth_compiled_module_llama, and so on.
        top = "unsloth" if top.lower().startswith("unsloth") else top
        if top in PACKAGES:
            path = f"{_module(each)}.{getattr(each, '__qualname__', type(each).__qualname__)}"
            yield Owner(PACKAGES[top], place, path)


def _layers(function: Any) -> Iterator[Any]:
    """A function and, below it, what it says it wraps."""
    seen: set[int] = set()
    while function is not None and id(function) not in seen:
        seen.add(id(function))
        if isinstance(function, MethodType):
            function = function.__func__
            continue
        if isinstance(function, partial):
            function = function.func
            continue
        yield function
        function = getattr(function, "__wrapped__", None)


def _module(function: Callable[..., Any]) -> str:
    names = getattr(function, "__globals__", None)
    return str(names["__name__"] if names else type(function).__module__)


def _top(function: Any) -> str:
    if isinstance(function, MethodType):
        function = function.__func__
    return "" if function is None else _module(function).split(".")[0]
