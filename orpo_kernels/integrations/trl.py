"""TRL's ORPOTrainer without logits: the same trainer, one method of it replaced.

TRL's `concatenated_forward` computes the logits of both answers, (2P, T, V), and from them what its
loss and metrics need. Here the fused head gives the same numbers. Everything else of the trainer is
TRL's own: data, arguments, loss, metrics, evaluation, checkpoints.

    from orpo_kernels.integrations.trl import patch_trl
    patch_trl()                      # a script that uses TRL's ORPOTrainer stays as it is

    from orpo_kernels.integrations.trl import ORPOTrainer      # or: change one import

Importing this imports TRL; 1.9 to 1.16 are tested. The odds-ratio term stays TRL's, and with it its
NaN for answers the model is certain of: `orpo_kernels.ORPOTrainer` has one that is finite.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from trl.experimental.orpo import ORPOTrainer as TRLTrainer

from orpo_kernels.constants import IGNORE_INDEX
from orpo_kernels.integrations.calls import FusedCalls, FuseKeywords, logits_of, mean_logps, scored
from orpo_kernels.integrations.patch import Patch, refuse_unless_known

if TYPE_CHECKING:
    from typing_extensions import Unpack

# What the replacement calls, and how TRL calls the replacement: method to its arguments.
_KNOWN = {
    "concatenated_forward": ("self", "model", "batch"),
    "concatenated_inputs": ("batch", "is_encoder_decoder", "padding_value", "device"),
    "odds_ratio_loss": ("self", "policy_chosen_logps", "policy_rejected_logps"),
}
_patch: Patch | None = None


class FusedForward:
    """`concatenated_forward` without logits, for a class between this one and TRL's ORPOTrainer.

    `fuse_options`, a class attribute, are those of `fuse_head`. `mean_logits=False` leaves out the
    metrics `logits/chosen` and `logits/rejected`, which are then NaN; they cost one more pass over
    the vocabulary where the model has a softcap, and next to nothing elsewhere.

    Raises:
        NotImplementedError: at the first batch, a model whose head cannot be fused: encoder-decoder
            models (T5) and what `fuse_head` names.
    """

    fuse_options: ClassVar[FuseKeywords] = {}

    def concatenated_forward(self, model: nn.Module, batch: dict[str, Any]) -> Any:
        """See `concatenated_forward` of this file."""
        return concatenated_forward(self, model, batch, **self.fuse_options)


class ORPOTrainer(FusedForward, TRLTrainer):
    """TRL's ORPOTrainer, which it documents, on the fused head: same numbers, no logits."""


def patch_trl(**options: Unpack[FuseKeywords]) -> None:
    """Let TRL's own ORPOTrainer, and its subclasses, train without logits.

    The class itself is changed, so it does not matter who has imported it before. A trainer keeps
    the options of its first batch.

    Args:
        **options: of `fuse_head`; a second call replaces those of the first.

    Raises:
        NotImplementedError: a TRL whose trainer does not have the methods this one knows.
    """
    global _patch
    refuse_unknown_trl()
    unpatch_trl()

    def forward(self: Any, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor | Any, ...]:
        return concatenated_forward(self, model, batch, **options)

    _patch = Patch((TRLTrainer, "concatenated_forward", forward))
    _patch.put_on()


def unpatch_trl() -> None:
    """Undo `patch_trl`; does nothing where nothing is patched.

    Raises:
        RuntimeError: somebody has patched the same method since.
    """
    if _patch is not None:
        _patch.take_off()


def concatenated_forward(
    trainer: Any, model: nn.Module, batch: dict[str, Any], **options: Unpack[FuseKeywords]
) -> tuple[Tensor | Any, ...]:
    """What TRL's method of this name returns, from log-probs instead of logits.

    Args:
        trainer: of TRL, or a subclass.
        model: as `trainer` has wrapped it.
        batch: of TRL's collator, P pairs.
        **options: of `fuse_head`; `mean_logits` is True where it is not given.

    Returns:
        chosen_logps (P,) and rejected_logps (P,), mean log-prob of the answers' tokens, float32,
        nats; two (P, 1, 1) float32 without graph, which stand for the logits of both sides: their
        mean is that of the logits; nll_loss (), of the chosen prompts and answers; and the
        auxiliary loss () of a mixture of experts, where the trainer adds one.

    Raises:
        NotImplementedError: an encoder-decoder model, or a head that cannot be fused.
        ValueError: an answer without a token (TRL's loss is NaN).
    """
    if trainer.is_encoder_decoder:
        raise NotImplementedError(
            f"{type(model).__name__} is an encoder-decoder model; the fused head scores the tokens "
            "of a causal LM: train it with TRL as it is (unpatch_trl())"
        )
    settings: FuseKeywords = {"mean_logits": True}
    settings.update(options)
    calls = FusedCalls.of(trainer, **settings)
    stacked = trainer.concatenated_inputs(
        batch,
        is_encoder_decoder=False,
        padding_value=trainer.padding_value,
        device=trainer.accelerator.device,
    )
    ids, mask, labels = (
        stacked[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels")
    )
    pairs = len(labels) // 2
    nll_labels = torch.where(mask == 1, ids, IGNORE_INDEX)
    nll_labels[pairs:] = IGNORE_INDEX
    router = {"output_router_logits": True} if trainer.aux_loss_enabled else {}
    output = calls(
        model, input_ids=ids, attention_mask=mask, labels=labels, nll_labels=nll_labels,
        use_cache=False, **router,
    )  # fmt: skip
    logps = mean_logps(output.token_logps, labels)
    nll_loss = -output.nll_token_logps.sum() / scored(nll_labels).sum()
    results = (*logps.chunk(2), *logits_of(output, logps), nll_loss)
    return (*results, output.aux_loss) if trainer.aux_loss_enabled else results


def refuse_unknown_trl() -> None:
    """Refuse a TRL whose trainer is called in another way.

    Raises:
        NotImplementedError: naming the method, what it takes and what was expected.
    """
    refuse_unless_known(
        TRLTrainer, _KNOWN, f"the ORPOTrainer of TRL {version('trl')}", "1.9 to 1.16",
        "; train with orpo_kernels.ORPOTrainer, which does not need TRL",
    )  # fmt: skip
