"""The forward of a fused model: the model's own, with labels taken out and log-probs put on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from orpo_kernels.constants import IGNORE_INDEX
from orpo_kernels.integrations.call import HeadCall
from orpo_kernels.integrations.decoder import DecoderOverride, RowsCall
from orpo_kernels.integrations.follower import released
from orpo_kernels.integrations.fusing import Fusing
from orpo_kernels.integrations.head import logit_transforms, resolve_head
from orpo_kernels.integrations.layout_check import check_layout
from orpo_kernels.integrations.output import fused_output
from orpo_kernels.integrations.override import LOCK, THREAD, ForwardOverride, HeadOverride
from orpo_kernels.integrations.owners import head_owners, switches
from orpo_kernels.integrations.token_ids import check_token_ids
from orpo_kernels.loss import ORPOLoss
from orpo_kernels.options import validate_labels
from orpo_kernels.pair_batch import is_in_pairs, refuse_rejected_nll, stack_batch

_OWN_ARGUMENTS = ("nll_labels", "num_nll_tokens", "num_pairs")
_KEEP_ARGUMENTS = ("logits_to_keep", "num_logits_to_keep")  # the head must see every position
_ATTRIBUTES = ("accepts_loss_kwargs", "extra_repr")  # of the instance, beside its forward


class Entry:
    """How one thread is served by `owner`'s model until it leaves; None: as if not fused."""

    def __init__(self, owner: ModelOverride, fusing: Fusing | None) -> None:
        self.owner, self.fusing = owner, fusing
        self.live = True  # a generator may be closed, and leave, in another thread


