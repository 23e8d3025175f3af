"""What stands between a causal LM's last hidden states and its logits: the head and the transform.

    z = softcap(scale * (hidden @ weight.T + bias + low-rank term))

The head is looked up in every call, so that adapters switched on or off and resized vocabularies
need no second fusing.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from orpo_kernels.integrations import narrow, peft

_MULTIPLIERS = ("logit_scale", "output_multiplier", "lm_head_multiplier")
_SCALINGS = ("logits_scaling",)
# To which power logits are multiplied by it: MiniCPM3 has applied it to the hidden states already.
_POWERS = {"granite": -1, "hyperclovax": 1, "minicpm3": 0}
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


class LogitTransform(NamedTuple):
    """`softcap * tanh(scale * z / softcap)`; without a softcap `scale * z`."""

    logit_scale: float = 1.0
    softcap: float | None = None


class HeadTerms(NamedTuple):
    """One call of the head: `weight` (V, H), `bias` (V,), `low_rank` ((..., r), (V, r))."""

    weight: Tensor
    bias: Tensor | None
    low_rank: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class OutputHead:
    """The output head of a model as it is now: `module` is called, `linear` holds the weight."""

    module: nn.Module
    linear: nn.Linear
    adapters: tuple[str, ...] = ()

    def as_multiplied(self, hidden: Tensor) -> Tensor:
        """Hidden states in the dtype that a product with the head's own weight has."""
        own = narrow.own_dtype(self.linear)
        kept_so = own == self.linear.weight.dtype
        if kept_so or torch.is_autocast_enabled(self.linear.weight.device.type):
            return hidden
        return hidden.to(torch.promote_types(hidden.dtype, own))

    def terms(self, hidden: Tensor) -> HeadTerms:
        """The tensors whose logits the head returns for `hidden` (..., H)."""
        weight: Tensor = self.linear.weight
        bias: Tensor | None = self.linear.bias
        low_rank = None
        if type(weight) not in (nn.Parameter, Tensor) or weight.is_meta:
            raise NotImplementedError(
                f"the weight of the output head is a {type(weight).__name__} on {weight.device} "
                "while the head runs; the fused head needs the plain tensor: keep the head "
                "unquantised, not offloaded, and out of the tensor-parallel plan"
            )
        if self.adapters:
            low_rank, extra = peft.lora_terms(self.module, self.adapters, hidden)
            if extra is not None:
                bias = extra if bias is None else bias + extra
        return HeadTerms(weight, bias, low_rank)


def resolve_head(model: nn.Module) -> OutputHead:
    """The head that `model` would call now.

    Raises:
        NotImplementedError: no output head, or one whose logits are not `hidden @ weight.T + bias`
            with an unquantised weight (plus plain LoRA).
    """
    name = type(model).__name__
    getter = getattr(model, "get_output_embeddings", None)
    module = None if getter is None else getter()
    if module is None:
        raise NotImplementedError(
            f"{name} has no output head: get_output_embeddings() is missing or returns None; "
            "load the model with AutoModelForCausalLM"
        )
    module = peft.active_copy(getattr(module, "_fsdp_wrapped_module", module))
    adapters: tuple[str, ...] = ()
    linear: Any = module
    if peft.is_tuner_layer(module):
        linear = linear.get_base_layer()
        _refuse_unless_linear(linear, name)
        adapters = peft.lora_adapters(module)
    _refuse_unless_linear(linear, name)
    if linear.weight.requires_grad or adapters:  # since it was narrowed
        narrow.widen(linear)
    return OutputHead(module, linear, adapters)


def _refuse_unless_linear(linear: nn.Module, model_name: str) -> None:
    kind = f"{type(linear).__module__}.{type(linear).__qualname__}"
    if not isinstance(linear, nn.Linear):
        raise NotImplementedError(
            f"the output head of {model_name} is a {kind}, expected torch.nn.Linear; "
            "train this model on its own logits"
        )
    if not linear.weight.is_floating_point() or hasattr(linear.weight, "quant_state"):
        raise NotImplementedError(
            f"the output head of {model_name} is quantised ({kind}, {linear.weight.dtype}); keep "
            'it unquantised: llm_int8_skip_modules=["lm_head"], or what your quantiser calls it'
        )


def logit_transforms(model: nn.Module) -> list[LogitTransform]:
    """Possible readings of the config's logit transform, the likeliest first.

    A key does not say how it is used (Granite divides by `logits_scaling`, HyperCLOVA X multiplies)
    nor whether it is (Gemma 3's multimodal class ignores its text model's softcap): of a model that
    is not known the own logits decide, see `selfcheck`.
    """
    config: Any = getattr(model, "config", None)
    nested = hasattr(config, "get_text_config")
    text: Any = config.get_text_config(decoder=True) if nested else None
    sources = (model, text, config)

    def read(keys: tuple[str, ...]) -> float | None:
        values = (getattr(source, key, None) for source in sources for key in keys)
        numbers = (v for v in values if isinstance(v, int | float) and not isinstance(v, bool))
        return next((float(number) for number in numbers if number), None)

    scale, scaling, softcap = read(_MULTIPLIERS) or 1.0, read(_SCALINGS) or 1.0, read(_SOFTCAPS)
    likeliest = _POWERS.get(getattr(text, "model_type", ""), -1)
    readings = [LogitTransform(scale * scaling**power, softcap) for power in (likeliest, -1, 1)]
    return list(dict.fromkeys((*readings, LogitTransform())))
