"""What each rank of `test_distributed.py` runs; results go to files, one for each rank."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset

from tests.helpers import leave
from tests.training.runs import make, pairs

CASES: dict[str, dict[str, Any]] = {
    # 4 pairs for each step, however they are spread; 20 tokens: some rows have no answer left.
    "global": {"loss_normalization": "global", "max_length": 20},
    "micro_batch": {"loss_normalization": "micro_batch"},
    "shared": {"loss_normalization": "global", "batch_layout": "shared_prompt"},
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


def run_to_the_end(folder: Path, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """One epoch of 7 pairs: on two ranks the last batch is filled up with the first pair.

    The results are the logs and, for each, the log-probs of the pairs that this rank trained on.
    """
    options = {"max_steps": -1, "num_train_epochs": 1, "train_dataset": pairs(7)}
    options |= {"learning_rate": 0.0}  # so that a pair keeps its log-probs
    trainer = make(folder, **{**options, **changes})
    compute_loss, seen = trainer.compute_loss, []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        loss, output = compute_loss(*args, return_outputs=True, **kwargs)
        seen.append([output.orpo.chosen_logps.tolist(), output.orpo.rejected_logps.tolist()])
        return loss

    trainer.compute_loss = recorded
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    return trainer, {"logs": logs, "seen": seen}


def main(folder: Path) -> None:
    """Run every case."""
    trainer, results = run_to_the_end(folder / "padded", ddp_backend="gloo")
    path = folder / f"padded-{trainer.args.process_index}.json"
    path.write_text(json.dumps(results))
    for case in CASES:
        trainer, results = run(folder / case, case, ddp_backend="gloo")
        rank = trainer.args.process_index
        path = folder / f"{case}-{rank}"
        path.with_suffix(".json").write_text(json.dumps(results))
        # A model that is fused for its trainer's calls only, also beneath DDP.
        assert trainer.model(input_ids=torch.ones(3, 2).long(), labels=torch.ones(3, 2).long()).loss
        torch.save(dict(trainer.model.state_dict()), path.with_suffix(".pt"))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
