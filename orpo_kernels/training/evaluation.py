"""An evaluation counts every pair once, also of a stream that the ranks cannot share evenly.

Of a dataset with a length, `accelerate` knows which pairs it has repeated to fill the last batches,
and `gather_for_metrics` drops them. A stream has no length, so it is filled up here, before it is
shared out: with pairs that are marked, have no scored token, and are left out of every sum.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers.trainer_utils import EvalLoopOutput

from orpo_kernels.constants import IGNORE_INDEX
from orpo_kernels.training.collator import PADDING
from orpo_kernels.training.metrics import MetricSums


class EvenStream(IterableDataset[dict[str, Any]]):
    """The rows of a stream, and as many marked copies of the last as make full batches.

    Args:
        rows: prepared, with the columns `COLUMNS`.
        multiple: pairs in one batch of all ranks.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], multiple: int) -> None:
        self._rows, self._multiple = rows, multiple

    def __iter__(self) -> Iterator[dict[str, Any]]:
        count, row = 0, {}
        for row in self._rows:
            yield {**row, PADDING: False}
            count += 1
        unscored = {
            name: [IGNORE_INDEX] * len(value) for name, value in row.items() if "labels" in name
        }
        for _ in range(-count % self._multiple):
            yield {**row, **unscored, PADDING: True}


class EvaluationSums:
    """Adds up the loss and the metrics of an evaluation.

    Args:
        metrics: empty.
    """

    def __init__(self, metrics: MetricSums) -> None:
        self._metrics = metrics
        self._loss: Tensor | None = None

    def add(
        self,
        table: Tensor,
        loss: Tensor,
        padding: Tensor | None,
        gather: Callable[[Tensor], Tensor],
    ) -> None:
        """Add a batch.

        Args:
            table: (P, columns) from `pair_table`.
            loss: 0-dim, of the batch.
            padding: (P,) bool, the pairs to leave out; None: none.
            gather: collects a (P, ...) tensor from all ranks, without what they have repeated.
        """
        pairs = len(table)
        weighed = torch.stack((loss.to(table), torch.ones_like(loss).to(table))).expand(pairs, 2)
        rows = torch.cat((table, weighed), dim=1)
        if padding is not None:
            rows = torch.where(padding[:, None], 0.0, rows)
        rows = gather(rows)
        self._metrics.add(rows[:, :-2])
        total = rows[:, -2:].sum(0)
        self._loss = total if self._loss is None else self._loss + total

    def finish(self, output: EvalLoopOutput, prefix: str, streamed: bool) -> EvalLoopOutput:
        """The loop's output with the metrics.

        Args:
            output: of `Trainer.evaluation_loop`.
            prefix: of the metrics' names.
            streamed: whether the dataset has no length. Trainer's loss then gives the last batch
                the weight of a full one, and its count of pairs is that of one rank.

        Returns:
            The same, with metrics added; of a stream with another loss and count.
        """
        metrics: dict[str, float] = dict(output.metrics or {})
        metrics |= {f"{prefix}_{name}": value for name, value in self._metrics.pop().items()}
        output = output._replace(metrics=metrics)
        if not streamed or self._loss is None:
            return output
        total, count = self._loss.tolist()
        metrics[f"{prefix}_loss"] = total / count
        return output._replace(num_samples=int(count))
