"""From what the user passes as `model` to a model that is ready to be trained, as TRL does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_kernels.integrations.bitsandbytes import keep_differentiable
from orpo_kernels.integrations.transformers import FusedHead, fuse_head
from orpo_kernels.loss import ORPOLoss
from orpo_kernels.training.config import ORPOConfig
from orpo_kernels.training.offload import of_torch

MODEL_TAGS = ["orpo", "orpo-kernels"]
"""Of what is saved and pushed, for its model card."""

_DROPOUTS = (
    "dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "attn_dropout",
)  # fmt: skip


def load_model(name: str, args: ORPOConfig) -> nn.Module:
    """Load a causal LM by hub name or path, from safetensors unless the user says otherwise.

    Args:
        name: hub name or folder.
        args: `model_init_kwargs` and `trust_remote_code` are used.

    Returns:
        The model.

    Raises:
        ValueError: a dtype that torch does not have.
    """
    options = {
        "trust_remote_code": args.trust_remote_code,
        "use_safetensors": True,
        **_init_kwargs(args),
    }
    dtype = options.get("dtype")
    if isinstance(dtype, str) and dtype != "auto":
        options["dtype"] = getattr(torch, dtype, None)
    if dtype not in (None, "auto") and not isinstance(options["dtype"], torch.dtype):
        raise ValueError(
            f"model_init_kwargs['dtype'] must be 'auto' or the name of a torch dtype, got {dtype!r}"
        )
    model: nn.Module = AutoModelForCausalLM.from_pretrained(name, **options)
    return model


def load_processing_class(model: nn.Module | None, args: ORPOConfig) -> Any:
    """Load the tokenizer that belongs to a model.

    Args:
        model: the model.
        args: `trust_remote_code`, and the `revision` of `model_init_kwargs`.

    Returns:
        The tokenizer.

    Raises:
        ValueError: the model does not know where it came from.
    """
    name = getattr(getattr(model, "config", None), "_name_or_path", "")
    if not name:
        raise ValueError(
            "processing_class is needed: the model has no name to load a tokenizer by; pass "
            "processing_class=AutoTokenizer.from_pretrained(...)"
        )
    revision = _init_kwargs(args).get("revision")
    options = {} if revision is None else {"revision": revision}
    return AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code, **options)


def set_up_model(model: nn.Module, args: ORPOConfig, peft_config: Any) -> nn.Module:
    """Add adapters, make checkpointed inputs require gradients, switch dropout off, tag the model.

    4-bit layers keep the layout that has a derivative, before anything runs the model.

    Args:
        model: causal LM, or a `PeftModel` when `peft_config` is None.
        args: arguments of the run.
        peft_config: `peft.PeftConfig` or None.

    Returns:
        The model to train.

    Raises:
        TypeError: `peft_config` is not a `PeftConfig`.
        ValueError: a `PeftModel` together with a `peft_config`; `modules_to_save` it does not have.
        NotImplementedError: an encoder-decoder model.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{type(model).__name__} is an encoder-decoder model, expected a causal language "
            "model; TRL's ORPOTrainer trains encoder-decoder models"
        )
    keep_differentiable(model)
    if peft_config is not None:
        model = _with_adapters(model, args, peft_config)
    elif args.gradient_checkpointing:
        _require_input_grads(model)
    if args.disable_dropout:
        _disable_dropout(model)
    tag: Any = getattr(model, "add_model_tags", None)
    if tag is not None:
        tag(MODEL_TAGS)
    return model


def head_fusing(model: nn.Module, args: ORPOConfig, loss: ORPOLoss) -> FusedHead:
    """How the trainer's calls of a model fuse its head, with `active()`.

    Args:
        model: the model to train.
        args: arguments of the run.
        loss: of the run.

    Returns:
        A fusing that is not in force: the model stays as it is.

    Raises:
        NotImplementedError: a head that cannot be fused.
    """
    fused = fuse_head(
        model,
        loss=loss,
        workspace_bytes=args.workspace_bytes,
        gradient=args.gradient,
        eps=args.sparse_eps,
        compute_dtype=None if args.compute_dtype is None else getattr(torch, args.compute_dtype),
        mean_logits=args.log_mean_logits,
        narrow_head=args.narrow_head,
        layout=args.layout,
    )
    fused.unfuse()
    return fused


