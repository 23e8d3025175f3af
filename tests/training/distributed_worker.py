"""What each rank of `test_distributed.py` runs; results go to files, one for each rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset

from tests.training.runs import make, pairs

CASES: dict[str, dict[str, Any]] = {
    # 4 pairs for each step, however they are spread; 20 tokens: some rows have no answer left.
    "global": {"loss_normalization": "global", "max_length": 20},
    "micro_batch": {"loss_normalization": "micro_batch"},
    "mixture": {"loss_normalization": "global", "model": "mixtral", "learning_rate": 0.02},
}


def run(folder: Path, case: str, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """Three steps and an evaluation of 7 rows, which two ranks cannot share evenly."""
    options = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 3, "max_grad_norm": 1e9}
    options |= {"eval_dataset": pairs(7, seed=1)}
    trainer = make(folder, **{**options, **CASES[case], **changes})
    trainer.train()
    logs, metrics = trainer.state.log_history[:3], trainer.evaluate()
    stream = IterableDataset.from_generator(lambda: iter(pairs(7, seed=1)))
    return trainer, {"logs": logs, "eval": metrics, "streamed": trainer.evaluate(stream)}


def main(folder: Path) -> None:
    """Run every case."""
    for case in CASES:
        trainer, results = run(folder / case, case, ddp_backend="gloo")
        rank = trainer.args.process_index
        path = folder / f"{case}-{rank}"
        path.with_suffix(".json").write_text(json.dumps(results))
        torch.save(dict(trainer.model.state_dict()), path.with_suffix(".pt"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
