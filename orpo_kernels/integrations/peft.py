"""PEFT inside the fused head: which copy of the head is active, and a LoRA on it as a rank-r term.

A LoRA on the head adds `s B A dropout(h)` to the logits. That is `hidden_r @ weight_r.T` with
`hidden_r = s A dropout(h)` (..., r) and `weight_r = B` (V, r): `linear_logps` takes the pair as
`low_rank`, so the head is never merged and A and B get their exact gradients.

PEFT is looked up, never imported: where nobody imported it, no module can be one of its own.
"""

import sys
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def _loaded(path: str) -> Any:
    """`peft.<path>` when that module was imported by somebody, else None."""
    return sys.modules.get(f"peft.{path}")


def base_model(model: nn.Module) -> nn.Module:
    """The model inside a `PeftModel`; any other module as it is.

    Raises:
        NotImplementedError: prompt-learning adapter (its virtual tokens shift the positions), or
            one that kept the model's forward when it was put on, and calls it past the fused head.
    """
    module = _loaded("peft_model")
    if module is None or not isinstance(model, module.PeftModel):
        return model
    for name, config in model.peft_config.items():
        if config.is_prompt_learning:
            raise NotImplementedError(
                f"adapter {name!r} is {type(config).__name__}: prompt-learning adapters put "
                "virtual tokens into the sequence and are not supported by the fused head; use "
                "LoRA, or train this adapter on the model's own logits"
            )
    base: nn.Module = model.get_base_model()
    kept = vars(model.base_model).get("forward")
    if isinstance(kept, MethodType) and kept.__self__ is base:
        raise NotImplementedError(
            f"{type(model.base_model).__name__} kept the forward that {type(base).__name__} had "
            "when the adapter was put on, and would call it past the fused head, for the model's "
            "own loss: fuse the model first and put the adapter on it then, or use LoRA"
        )
    return base


def active_copy(head: nn.Module) -> nn.Module:
    """The copy of the head that a `ModulesToSaveWrapper` runs now; any other module as it is.

    Raises:
        NotImplementedError: another of PEFT's training wrappers (trainable tokens).
    """
    module = _loaded("utils.other")
    if module is None or not isinstance(head, module.AuxiliaryTrainingWrapper):
        return head
    if not isinstance(head, module.ModulesToSaveWrapper):
        raise NotImplementedError(
            f"the output head is wrapped in PEFT's {type(head).__name__}, which rebuilds the "
            'weight in every call; train the head with modules_to_save=["lm_head"] or a LoRA on it'
        )
    adapters = head.active_adapters
    if head.disable_adapters or not adapters or adapters[0] not in head.modules_to_save:
        original: nn.Module = head.original_module
        return original
    copy: nn.Module = head.modules_to_save[adapters[0]]
    return copy


def is_tuner_layer(head: nn.Module) -> bool:
    """Whether `head` is a layer of one of PEFT's tuners, of any kind."""
    module = _loaded("tuners.tuners_utils")
    return module is not None and isinstance(head, module.BaseTunerLayer)


def lora_adapters(head: Any) -> tuple[str, ...]:
    """Names of the LoRA adapters that add to the logits now: not the merged or disabled ones.

    Raises:
        NotImplementedError: a tuner other than plain LoRA (DoRA and other variants included).
    """
    if type(head) is not _loaded("tuners.lora.layer").Linear:
        raise NotImplementedError(
            f"the output head is a {type(head).__module__}.{type(head).__qualname__}: of PEFT's "
            "layers the fused head supports plain LoRA on an unquantised nn.Linear; use "
            'LoraConfig(...) or modules_to_save=["lm_head"] for the head'
        )
    if head.disable_adapters:
        if head.merged:  # as PEFT's own forward does
            head.unmerge()
        return ()
    if head.merged:
        return ()
    active = tuple(name for name in head.active_adapters if name in head.lora_A)
    for name in active:
        if name in head.lora_variant:
            raise NotImplementedError(
                f"LoRA adapter {name!r} on the output head is a "
                f"{type(head.lora_variant[name]).__name__}: only plain LoRA is a rank-r term of "
                "the logits; drop use_dora and other variants, or do not target the head"
            )
    return active


def lora_terms(
    head: Any, adapters: tuple[str, ...], hidden: Tensor
) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
    """What the adapters add to the logits of `hidden` (..., H).

    Returns:
        `(hidden_r (..., r), weight_r (V, r))`, ranks of all adapters side by side, and the sum of
        their biases (V,); None where there is none.
    """
    hiddens, weights, bias = [], [], None
    for name in adapters:
        lora_a, lora_b, scaling = head.lora_A[name], head.lora_B[name], head.scaling[name]
        cast = hidden.to(lora_a.weight.dtype) if head.cast_input_dtype_enabled else hidden
        hiddens.append(lora_a(head.lora_dropout[name](cast)) * scaling)
        weights.append(lora_b.weight)
        if lora_b.bias is not None:
            bias = lora_b.bias * scaling + (0.0 if bias is None else bias)
    if not adapters:
        return None, None
    with torch.autocast(hidden.device.type, enabled=False):  # it joins no tensors of another dtype
        return (torch.cat(hiddens, dim=-1), torch.cat(weights, dim=-1)), bias
