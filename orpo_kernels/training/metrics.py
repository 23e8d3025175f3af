"""The metrics TRL's ORPO trainer logs, summed on the device between two logs.

A batch becomes a table with one row for each pair. Tables can be gathered across ranks like any
other per-sample tensor; their column sums can be added up and all-reduced. The means are taken,
and the host waits for the device, when a log is written, never in between.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.loss import ORPOOutput

PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "log_odds_ratio",
    "log_odds_chosen",
)
"""Means over the scored pairs. `log_odds_ratio` is TRL's name of minus the odds-ratio loss,
`log_odds_chosen` its name of the log odds ratio."""

ROW_METRICS = ("logits/chosen", "logits/rejected")
"""Means over all pairs, of the mean logit over vocabulary and positions (padding included)."""

SPARSE_METRICS = ("sparse/kept_share", "sparse/tail_mass", "sparse/residual_rms")
"""Means over the rows of a batch, of `ORPOOutput.sparse`; only with a sparse gradient."""

BATCH_METRICS = ("nll_loss", "aux_loss", *SPARSE_METRICS)
"""Means over batches, weighted as the loss weights them."""

COUNTS = ("skipped_pairs", "clamped_logps")
"""Totals: pairs with an empty side, mean log-probs so near 0 that they were clamped."""


def pair_table(
    orpo: ORPOOutput,
    beta: float,
    *,
    mean_logits: Tensor | None = None,
    aux_loss: Tensor | None = None,
    weight: Tensor | float | None = None,
) -> Tensor:
    """One row of metric terms for each pair of a batch; their column sums go to `MetricSums`.

    Args:
        orpo: the batch's loss.
        beta: weight of the odds-ratio term; a reward is beta * mean log-prob.
        mean_logits: (2P,) floating, one for each sequence.
        aux_loss: 0-dim floating, weighted like the NLL.
        weight: what the batch weighs in the means over batches; `orpo.nll_loss` is already
            multiplied by it (a share of the step's). None: one for each pair, not multiplied yet.

    Returns:
        (P, columns) float32 without graph, the columns of `MetricSums`.
    """
    chosen, rejected, ratio = orpo.chosen_logps, orpo.rejected_logps, orpo.log_odds_ratio
    pairs, scored = len(chosen), orpo.pair_mask
    per_pair = (
        beta * chosen,
        beta * rejected,
        # TRL compares the rewards, which says the same unless beta is 0.
        (chosen > rejected).to(chosen.dtype),
        beta * (chosen - rejected),
        chosen,
        rejected,
        F.logsigmoid(ratio),
        ratio,
    )
    absent = chosen.new_full((), float("nan"))
    logits = (absent, absent) if mean_logits is None else mean_logits.view(2, pairs)
    nll = orpo.nll_loss if weight is None else orpo.nll_loss / pairs
    share = chosen.new_ones(()) if weight is None else chosen.new_ones(()) * weight / pairs
    aux = absent if aux_loss is None else aux_loss * share
    sparse = [absent] * len(SPARSE_METRICS)
    if orpo.sparse is not None:
        names = (name.removeprefix("sparse/") for name in SPARSE_METRICS)
        sparse = [getattr(orpo.sparse, name).to(share) * share for name in names]
    columns = [
        *(torch.where(scored, value, 0.0) for value in per_pair),
        scored,
        *logits,
        chosen.new_ones(()),
        nll,
        aux,
        *sparse,
        share,
        ~scored,
        orpo.clamped_logps / pairs,
    ]
    table = [column.detach().to(chosen).expand(pairs) for column in columns]
    return torch.stack(table, dim=1)


class MetricSums:
    """Column sums of `pair_table` over the batches since the last `pop`."""

    def __init__(self) -> None:
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
        return _means(sums.tolist())


def _means(sums: Sequence[float]) -> dict[str, float]:
    values = iter(sums)

    def take(names: Sequence[str]) -> dict[str, float]:
        return {name: next(values) for name in names}

    means: dict[str, float] = {}
    for names in (PAIR_METRICS, ROW_METRICS, BATCH_METRICS):
        totals, weight = take(names), next(values)
        for name, total in totals.items():
            # What no batch reported was summed as NaN.
            absent = math.isnan(total) and name in (*ROW_METRICS, "aux_loss", *SPARSE_METRICS)
            if not absent:
                means[name] = total / weight if weight else math.nan
    # A count enters the table divided by the number of rows, so its sum is rounded.
    return means | {name: float(round(total)) for name, total in take(COUNTS).items()}
