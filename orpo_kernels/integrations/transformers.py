"""The fused head: any Hugging Face causal LM returns token log-probs instead of logits.

`fuse_head` overrides `forward` on the model instance. Called with labels, it takes them out of the
call and, while the model's own forward runs, replaces the forward of the output head (on the
instance again) by one that computes `linear_logps` and returns an empty (B, T, 0) tensor, which
passes through any scale or softcap untouched. The log-probs, and the loss, are put on the model's
output: all within the forward that DDP, FSDP, autocast and accelerate wrap. Called without labels,
the model runs as if it were not fused.

Between calls nothing differs from the unfused model but that attribute, and one that tells
`transformers.Trainer` how the loss is averaged: modules, parameters, names, hooks and ties stay.
"""

import inspect
from collections.abc import Callable
from dataclasses import field, make_dataclass
from functools import lru_cache
from types import MethodType, TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from orpo_kernels.constants import DEFAULT_EPS, IGNORE_INDEX
from orpo_kernels.integrations import peft
from orpo_kernels.integrations.call import HeadCall, Options
from orpo_kernels.integrations.head import LogitTransform, logit_transforms, resolve_head
from orpo_kernels.integrations.token_ids import check_token_ids
from orpo_kernels.loss import ORPOLoss

_OWN_ARGUMENTS = ("nll_labels", "num_nll_tokens", "num_pairs")
_OVERRIDDEN = ("forward", "accepts_loss_kwargs")  # attributes of the model instance
_KEEP_ARGUMENTS = ("logits_to_keep", "num_logits_to_keep")  # the head must see every position


def fuse_head(
    model: nn.Module,
    *,
    loss: ORPOLoss | None = None,
    workspace_bytes: int | None = None,
    gradient: str = "exact",
    eps: float = DEFAULT_EPS,
    compute_dtype: torch.dtype | None = None,
    mean_logits: bool = False,
    check: bool = True,
) -> "FusedHead":
    """Let `model` return the log-probs of its labels instead of logits, in a fixed workspace.

    The fused model takes `labels` (B, T) int64 as usual (unshifted, -100 ignored) and optionally
    `nll_labels` (B, T), a second label set scored in the same pass. Its output has

    - `logits`: empty (B, T, 0);
    - `token_logps` (B, T) float32, nats: at t the log-prob of `labels[:, t + 1]`, 0 where ignored
      and at the last position; `nll_token_logps` likewise;
    - `mean_logits` (B,) float32, detached, over positions 0 to T - 2, when asked for;
    - with `loss`: `orpo`, its `ORPOOutput` (rows stacked, chosen first), and `loss`, the sum of
      `orpo.loss` and, for mixtures of experts, `router_aux_loss_coef * aux_loss`. The call takes
      the loss's `num_nll_tokens` and `num_pairs`; the auxiliary loss, a mean of its micro-batch,
      is then weighted by the micro-batch's share of the pairs.

    Without labels the model behaves exactly as before: it generates, and returns logits.

    Args:
        model: a causal LM of transformers, also inside `PeftModel`, DDP or FSDP.
        loss: computes `out.loss` from the log-probs.
        workspace_bytes: as in `linear_logps`, like `gradient`, `eps` and `compute_dtype`.
        gradient: "exact", "sparse" or "auto".
        eps: of the sparse gradient, 0 to 1.
        compute_dtype: dtype of the GEMMs; default: autocast's, else that of hidden and weight.
        mean_logits: also report the mean logit of each row.
        check: compare two tokens with the model's own logits in the first call, and refuse on
            mismatch. False trusts the config's logit scale and softcap.

    Returns:
        The handle: `unfuse()`, and a context manager that unfuses. Fusing a fused model again
        returns the same handle, with the new options.

    Raises:
        ValueError: `loss` has options of `linear_logps`; they belong here.
        NotImplementedError: encoder-decoder model, prompt-learning adapter, no head or one that is
            not an unquantised `nn.Linear` (with plain LoRA or `modules_to_save` on it, or not).

    Note:
        The first call with labels raises RuntimeError when the self-check fails, and any call does
        when the model does not call its head. `torch.nn.DataParallel` copies the override without
        rebinding it and cannot be used; use DDP.
    """
    causal_lm = _causal_lm(model)
    options = Options(loss, workspace_bytes, gradient, eps, compute_dtype, mean_logits, check)
    if loss is not None and loss.options:
        raise ValueError(
            f"loss has the options {sorted(loss.options)}, which the fused head would ignore: give "
            "them to fuse_head, and leave logit transforms to the model's config"
        )
    if getattr(getattr(causal_lm, "config", None), "is_encoder_decoder", False):
        raise NotImplementedError(
            f"{type(causal_lm).__name__} is an encoder-decoder model; the fused head scores the "
            "tokens of a causal LM: use a decoder-only model"
        )
    resolve_head(causal_lm)
    fused = _fused_head(causal_lm)
    if fused is None:
        fused = FusedHead(causal_lm, options)
        causal_lm.__dict__["forward"] = fused
    else:
        fused.configure(options)
    return fused