class ModelOverride(ForwardOverride):
    """The forward of a model while it is fused for anybody.

    A call takes the youngest fusing that its own thread has entered, else the youngest of those
    made for everybody, `fusings`; where there is none, and without labels, the model runs as ever.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.fusings: list[Fusing] = []
        self._found: dict[str, Any] = {}  # what `_ATTRIBUTES` were
        self._parts: list[ForwardOverride] = []  # of the model whose forward is overridden now
        self._known_parts: list[ForwardOverride] = []

    def push(self, fusing: Fusing) -> None:
        """Fuse for everybody."""
        with LOCK:
            self.acquire()
            self.fusings.append(fusing)

    def drop(self, fusing: Fusing) -> None:
        """Undo `push`, in any order; a fusing that is not there changes nothing."""
        with LOCK:
            if fusing in self.fusings:
                self.fusings.remove(fusing)
                self.release()

    def _visible(self) -> Fusing | None:
        """What serves a call of the running thread."""
        for entry in reversed(THREAD.entered):
            if entry.owner is self and entry.live:
                return entry.fusing
        return self.fusings[-1] if self.fusings else None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward; with labels, the fused one. See `fuse_head`."""
        if args and args[0] is self.module:  # accelerate's unwrap_model binds whatever it finds
            args = args[1:]
        fusing = self._visible()
        if fusing is None:
            return self._unfused(*args, **kwargs)
        arguments = kwargs
        if args:
            positional = inspect.signature(self.__wrapped__).bind_partial(*args).arguments
            arguments = positional | kwargs
        if arguments.get("labels") is None:
            if arguments.get("nll_labels") is not None:
                raise ValueError(
                    "nll_labels came without labels: pass labels (B, T) to a fused model "
                    "(label_smoothing_factor takes them out of a batch; it must be 0)"
                )
            rest = {k: v for k, v in kwargs.items() if k not in _OWN_ARGUMENTS}
            return self._unfused(*args, **rest)
        if torch.compiler.is_compiling():
            return self._fused(fusing, arguments)
        self.acquire()  # unfusing from another thread waits until this call is done
        try:
            return self._fused(fusing, arguments)
        finally:
            self.release()

    def _unfused(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward with the head's own, also from within a fused call (a hook's)."""
        before = THREAD.calls
        if not before:
            return self.own(*args, **kwargs)
        try:
            THREAD.calls = tuple(call for call in before if call.owner is not self)
            return self.own(*args, **kwargs)
        finally:
            THREAD.calls = before

    def _fused(self, fusing: Fusing, arguments: dict[str, Any]) -> ModelOutput:
        in_pairs = is_in_pairs(arguments)
        if in_pairs:
            arguments = stack_batch(arguments)
        taken = ("labels", *_OWN_ARGUMENTS, *_KEEP_ARGUMENTS)
        rest = {name: value for name, value in arguments.items() if name not in taken}
        labels = _shifted("labels", arguments["labels"])
        nll_labels = arguments.get("nll_labels")
        if fusing.options.loss is not None:
            nll_labels = fusing.options.loss.nll_labels_of(nll_labels)
        if nll_labels is not None:
            nll_labels = _shifted("nll_labels", nll_labels)
        if fusing.options.loss is not None:
            self._refuse_unless_pairs(labels, fusing.options.loss)
            if nll_labels is not None and nll_labels.shape == labels.shape:
                refuse_rejected_nll(nll_labels)
            _refuse_foreign_scale(arguments["labels"], rest.pop("num_items_in_batch", None))
        head = resolve_head(self.module)
        self._cover(HeadOverride, head.module)
        rows = None
        if fusing.options.layout.name != "padded" and labels.numel() > 0:
            rows = self._rows(fusing, rest, labels, nll_labels)
        new_call = partial(HeadCall, self, fusing.options, head, labels, nll_labels, in_rows=rows)
        transform = fusing.settled(self.module, head)
        if transform is not None:
            call = new_call(transform)
            output = self._run(call, rest)
        else:
            call, output = self._checked(fusing, new_call, rest)
        counts = {name: arguments.get(name) for name in _OWN_ARGUMENTS[1:]}
        loss = fusing.options.loss
        return fused_output(self.module, output, call, loss, in_pairs=in_pairs, **counts)

    @torch.compiler.disable(  # type: ignore[untyped-decorator, no-untyped-call]
        reason="how a batch is laid out in rows depends on its lengths"
    )
    def _rows(
        self,
        fusing: Fusing,
        arguments: dict[str, Any],
        labels: Tensor,
        nll_labels: Tensor | None,
    ) -> RowsCall:
        """The rows in which the decoder computes this call."""
        layout = fusing.options.layout
        rows = RowsCall(self.module, layout, arguments, labels.shape)
        rows.refuse_unless_computed(labels, nll_labels)
        self._cover(DecoderOverride, rows.decoder)
        if fusing.options.check and not fusing.computes_rows(rows.decoder):
            override = DecoderOverride.on(rows.decoder)
            own, device = override.own, rows.rows.tokens.device  # type: ignore[union-attr]
            check_layout(rows.decoder, own, layout, rows.name, device)
            fusing.settle_decoder(rows.decoder)
        return rows

    @torch.compiler.disable(  # type: ignore[untyped-decorator, no-untyped-call]
        reason="the self-check of fuse_head reads tensors: with fullgraph=True, call the model "
        "once with labels before it is compiled, or fuse it with check=False"
    )
    def _checked(
        self, fusing: Fusing, new_call: Callable[..., HeadCall], arguments: dict[str, Any]
    ) -> tuple[HeadCall, ModelOutput]:
        """Run a call that compares two tokens with the model's own logits."""
        likeliest = () if fusing.transform is None else (fusing.transform,)
        readings = tuple(dict.fromkeys((*likeliest, *logit_transforms(self.module))))
        call = new_call(readings[0], readings)
        check_token_ids(self.module, arguments)
        output = self._run(call, arguments)
        if call.check is None:  # no token in this batch
            return call, output
        agreeing = call.check.choose(self.module)
        fusing.settle(self.module, call.head, agreeing)
        if agreeing == call.transform:
            return call, output
        if arguments.get("past_key_values") is not None:
            raise RuntimeError(
                f"the self-check found that {type(self.module).__name__} reads its config as "
                f"{agreeing}, after this call had extended past_key_values; call again, with the "
                "cache as it was before"
            )
        # Once per fusing. What the first run saved is of no use; a checkpoint around this call,
        # which counts what is saved, does not see the second.
        with torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
            call = new_call(agreeing)
            return call, self._run(call, arguments)

    def _run(self, call: HeadCall, arguments: dict[str, Any]) -> ModelOutput:
        """The model's own forward, its head served by `call` in this thread."""
        before = THREAD.calls
        try:
            THREAD.calls = (*before, call)
            output = self.own(**arguments)
        finally:
            THREAD.calls = before
        self._refuse_unless_complete(call, output)
        if call.check is not None:
            call.check.outcome = released(output.logits)
        if output.logits.requires_grad:
            call.tie(output.logits)
        return output  # type: ignore[no-any-return]

    def _refuse_unless_pairs(self, labels: Tensor, loss: ORPOLoss) -> None:
        if labels.shape[0] % 2 != 0:
            raise ValueError(
                f"the head of this {type(self.module).__name__} is fused (fuse_head) with {loss}: "
                "called with labels, it returns the loss of stacked pairs, P chosen then P "
                f"rejected sequences, and got {labels.shape[0]}. For the model's own loss, call it "
                "within `with fused.paused():`, or undo with unfuse_head(model)"
            )

    def _refuse_unless_complete(self, call: HeadCall, output: object) -> None:
        name = type(self.module).__name__
        if not call.results:
            code = inspect.unwrap(self.__wrapped__)
            raise RuntimeError(
                f"{name}.forward ({code.__module__}.{code.__qualname__}) returned without calling "
                "its output head: another patch computes the logits or the loss, of "
                f"{_others(self.module)}; undo it before fuse_head. `orpo-kernels env` is for a "
                "bug report"
            )
        if call.in_rows is not None and not call.in_rows.is_done:
            raise RuntimeError(
                f"{name}.forward returned without calling the decoder that get_decoder() names, "
                f"{type(call.in_rows.decoder).__name__}: set batch_layout='padded'"
            )
        if not isinstance(output, ModelOutput) or not isinstance(output.get("logits"), Tensor):
            raise TypeError(
                f"{name} returned a {type(output).__name__}, expected a ModelOutput with logits to "
                "put token_logps on; call it with return_dict=True"
            )

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

    def extra_repr(self) -> str:
        """What `print(model)` says: the model's own, and that its head is fused."""
        model, fusing = self.module, self._visible()
        found = self._found.get("extra_repr")
        own: str = type(model).extra_repr(model) if found is None else found()
        if fusing is None:
            return own
        loss = "" if fusing.options.loss is None else f" and the loss of {fusing.options.loss}"
        note = f"head fused by orpo_kernels: called with labels, returns log-probs{loss}"
        return f"{own}\n{note}" if own else note

    def _put_on(self) -> None:
        model = self.module
        head = resolve_head(model)  # refuses before anything is changed
        super()._put_on()
        attributes = model.__dict__
        self._found = {name: attributes[name] for name in _ATTRIBUTES if name in attributes}
        # transformers.Trainer asks: our loss ignores num_items_in_batch, so Trainer is to average
        # over the micro-batches itself.
        attributes["accepts_loss_kwargs"] = False
        attributes["extra_repr"] = self.extra_repr
        self._cover(HeadOverride, head.module)

    def _take_off(self) -> None:
        for each in self._parts:
            each.release()
        self._parts = []
        for module in self.module.get_output_embeddings().modules():  # type: ignore[operator]
            copied = HeadOverride.on(module)  # with its head, by PEFT say; no call has used it
            if copied is not None:
                copied.withdraw()
        attributes = self.module.__dict__
        for name in _ATTRIBUTES:
            attributes.pop(name, None)
        attributes.update(self._found)
        super()._take_off()

    def _cover(self, kind: type[ForwardOverride], part: nn.Module) -> None:
        """Override the forward of a part of the model as well, until this is taken off."""
        if kind.on(part) not in self._parts:
            self._put_on_part(kind, part)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _put_on_part(self, kind: type[ForwardOverride], part: nn.Module) -> None:
        with LOCK:
            known = [each for each in self._known_parts if each.is_alive]
            override = kind.on(part)
            if override is None:
                override = next((each for each in known if each.module is part), None)
            if override is None:
                override = kind(part)
            if override not in self._parts:
                override.acquire()
                self._parts.append(override)
            self._known_parts = list(dict.fromkeys((*known, override)))

    def __getstate__(self) -> dict[str, Any]:
        def alive(parts: list[ForwardOverride]) -> list[ForwardOverride]:
            return [each for each in parts if each.is_alive]  # a head may have been replaced

        state = super().__getstate__()
        lists = {"_parts": alive(self._parts), "_known_parts": alive(self._known_parts)}
        return {**state, **lists}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._users = len(self.fusings)  # a copy is fused for everybody, not for a thread
        for each in self._parts:
            each._users += 1  # their copies have it as their forward already


