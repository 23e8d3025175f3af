"""The metrics TRL's ORPO trainer logs, summed on the device between two logs.

A batch becomes a table with one row for each pair. Tables can be gathered across ranks like any
other per-sample tensor; their column sums can be added up and all-reduced. The means are taken,
and the host waits for the device, when a log is written, never in between.

Every mean has a column for its weight, which is 0 in a batch that does not report the values: what
no batch reported is left out of the log, and what is NaN is logged as NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.loss_output import ORPOOutput

PAIR_METRICS = (
    "logps/chosen",
    "logps/rejected",
    "log_odds_ratio",
    "log_odds_chosen",
    "rewards/accuracies",
)
"""Means over the scored pairs. `log_odds_ratio` is TRL's name of minus the odds-ratio loss,
`log_odds_chosen` its name of the log odds ratio."""

ROW_METRICS = ("logits/chosen", "logits/rejected")
"""Means over all pairs, of the mean logit over vocabulary and positions (padding included)."""

AUX_METRICS = ("aux_loss",)
"""Mean over batches, weighted as the loss weights them; of mixtures of experts."""

SPARSE_METRICS = ("sparse/kept_share", "sparse/tail_mass", "sparse/residual_rms")
"""Means over the rows of a batch, of `ORPOOutput.sparse`; with a sparse gradient."""

LAYOUT_METRICS = ("batch/computed_share", "batch/unshared_pairs")
"""Tokens computed, over those of the padded batches, and a count of pairs; of batches that were not
computed padded."""

# Means by the column of their weight.
_MEANS = {
    "pairs": PAIR_METRICS,
    "with_logits": ROW_METRICS,
    "with_aux": AUX_METRICS,
    "with_sparse": SPARSE_METRICS,
    "padded_tokens": LAYOUT_METRICS[:1],
    "share": ("nll_loss",),
}
_OPTIONAL = ("with_logits", "with_aux", "with_sparse", "padded_tokens")
_COLUMNS = (
    *PAIR_METRICS, "pairs", *ROW_METRICS, "with_logits", *AUX_METRICS, "with_aux",
    *SPARSE_METRICS, "with_sparse", "share", "nll_loss", "clamped_logps", *LAYOUT_METRICS,
    "padded_tokens", "rows",
)  # fmt: skip

_LAYOUT = ("computed_tokens", "unshared_pairs", "padded_tokens")  # as the columns are
_UNSHARED = LAYOUT_METRICS[1]


def pair_table(
    orpo: ORPOOutput,
    *,
    mean_logits: Tensor | None = None,
    aux_loss: Tensor | None = None,
    weight: Tensor | float | None = None,
    is_share: bool = False,
    layout: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """One row of metric terms for each pair of a batch; their column sums go to `MetricSums`.

    Args:
        orpo: the batch's loss.
        mean_logits: (P, 2) floating, chosen and rejected of each pair.
        aux_loss: 0-dim floating, weighted like the NLL.
        weight: what the batch weighs in the means over batches. None: one for each pair.
        is_share: whether `orpo.nll_loss` is multiplied by the weight already.
        layout: (1,) `layout_terms` of a fused call that was not computed padded.

    Returns:
        (P, columns) float32 without graph, the columns of `MetricSums`.
    """
    chosen, rejected, ratio = orpo.chosen_logps, orpo.rejected_logps, orpo.log_odds_ratio
    pairs, scored = len(chosen), orpo.pair_mask
    # TRL compares the rewards, which says the same unless beta is 0.
    preferred = chosen > rejected
    terms = torch.stack((chosen, rejected, F.logsigmoid(ratio), ratio, preferred, scored), 1)
    zeros, ones = chosen.new_zeros(3), chosen.new_ones(1)

    def reported(names: Sequence[str], values: Sequence[Tensor] | None) -> list[Tensor]:
        """The values and their weight, before the batch's own weight."""
        if values is None:
            return [zeros[0]] * (len(names) + 1)
        return [*(value.detach().to(chosen) for value in values), ones[0]]

    fields = None
    if orpo.sparse is not None:
        fields = [getattr(orpo.sparse, name.removeprefix("sparse/")) for name in SPARSE_METRICS]
    aux = reported(AUX_METRICS, None if aux_loss is None else (aux_loss,))
    batch = torch.stack((*aux, *reported(SPARSE_METRICS, fields), ones[0]))
    nll = orpo.nll_loss
    if weight is not None:
        batch, nll = batch * (weight / pairs), nll * ((1.0 if is_share else weight) / pairs)
    logits = zeros[:2].expand(pairs, 2) if mean_logits is None else mean_logits
    with_logits = zeros[:1] if mean_logits is None else ones
    clamped = orpo.clamped_logps / pairs
    counts = zeros
    if layout is not None:
        counts = torch.cat([layout[name] for name in _LAYOUT]).to(chosen) / pairs
    rest = (with_logits, batch, torch.stack((nll, clamped)), counts, ones)
    columns = (
        torch.where(scored[:, None], terms, 0.0),
        logits.detach().to(chosen),
        *(each.expand(pairs, -1) for each in rest),
    )
    return torch.cat(columns, 1)


class MetricSums:
    """Column sums of `pair_table` over the batches since the last `pop`.

    Args:
        beta: weight of the odds-ratio term; a reward is beta times a mean log-prob.
    """

    def __init__(self, beta: float) -> None:
        self._beta = beta
        self._sums: Tensor | None = None

    def add(self, table: Tensor) -> None:
        """Add a batch.

        Args:
            table: (P, columns) from `pair_table`, of this rank or gathered.
        """
        # MPS has no float64; everywhere else sums of many steps stay exact.
        dtype = torch.float32 if table.device.type == "mps" else torch.float64
        sums = table.sum(0, dtype=dtype)
        self._sums = sums if self._sums is None else self._sums + sums

    def pop(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """The means since the last call; the only place where the host waits for the device.

        Args:
            reduce: sums a tensor over the ranks.

        Returns:
            Metric names to values, empty if nothing was added. The means over pairs are NaN when
            no pair was scored; metrics that no batch reported are left out.
        """
        if self._sums is None:
            return {}
        sums = self._sums if reduce is None else reduce(self._sums)
        self._sums = None
        return self._means(dict(zip(_COLUMNS, sums.tolist(), strict=True)))

    def _means(self, sums: dict[str, float]) -> dict[str, float]:
        means: dict[str, float] = {}
        for column, names in _MEANS.items():
            weight = sums[column]
            if weight or column not in _OPTIONAL:
                means |= {name: sums[name] / weight if weight else math.nan for name in names}
        chosen, rejected = (self._beta * means[f"logps/{side}"] for side in ("chosen", "rejected"))
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            **means,
            "skipped_pairs": float(round(sums["rows"] - sums["pairs"])),
            # Each row of a table has a share of it, so the sum is rounded.
            "clamped_logps": float(round(sums["clamped_logps"])),
            **({_UNSHARED: float(round(sums[_UNSHARED]))} if sums["padded_tokens"] else {}),
        }
