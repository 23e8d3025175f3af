"""An evaluation counts every pair once: the last batch of a stream, and what fills it up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from transformers.trainer_utils import EvalLoopOutput

from orpo_kernels.training import PreferenceCollator, prepare_dataset
from orpo_kernels.training.collator import PADDING
from orpo_kernels.training.data import COLUMNS
from orpo_kernels.training.evaluation import EvaluationSums, EvenStream
from orpo_kernels.training.metrics import MetricSums
from tests.tiny_models import tiny_tokenizer
from tests.training.runs import CLOCKS, make, pairs

ROWS = pairs(7, seed=1)  # batches of 4 and 3


def stream() -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(ROWS))


@pytest.mark.parametrize("dropped", [False, True])
def test_stream_equals_dataset(dropped: bool, tmp_path: Path) -> None:
    # With 12 tokens, some pairs have no answer left.
    trainer = make(tmp_path, max_length=12 if dropped else 64)
    whole, streamed = trainer.evaluate(ROWS), trainer.evaluate(stream())
    assert whole.keys() == streamed.keys()
    assert (whole["eval_skipped_pairs"] > 0) == dropped
    for name, value in whole.items():
        if not name.endswith(CLOCKS):
            assert streamed[name] == pytest.approx(value, rel=1e-6), name


def test_samples_of_a_stream_are_pairs(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    metrics = trainer.evaluate(stream())
    assert metrics["eval_samples_per_second"] * metrics["eval_runtime"] == pytest.approx(7, rel=0.1)
    output = trainer.predict(stream())
    assert output.predictions.shape == (7, 2)


@pytest.mark.parametrize(("multiple", "padding"), [(1, 0), (7, 0), (4, 1), (6, 5), (16, 9)])
def test_even_stream(multiple: int, padding: int) -> None:
    prepared = prepare_dataset(stream(), tiny_tokenizer(), max_length=64)
    rows = list(EvenStream(prepared, multiple))
    assert len(rows) % multiple == 0
    assert [row.pop(PADDING) for row in rows] == [False] * 7 + [True] * padding
    assert rows[:7] == list(prepared)
    for row in rows[7:]:
        assert row["chosen_input_ids"] == rows[6]["chosen_input_ids"]
        assert {*row["chosen_labels"], *row["rejected_labels"]} == {-100}


def test_empty_stream_stays_empty() -> None:
    assert list(EvenStream([], 4)) == []


def test_collator_passes_the_mark_on() -> None:
    row: dict[str, Any] = {column: [5, 6] for column in COLUMNS}
    batch = PreferenceCollator(pad_token_id=0)([{**row, PADDING: False}, {**row, PADDING: True}])
    assert batch[PADDING].tolist() == [False, True]
    assert PADDING not in PreferenceCollator(pad_token_id=0)([row])


class Tables(MetricSums):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.tables: list[torch.Tensor] = []

    def add(self, table: torch.Tensor) -> None:
        self.tables.append(table)

    def pop(self, reduce: Any = None) -> dict[str, float]:
        return {"seen": sum(float(table.sum()) for table in self.tables)}


def test_marked_pairs_are_in_no_sum() -> None:
    sums, gathered = EvaluationSums(Tables()), []

    def gather(rows: torch.Tensor) -> torch.Tensor:
        gathered.append(len(rows))
        return rows

    sums.add(torch.ones(3, 2), torch.tensor(2.0), None, gather)
    sums.add(torch.ones(3, 2), torch.tensor(5.0), torch.tensor([False, True, True]), gather)
    assert gathered == [3, 3]  # so that all ranks gather equally many
    loop = EvalLoopOutput(None, None, {"eval_loss": 3.5}, 6)  # type: ignore[arg-type]
    assert sums.finish(loop, "eval", streamed=False).metrics == {"eval_loss": 3.5, "eval_seen": 8}
    output = sums.finish(loop, "eval", streamed=True)
    assert output.metrics == {"eval_loss": (2 * 3 + 5) / 4, "eval_seen": 8}
    assert output.num_samples == 4