def _shifted(name: str, labels: object) -> Tensor:
    """(B, T) int64, where position t holds the label of position t + 1."""
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        given = tuple(labels.shape) if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(
            f"{name} must be an integer tensor (B, T), got {given}; pad the batch first"
        )
    validate_labels(name, labels)
    return F.pad(labels[:, 1:].to(torch.int64), (0, 1), value=IGNORE_INDEX)


def _others(model: nn.Module) -> str:
    """Who else has replaced functions of `model`, in words."""
    owners = [str(each) for each in head_owners(model) if each.name != "orpo_kernels"]
    who = ", ".join(owners) or "somebody who left no trace"
    # Of Unsloth's, some make its forwards return hidden states.
    found = [f"{name}={value}" for name, value in switches().items() if "_RETURN_" in name]
    return f"{who}, with {' and '.join(found)}" if found else who


def _refuse_foreign_scale(labels: Tensor, num_items_in_batch: Tensor | int | None) -> None:
    """Refuse a Trainer that was made before the head was fused, where that matters.

    It asked the model then whether its loss accepts `num_items_in_batch`, takes the loss for scaled
    by that number, and would not average over micro-batches or ranks.
    """
    if num_items_in_batch is None:
        return
    scored = labels != IGNORE_INDEX
    own = {int(scored.sum()), int(scored[:, 1:].sum())}  # Trainer's count, old and new
    if int(num_items_in_batch) not in own:
        raise ValueError(
            f"num_items_in_batch={int(num_items_in_batch)} counts the tokens of more batches than "
            f"this one ({max(own)}): the Trainer was made before the head was fused and would not "
            "average over them; make it after fuse_head(model, ...)"
        )


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