def refuse_frozen(model: nn.Module) -> None:
    """Refuse a model of which nothing would be trained, before the first step.

    Args:
        model: about to be trained.

    Raises:
        ValueError: no parameter requires a gradient; the message says how to make some do.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    remedy = "call model.requires_grad_(True), or pass a peft_config to train an adapter"
    if hasattr(model, "peft_config"):
        remedy = (
            "load the adapter with PeftModel.from_pretrained(..., is_trainable=True): it is frozen "
            "by default"
        )
    raise ValueError(
        f"nothing is trainable: no parameter of the {type(model).__name__} requires a gradient, "
        f"so that training would leave it as it is; {remedy}"
    )


def _init_kwargs(args: ORPOConfig) -> dict[str, Any]:
    kwargs = args.model_init_kwargs or {}
    if not isinstance(kwargs, dict):
        raise ValueError(
            f"model_init_kwargs must be a dictionary, or JSON of one, got {kwargs!r}; write "
            'e.g. {"dtype": "bfloat16"}'
        )
    return kwargs


def _with_adapters(model: nn.Module, args: ORPOConfig, peft_config: Any) -> nn.Module:
    try:
        from peft import PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
    except ImportError as error:
        raise ImportError("peft_config needs the peft library: pip install peft") from error
    if not isinstance(peft_config, PeftConfig):
        raise TypeError(
            "peft_config must be a peft.PeftConfig such as peft.LoraConfig(...), got "
            f"{type(peft_config).__name__}"
        )
    if isinstance(model, PeftModel):
        raise ValueError(
            "model is a PeftModel and peft_config was passed too; pass the PeftModel alone to go "
            "on training its adapter, or model.merge_and_unload() and a new peft_config"
        )
    quantised = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    if quantised:
        prepare: Any = prepare_model_for_kbit_training
        model = prepare(
            model,
            use_gradient_checkpointing=bool(args.gradient_checkpointing),
            gradient_checkpointing_kwargs=of_torch(args.gradient_checkpointing_kwargs),
        )
    elif args.gradient_checkpointing:
        _require_input_grads(model)
    plugin = args.deepspeed_plugin
    # ZeRO-3 gathers parameters of one dtype only, so the adapter keeps the base model's.
    sharded = plugin is not None and plugin.zero_stage == 3 and not quantised
    _refuse_absent(model, getattr(peft_config, "modules_to_save", None))
    model = get_peft_model(model, peft_config, autocast_adapter_dtype=not sharded)
    if args.bf16 and getattr(model, "is_loaded_in_4bit", False):
        _cast_unquantised_to_bf16(model)
    return model


def _refuse_absent(model: nn.Module, modules_to_save: Sequence[str] | None) -> None:
    """PEFT passes over names that it does not find, and these modules stay as they are."""
    paths = [path for path, _ in model.named_modules()]
    absent = [each for each in modules_to_save or () if not any(p.endswith(each) for p in paths)]
    if absent:
        raise ValueError(
            f"modules_to_save must name modules of the {type(model).__name__}, to train them in "
            f"full; {absent} are not there, and PEFT would go on without; print(model) shows the "
            "names, e.g. embed_tokens and lm_head"
        )


def _cast_unquantised_to_bf16(model: nn.Module) -> None:
    """Undo part of `prepare_model_for_kbit_training`: embeddings and head need no float32."""
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.LayerNorm) or "norm" in name:
            module.to(torch.float32)
        elif any(part in name for part in ("lm_head", "embed_tokens", "wte", "wpe")) and (
            weight is not None and weight.dtype == torch.float32
        ):
            module.to(torch.bfloat16)


def _require_input_grads(model: Any) -> None:
    """Reentrant checkpointing drops gradients unless an input requires one."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
        return
    model.get_input_embeddings().register_forward_hook(
        lambda module, args, output: output.requires_grad_(True)
    )


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        # Attention, and all of OPT, call F.dropout with a number kept on the module.
        for name in _DROPOUTS:
            if isinstance(module.__dict__.get(name), float):
                setattr(module, name, 0.0)
