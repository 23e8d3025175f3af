"""The fused head: any Hugging Face causal LM returns token log-probs instead of logits.

`fuse_head` overrides `forward` on the model instance and on its output head. Called with labels,
the model takes them out of the call, and while its own forward runs, the head computes
`linear_logps` and returns an empty (B, T, 0) tensor, which passes through any scale or softcap
untouched. The log-probs, and the loss, are put on the model's output: all within the forward that
DDP, FSDP, autocast and accelerate wrap. Called without labels, the model runs as if not fused.

Modules, parameters, names, hooks and ties stay as they are. `override` says how a forward is
overridden, `model` what the model's does, `call` what the head's does, `output` what comes out.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch
from torch import nn
from transformers import PreTrainedModel

from orpo_kernels.guard import DensityGuard
from orpo_kernels.integrations import narrow, peft
from orpo_kernels.integrations.call import FuseOptions
from orpo_kernels.integrations.fusing import Fusing
from orpo_kernels.integrations.head import LogitTransform, logit_transforms, resolve_head
from orpo_kernels.integrations.model import Entry, ModelOverride
from orpo_kernels.integrations.override import LOCK, THREAD
from orpo_kernels.layout import BatchLayout
from orpo_kernels.loss import ORPOLoss


def fuse_head(  # noqa: PLR0913 - the public signature
    model: nn.Module,
    *,
    loss: ORPOLoss | None = None,
    workspace_bytes: int | None = None,
    gradient: str = "exact",
    eps: float | None = None,
    compute_dtype: torch.dtype | None = None,
    mean_logits: bool | str = False,
    check: bool = True,
    narrow_head: bool = True,
    layout: BatchLayout | str = "padded",
) -> "FusedHead":
    """Let `model` return the log-probs of its labels instead of logits, in a fixed workspace.

    The fused model takes `labels` (B, T) int64 as usual (unshifted, -100 ignored) and optionally
    `nll_labels` (B, T), a second label set scored in the same pass. A batch of pairs (P, 2, T), as
    `PreferenceCollator` makes it, is stacked to B = 2P sequences, chosen first, and what comes out
    per sequence is (P, 2, ...) again. Its output has

    - `logits`: empty (B, T, 0);
    - `token_logps` (B, T) float32, nats: at t the log-prob of `labels[:, t + 1]`, 0 where ignored
      and at the last position; `nll_token_logps` likewise;
    - with another `layout` than "padded": `layout_terms`, (1,) int64 `computed_tokens`,
      `padded_tokens` and `unshared_pairs`;
    - `mean_logits` (B,) float32, detached, over positions 0 to T - 2 (or T - 1), when asked for;
    - with `loss`: `orpo`, its `ORPOOutput` (rows stacked, chosen first), and `loss`, the sum of
      `orpo.loss` and, for mixtures of experts, `router_aux_loss_coef * aux_loss`. The call takes
      the loss's `num_nll_tokens` and `num_pairs`; the auxiliary loss, a mean of its micro-batch,
      is then weighted by the micro-batch's share of the pairs. `orpo_terms` is `orpo` as a
      dictionary of (P,) and (1,) tensors, which is what gathers, casts and copies rebuild.

    Without labels the model behaves exactly as before: it generates, and returns logits.
    `print(model)` says that the head is fused; see `FusedHead` for fusing twice, in threads, and
    for a call at a time.

    Args:
        model: a causal LM of transformers, also inside `PeftModel`, DDP or FSDP.
        loss: computes `out.loss` from the log-probs.
        workspace_bytes: as in `linear_logps`, like `gradient`, `eps` and `compute_dtype`.
        gradient: "exact", "sparse", or "auto": sparse where the GEMMs are 16-bit, but for the 32
            steps after one whose softmax was too flat for it (`FusedHead.guard`).
        eps: of the sparse gradient, 0 to 1; default: see `linear_logps`.
        compute_dtype: dtype of the GEMMs; default: autocast's, else that of hidden and weight.
        mean_logits: also report the mean logit of each row, over the positions that predict a
            token; "all": over the last one too.
        check: compare two tokens with the model's own logits in the first call, and refuse on
            mismatch. False trusts the config's logit scale and softcap.
        narrow_head: keep a frozen float32 head in 16 bits as long as it is fused, if all of its
            entries are 16-bit numbers (as `prepare_model_for_kbit_training` leaves it) and nothing
            else holds its weight. Results stay what they are; saves 2 V H bytes. See `narrow.py`.
        layout: how the decoder computes the batch, a name or a `BatchLayout`: "padded", as it
            comes; "packed", its sequences one after the other in rows without padding;
            "shared_prompt", of each pair what both sequences begin with once. The numbers are the
            same; `mean_logits` are then over tokens, without padding. In the first call two small
            pairs are compared with the padded batch.

    Returns:
        The handle: `unfuse()`, `paused()` for the model's own loss, and a context manager that
        unfuses when it is left.

    Raises:
        ValueError: `loss` has options of `linear_logps`; they belong here.
        NotImplementedError: encoder-decoder model, prompt-learning adapter, no head or one that is
            not an unquantised `nn.Linear` (with plain LoRA or `modules_to_save` on it, or not); a
            model that cannot compute the layout.

    Note:
        The first call with labels raises RuntimeError when the self-check fails, and any call does
        when the model does not call its head; with `loss`, ValueError for rows that are no pairs,
        and for NLL labels in rejected ones (on a GPU, an assertion of the device).
        `torch.nn.DataParallel` copies the override without rebinding it: refused, use DDP.
    """
    causal_lm = causal_lm_of(model)
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
    if not isinstance(layout, BatchLayout):
        layout = BatchLayout(layout)
    options = FuseOptions(
        loss, workspace_bytes, gradient, eps, compute_dtype, mean_logits, check, narrow_head, layout
    )
    fused = FusedHead(causal_lm, options)
    fused.fuse()
    return fused


def unfuse_head(model: nn.Module) -> None:
    """Undo every `fuse_head` of `model`; one that is not fused stays as it is.

    What threads have entered with `active()` stays theirs until they leave.
    """
    override = ModelOverride.on(causal_lm_of(model))
    if override is not None:
        for fusing in list(override.fusings):
            override.drop(fusing)
        override.withdraw()
        narrow.widen(resolve_head(override.module).linear)


class FusedHead:
    """One fusing of one model, made by `fuse_head`: the handle to undo, redo and suspend it.

    A model may be fused several times: each `fuse_head` has options and a self-check of its own,
    the youngest that is not undone serves the calls of every thread, and undoing it, in whatever
    order, brings back the one before. A thread that has entered `active()` or `paused()` is served
    by what it entered last, whatever the others do.

    As a context manager it fuses (unless it does already) and, when left, unfuses.

    `model` is the causal LM itself: for a `PeftModel`, its base model.
    """

    def __init__(self, model: nn.Module, options: FuseOptions) -> None:
        self.model = model
        self._fusing = Fusing(options, None if options.check else logit_transforms(model)[0])
        self._override = ModelOverride.on(model) or ModelOverride(model)
        self._depth = 0
        self._narrowed: nn.Module | None = None  # the head that `fuse` narrowed

    @property
    def transform(self) -> LogitTransform | None:
        """Logit scale and softcap in use; None before the self-check has found them."""
        return self._fusing.transform

    @property
    def guard(self) -> DensityGuard:
        """What `gradient="auto"` has seen so far; its state belongs to a run's checkpoints."""
        return self._fusing.options.guard

    @property
    def is_fused(self) -> bool:
        """Whether this fusing is in force for everybody, or would be but for a younger one."""
        return self._fusing in self._standing().fusings

    def fuse(self) -> None:
        """Fuse again after `unfuse`, as the youngest; a fused head stays as it is."""
        with LOCK:
            override = self._standing()
            if self._fusing not in override.fusings:
                override.push(self._fusing)
                self._narrowed = self._narrow()

    def unfuse(self) -> None:
        """Undo this fusing; when it was the last, the model is what it was before `fuse_head`.

        A second call does nothing. Another thread's call that is running goes on as it began.
        """
        override = self._standing()
        override.drop(self._fusing)
        override.withdraw()
        with LOCK:
            if self._narrowed is not None:
                narrow.widen(self._narrowed, users=1)
            self._narrowed = None

    def _narrow(self) -> nn.Module | None:
        """The head, if it is kept in 16 bits from now on."""
        head = resolve_head(self.model)
        wanted = self._fusing.options.narrow_head and head.module is head.linear
        return head.linear if wanted and narrow.narrow(self.model, head.linear) else None

    @contextmanager
    def narrowed(self) -> Iterator["FusedHead"]:
        """Keep the head in 16 bits inside, as `fuse_head(narrow_head=True)` does while it is fused.

        For trainers that fuse for a call at a time with `active()`: entered once around all calls.
        """
        with LOCK:
            head = self._narrow()
        try:
            yield self
        finally:
            if head is not None:
                with LOCK:
                    narrow.widen(head, users=1)

    @contextmanager
    def active(self) -> Iterator["FusedHead"]:
        """Fuse for the calls that this thread makes inside, and for no other.

        For trainers that fuse for their own calls only: `unfuse` once after `fuse_head`, and enter
        this for every call (microseconds; the self-check is not repeated). Two of them on one model
        do not see each other, nor does a thread that generates or evaluates beside them.

        A checkpoint around the whole call runs it again in the backward, which then belongs inside.
        """
        with self._entered(self._fusing):
            yield self

    @contextmanager
    def paused(self) -> Iterator["FusedHead"]:
        """Let the calls that this thread makes inside be the unfused model's, and no other.

        `with fused.paused(): model(ids, labels=ids).loss` is the model's own loss.
        """
        with self._entered(None):
            yield self

    @contextmanager
    def _entered(self, fusing: Fusing | None) -> Iterator[None]:
        with LOCK:
            override = self._standing()
            override.acquire()
        entry = Entry(override, fusing)
        try:
            THREAD.entered = (*THREAD.entered, entry)
            yield
        finally:
            entry.live = False
            THREAD.entered = tuple(each for each in THREAD.entered if each.live)
            override.release()

    def _standing(self) -> ModelOverride:
        return ModelOverride.on(self.model) or self._override

    def __enter__(self) -> "FusedHead":
        with LOCK:
            self.fuse()
            self._depth += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with LOCK:
            self._depth -= 1
            if self._depth == 0:
                self.unfuse()


def causal_lm_of(model: nn.Module) -> nn.Module:
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
            return causal_lm_of(model.get_submodule(name))
    return peft.base_model(model)
