"""LLaMA-Factory's `pref_loss: orpo` without logits: two methods of its trainer replaced.

    from orpo_kernels.integrations.llamafactory import patch_llamafactory
    patch_llamafactory()             # before run_exp(); undone by unpatch_llamafactory()

Its loss is the preset "llamafactory": the NLL is the mean over pairs of the chosen answers' own
means, without the prompt. Its odds-ratio term, which is NaN for answers the model is certain of, is
replaced by the one of this package. Importing this imports LLaMA-Factory; 0.9.5 is tested.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from llamafactory.train.dpo.trainer import CustomDPOTrainer
from torch import Tensor, nn

from orpo_kernels.integrations.calls import FusedCalls, FuseKeywords, logits_of, mean_logps
from orpo_kernels.integrations.patch import Patch, refuse_unless_known
from orpo_kernels.odds_ratio import odds_ratio_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

# How LLaMA-Factory calls the replacements: method to its arguments.
_KNOWN = {
    "concatenated_forward": ("self", "model", "batch", "is_ref_model"),
    "odds_ratio_loss": ("self", "chosen_logps", "rejected_logps"),
}
_patch: Patch | None = None


def patch_llamafactory(**options: Unpack[FuseKeywords]) -> None:
    """Let LLaMA-Factory train `pref_loss: orpo` without logits; other losses stay its own.

    Args:
        **options: of `fuse_head`; a second call replaces those of the first. `mean_logits=False`
            leaves out the metrics `logits/chosen` and `logits/rejected`, which are then NaN.

    Raises:
        NotImplementedError: a LLaMA-Factory whose trainer does not have the methods this one knows.
    """
    global _patch
    unpatch_llamafactory()
    refuse_unless_known(
        CustomDPOTrainer, _KNOWN, f"the trainer of LLaMA-Factory {version('llamafactory')}",
        "0.9.5",
    )  # fmt: skip
    own = CustomDPOTrainer.concatenated_forward
    settings: FuseKeywords = {"mean_logits": "all"}  # LLaMA-Factory counts the last position
    settings.update(options)

    def forward(
        self: Any, model: nn.Module, batch: dict[str, Tensor], is_ref_model: bool = False
    ) -> dict[str, Tensor]:
        if self.loss_type != "orpo":
            return own(self, model, batch, is_ref_model)  # type: ignore[no-any-return]
        return concatenated_forward(FusedCalls.of(self, **settings), model, batch)

    _patch = Patch(
        (CustomDPOTrainer, "concatenated_forward", forward),
        (CustomDPOTrainer, "odds_ratio_loss", orpo_losses),
    )
    _patch.put_on()


def unpatch_llamafactory() -> None:
    """Undo `patch_llamafactory`; does nothing where nothing is patched.

    Raises:
        RuntimeError: somebody has patched the same method since.
    """
    if _patch is not None:
        _patch.take_off()


def concatenated_forward(
    calls: FusedCalls, model: nn.Module, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """What LLaMA-Factory's method of this name returns for ORPO, from log-probs.

    Args:
        calls: of the trainer.
        model: as its trainer has wrapped it.
        batch: of LLaMA-Factory's collator, 2P sequences, chosen first; its `labels` (2P, T) are
            taken out, as LLaMA-Factory does.

    Returns:
        `chosen_logps`, `rejected_logps` and `chosen_logps_avg` (P,) float32, nats, mean log-probs
        of the answers; `chosen_logits` and `rejected_logits` (P, 1, 1), which have their mean.

    Raises:
        NotImplementedError: a model whose head cannot be fused.
        ValueError: an answer without a token.
    """
    labels = batch.pop("labels")
    output = calls(model, **batch, labels=labels, use_cache=False)
    logps = mean_logps(output.token_logps, labels)
    chosen, rejected = logps.chunk(2)
    chosen_logits, rejected_logits = logits_of(output, logps)
    return {
        "chosen_logps": chosen,
        "rejected_logps": rejected,
        "chosen_logits": chosen_logits,
        "rejected_logits": rejected_logits,
        "chosen_logps_avg": chosen,
    }


def orpo_losses(trainer: Any, chosen_logps: Tensor, rejected_logps: Tensor) -> Tensor:
    """LLaMA-Factory's `odds_ratio_loss`: (P,) the whole loss of each pair, its NLL included."""
    losses, _ = odds_ratio_loss(chosen_logps, rejected_logps)
    return trainer.beta * losses - chosen_logps  # type: ignore[no-any-return]