def unfuse_head(model: nn.Module) -> None:
    """Undo `fuse_head`; a model that is not fused stays as it is."""
    fused = _fused_head(_causal_lm(model))
    if fused is not None:
        fused.unfuse()


class FusedHead:
    """The forward of a fused model, and the handle to undo it; made by `fuse_head`.

    `model` is the causal LM itself (for a `PeftModel`, its base model); `transform` the logit scale
    and softcap in use, None before the first call.
    """

    def __init__(self, model: nn.Module, options: Options) -> None:
        self.model = model
        self._before = {name: model.__dict__.get(name) for name in _OVERRIDDEN}
        self._fused = False
        self._running: HeadCall | None = None
        self.configure(options)

    def configure(self, options: Options) -> None:
        """Start over with other options."""
        self._fused = True
        # transformers.Trainer asks: our loss ignores num_items_in_batch, so Trainer is to average
        # over the micro-batches itself.
        self.model.__dict__["accepts_loss_kwargs"] = False
        self._options = options
        self.transform: LogitTransform | None = None
        self._checked: tuple[Any, ...] | None = None  # the head that was checked

    def unfuse(self) -> None:
        """Make the model exactly what it was before `fuse_head`. A second call does nothing."""
        if self._fused:
            self._restore("accepts_loss_kwargs")
        # A wrapper put around this later (accelerate's autocast) keeps a forward that passes on.
        self._fused = False
        if _unbound(self.model.__dict__.get("forward")) is self:
            self._restore("forward")

    def _restore(self, name: str) -> None:
        if self._before[name] is None:
            del self.model.__dict__[name]
        else:
            self.model.__dict__[name] = self._before[name]

    def __enter__(self) -> "FusedHead":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.unfuse()

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The forward that was there before: accelerate and inspect look for this name."""
        return self._before["forward"] or MethodType(type(self.model).forward, self.model)

    @property
    def __signature__(self) -> inspect.Signature:
        """The model's own and the arguments that only a fused model takes.

        `transformers.Trainer` drops the columns of a batch that are not named here.
        """
        signature = inspect.signature(self.__wrapped__)
        named = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        rest = [p for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD]
        own = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
            for name in _OWN_ARGUMENTS
        ]
        return signature.replace(parameters=[*named, *own, *rest])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; with labels, the fused one. See `fuse_head`."""
        forward = self.__wrapped__
        if args and args[0] is self.model:  # accelerate's unwrap_model binds whatever it finds
            args = args[1:]
        if self._running is not None:
            return self._nested(self._running, args, kwargs)
        arguments = kwargs
        if args:
            arguments = inspect.signature(forward).bind_partial(*args).arguments | kwargs
        if not self._fused:
            return forward(*args, **kwargs)
        if arguments.get("labels") is None:
            if arguments.get("nll_labels") is not None:
                raise ValueError(
                    "nll_labels came without labels: pass labels (B, T) to a fused model"
                )
            return forward(*args, **{k: v for k, v in kwargs.items() if k not in _OWN_ARGUMENTS})
        labels = _shifted("labels", arguments["labels"])
        nll_labels = arguments.get("nll_labels")
        if nll_labels is not None:
            nll_labels = _shifted("nll_labels", nll_labels)
        taken = ("labels", *_OWN_ARGUMENTS, *_KEEP_ARGUMENTS)
        rest = {name: value for name, value in arguments.items() if name not in taken}
        call, output = self._run(forward, rest, labels, nll_labels)
        counts = {name: arguments.get(name) for name in _OWN_ARGUMENTS[1:]}
        return self._finish(output, call, counts)

    def _nested(self, outer: HeadCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Serve a call from within a fused one (by a hook, say) with the head's own forward."""
        self._running = None
        try:
            with outer.head.replaced(outer.own_forward):
                return self(*args, **kwargs)
        finally:
            self._running = outer

    def _run(
        self,
        forward: Callable[..., Any],
        arguments: dict[str, Any],
        labels: Tensor,
        nll_labels: Tensor | None,
    ) -> tuple[HeadCall, ModelOutput]:
        head = resolve_head(self.model)
        unchecked = self._options.check and self._checked != head.key
        readings = logit_transforms(self.model) if self.transform is None or unchecked else []
        if self.transform is None:
            self.transform = readings[0]
        if unchecked:
            check_token_ids(self.model, arguments)
        while True:
            call = HeadCall(self._options, head, labels, nll_labels, self.transform)
            call.readings = list(dict.fromkeys([self.transform, *readings])) if unchecked else []
            self._running = call
            try:
                with head.replaced(call.forward) as call.own_forward:
                    output = forward(**arguments)
            finally:
                self._running = None
            _refuse_unless_complete(self.model, forward, call, output)
            if call.check is not None:
                agreeing = call.check.choose(self.model, output.logits)
                self._checked, unchecked = head.key, False
                if agreeing != self.transform:  # once per fusing: run again with the right one
                    self.transform = agreeing
                    continue
            if output.logits.requires_grad:
                call.tie(output.logits)
            return call, output

    # The output type is made at run time, which Dynamo cannot trace.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _finish(self, output: ModelOutput, call: HeadCall, counts: dict[str, Any]) -> ModelOutput:
        """The model's output with what the call computed, as a subclass of the model's own type."""
        fields: dict[str, Any] = {**output, **call.results}
        if self._options.loss is not None:
            orpo = self._options.loss.from_logps(
                call.results["token_logps"],
                call.labels,
                call.results.get("nll_token_logps"),
                call.nll_labels,
                **counts,
            )._replace(sparse=call.certificate)
            fields["orpo"], fields["loss"] = orpo, orpo.loss
            aux_loss = fields.get("aux_loss")
            if isinstance(aux_loss, Tensor):
                coefficient: Any = _router_aux_loss_coef(self.model)
                if counts["num_pairs"] is not None:
                    total = torch.as_tensor(counts["num_pairs"]).clamp(min=1)
                    coefficient = coefficient * orpo.pair_mask.sum() / total
                fields["loss"] = orpo.loss + coefficient * aux_loss.to(orpo.loss.device)
        return _fused_output_class(type(output))(**fields)


def _shifted(name: str, labels: object) -> Tensor:
    """(B, T), where position t holds the label of position t + 1."""
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        given = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(
            f"{name} must be an integer tensor (B, T), got {given}; pad the batch first"
        )
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def _causal_lm(model: nn.Module) -> nn.Module:
    """The causal LM inside data-parallel, compiled and PEFT wrappers."""
    if isinstance(model, PreTrainedModel):
        return model
    if isinstance(model, nn.DataParallel):
        raise NotImplementedError(
            "torch.nn.DataParallel copies a module without rebinding its forward: use "
            "DistributedDataParallel (torchrun, accelerate launch), or one device"
        )
    for name in ("module", "_fsdp_wrapped_module", "_orig_mod"):
        if name in model._modules:
            return _causal_lm(model.get_submodule(name))
    return peft.base_model(model)


def _fused_head(causal_lm: nn.Module) -> FusedHead | None:
    """The handle in the model's forward, also beneath wrappers put around it later."""
    forward = _unbound(causal_lm.__dict__.get("forward"))
    while forward is not None and not isinstance(forward, FusedHead):
        forward = _unbound(getattr(forward, "__wrapped__", None))
    return forward


def _unbound(forward: Any) -> Any:
    return forward.__func__ if isinstance(forward, MethodType) else forward


def _refuse_unless_complete(
    model: nn.Module, forward: Callable[..., Any], call: HeadCall, output: object
) -> None:
    name = type(model).__name__
    if not call.results:
        code = inspect.unwrap(forward)
        raise RuntimeError(
            f"{name}.forward ({code.__module__}.{code.__qualname__}) returned without calling its "
            "output head: another patch computes the logits or the loss (Unsloth, Liger, Cut Cross "
            "Entropy?); undo it before fuse_head"
        )
    if not isinstance(output, ModelOutput) or not isinstance(output.get("logits"), Tensor):
        raise TypeError(
            f"{name} returned a {type(output).__name__}, expected a ModelOutput with logits to put "
            "token_logps on; call it with return_dict=True"
        )


def _router_aux_loss_coef(model: nn.Module) -> float:
    """The model's own coefficient, where its class or config keeps it."""
    config = getattr(model, "config", None)
    for source in (model, config, getattr(config, "text_config", None)):
        value = getattr(source, "router_aux_loss_coef", None)
        if value is not None:
            return float(value)
    return 0.0


@lru_cache
def _fused_output_class(base: type[ModelOutput]) -> type[ModelOutput]:
    """`base` with the fields of a fused call; DDP and FSDP rebuild outputs from declared fields."""
    names = ("token_logps", "nll_token_logps", "mean_logits", "orpo")
    fields = [(name, Any, field(default=None)) for name in names]
    return make_dataclass(f"Fused{base.__name__}", fields, bases=(base,))
