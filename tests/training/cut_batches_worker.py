"""What each rank of `test_cut_batches.py` runs: a stock Trainer on a stream, its batches cut."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from transformers import Trainer, TrainingArguments

from orpo_kernels import ORPOLoss, fuse_head
from orpo_kernels.pair_batch import stack_batch
from orpo_kernels.training import PreferenceCollator, prepare_dataset
from tests.helpers import leave
from tests.tiny_models import build, tiny_tokenizer
from tests.training.runs import pairs, settings

ROWS = pairs(7, ragged=False)  # of one length: the mean of two ranks' means is the mean of all
# Batches of 4 pairs over both ranks: joined from two and cut, or made whole and cut.
CASES: dict[str, dict[str, Any]] = {
    "dispatch": {"per_device_train_batch_size": 2, "split_batches": False},
    "split": {"per_device_train_batch_size": 4, "split_batches": True},
}


def run(folder: Path, rows: Any, stacked: bool = False, **changes: Any) -> Trainer:
    """Two steps of 4 pairs."""
    tokenizer = tiny_tokenizer()
    collator: Any = PreferenceCollator(tokenizer)
    if stacked:  # as most preference trainers do: P chosen, then P rejected
        collate, collator = collator, lambda rows: stack_batch(collate(rows))
    stream = IterableDataset.from_generator(lambda: iter(rows))
    split = changes.pop("split_batches", None)
    if split is not None:
        changes["accelerator_config"] = {"dispatch_batches": True, "split_batches": split}
    options = settings(folder, max_steps=2, optim="sgd", learning_rate=0.05, **changes)
    max_length = options.pop("max_length")
    model = build("llama")
    fuse_head(model, loss=ORPOLoss(beta=0.5))
    trainer = Trainer(
        model,
        TrainingArguments(**options, remove_unused_columns=False),
        data_collator=collator,
        train_dataset=prepare_dataset(stream, tokenizer, max_length=max_length),
    )
    trainer.train()
    return trainer


def main(folder: Path, case: str) -> None:
    """Run a case and save the model of this rank."""
    stacked = case == "stacked"
    options = CASES["split" if stacked else case]
    trainer = run(folder / case, ROWS, stacked, **options, ddp_backend="gloo")
    torch.save(dict(trainer.model.state_dict()), folder / f"{case}-{trainer.args.process_index}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
