"""Liger's interface of the ORPO loss, for who calls Liger: an import changes, and nothing else.

    from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss              # before
    from orpo_kernels.integrations.liger import LigerFusedLinearORPOLoss        # after

Constructor, call and outputs are those of liger-kernel 0.8.5, which is not needed here. Where Liger
is right the numbers are its own. Where it is not they are finite and right: a pair with an empty
side counts for nothing, an answer the model is certain of has its exact gradient (Liger: NaN).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from orpo_kernels.constants import IGNORE_INDEX
from orpo_kernels.engine.mean_logits import mean_logits
from orpo_kernels.loss import orpo_loss
from orpo_kernels.options import check_flag, check_integer


class LigerORPOAuxiliaries(NamedTuple):
    """The nine outputs beside the loss, in Liger's order; float32, without graph.

    Attributes:
        chosen_logps: (P,) mean log-prob per scored token, nats.
        rejected_logps: (P,) the same of the rejected answers.
        chosen_logits_mean: () mean of the logits over pairs, positions and vocabulary.
        rejected_logits_mean: () the same.
        nll_loss: () nats per token; 0 without `compute_nll_loss`.
        chosen_rewards: (P,) `beta * chosen_logps`.
        rejected_rewards: (P,) `beta * rejected_logps`.
        log_odds_ratio: () mean over pairs of `log sigmoid` of the log odds ratio, <= 0.
        log_odds_chosen: () mean over pairs of the log odds ratio.
    """

    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_logits_mean: Tensor
    rejected_logits_mean: Tensor
    nll_loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    log_odds_ratio: Tensor
    log_odds_chosen: Tensor


class LigerFusedLinearORPOLoss(nn.Module):
    """The ORPO loss of stacked pairs with Liger's constructor, call and outputs.

    Args:
        ignore_index: label of positions that are not scored; may lie inside the vocabulary.
        beta: weight of the odds-ratio term.
        compute_nll_loss: whether the NLL is a part of the loss.
        compiled: Liger's; means nothing here, nothing is compiled.
        chunk_size: Liger's, at least 1; means nothing here, the workspace is fixed.
        workspace_bytes: as in `linear_logps`; not Liger's.

    Raises:
        TypeError: a value of another type.
        ValueError: a value out of range.
    """

    def __init__(
        self,
        ignore_index: int = IGNORE_INDEX,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
        *,
        workspace_bytes: int | None = None,
    ) -> None:
        super().__init__()
        check_integer("chunk_size", chunk_size, least=1)
        check_flag("compiled", compiled)
        self.ignore_index = ignore_index
        self.beta = beta
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.chunk_size = chunk_size
        self.workspace_bytes = workspace_bytes

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, LigerORPOAuxiliaries]:
        """The loss, and what Liger reports beside it.

        Args:
            lin_weight: (V, H) floating, the output projection.
            _input: (2P, T, H) floating, chosen first.
            target: (2P, T) integer, already shifted: of the odds ratio.
            bias: (V,) floating.
            nll_target: (2P, T) integer, of which the chosen half is read; default: `target`.

        Returns:
            0-dim loss with its graph, and the auxiliaries.

        Raises:
            ValueError: an odd number of sequences, which Liger broadcasts, and what `orpo_loss`
                refuses.
        """
        output = orpo_loss(
            _input, lin_weight, target, bias,
            nll_labels=nll_target, beta=self.beta, nll=self.compute_nll_loss,
            ignore_index=self.ignore_index, workspace_bytes=self.workspace_bytes,
        )  # fmt: skip
        mean = partial(mean_logits, workspace_bytes=self.workspace_bytes)
        means = mean(_input.detach(), lin_weight, bias).to(output.loss)
        chosen_mean, rejected_mean = means.view(2, -1).mean(1).unbind()
        return output.loss, LigerORPOAuxiliaries(
            output.chosen_logps,
            output.rejected_logps,
            chosen_mean,
            rejected_mean,
            output.nll_loss if self.compute_nll_loss else torch.zeros_like(output.nll_loss),
            output.chosen_rewards,
            output.rejected_rewards,
            output.mean_log_sigmoid,
            output.mean_log_odds_ratio,
        )

    def extra_repr(self) -> str:
        """The options, for `print`."""
        return (
            f"ignore_index={self.ignore_index}, beta={self.beta}, "
            f"compute_nll_loss={self.compute_nll_loss}"
        )
