"""Short runs on tiny models, of our trainer and of TRL's, and their comparison."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from datasets import Dataset
from trl.experimental.orpo import ORPOConfig as TRLConfig
from trl.experimental.orpo import ORPOTrainer as TRLTrainer

from orpo_kernels.training import ORPOConfig, ORPOTrainer
from tests.tiny_models import build, tiny_tokenizer

CLOCKS = ("_runtime", "_per_second", "total_flos", "train_tokens")
OURS_ONLY = ("skipped_pairs", "clamped_logps", "aux_loss")


def pairs(count: int, seed: int = 0, ragged: bool = True) -> Dataset:
    """Preference pairs of text; lengths of 8 to about 40 tokens, or all equal."""
    rng = random.Random(seed)
    words = ("dog", "fox", "sky", "two", "cat")
    rows = []
    for _ in range(count):
        if ragged:
            parts = [rng.choices(words, k=rng.randint(1, 6)) for _ in range(3)]
        else:
            parts = [rng.sample(words[:3], k=3) for _ in range(3)]
        rows.append({
            "prompt": "Say: " + " ".join(parts[0]),
            "chosen": " I am " + " ".join(parts[1]),
            "rejected": " No " + " ".join(parts[2]),
        })  # fmt: skip
    return Dataset.from_list(rows)


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    """Arguments that both trainers take: 5 steps, every one logged, a learning rate that shows."""
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "max_steps": 5,
        "logging_steps": 1,
        "learning_rate": 2e-3,
        "max_length": 64,
        **changes,
    }


def make(folder: Path, model: Any = "llama", *, trl: bool = False, **kwargs: Any) -> Any:
    """A trainer of a new tiny model. Keywords of the trainer by name, all others are arguments."""
    own = ("peft_config", "eval_dataset", "train_dataset", "callbacks", "compute_metrics")
    own += ("data_collator", "processing_class", "model_init", "preprocess_logits_for_metrics")
    options = {name: kwargs.pop(name) for name in own if name in kwargs}
    options.setdefault("train_dataset", pairs(24))
    options.setdefault("processing_class", tiny_tokenizer())
    name = kwargs.pop("name", None)  # of a model to load
    args = (TRLConfig if trl else ORPOConfig)(**settings(folder, **kwargs))
    model = name or (build(model) if isinstance(model, str) else model)
    return (TRLTrainer if trl else ORPOTrainer)(model=model, args=args, **options)


def history(trainer: Any) -> list[dict[str, float]]:
    """Train, and return what was logged."""
    trainer.train()
    return list(trainer.state.log_history)


def largest_difference(ours: list[dict[str, float]], trl: list[dict[str, float]]) -> float:
    """Over all logs and metrics, |ours - trl| / max(1, |trl|); both must log the same names."""
    assert len(ours) == len(trl) > 5
    worst = 0.0
    for one, other in zip(ours, trl, strict=True):
        names = {name for name in one if not name.endswith(OURS_ONLY)}
        assert names - {"train_tokens", "train_tokens_per_second"} == set(other)
        for name, value in other.items():
            if not name.endswith(CLOCKS):
                assert math.isfinite(one[name]), (name, one)
                worst = max(worst, abs(one[name] - value) / max(1.0, abs(value)))
    return worst
