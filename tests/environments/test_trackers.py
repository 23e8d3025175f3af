"""`report_to`: W&B, offline, and TensorBoard get every metric of a run of the command line.

Runs in the environment of `make setup-trackers`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from orpo_kernels import cli
from tests.environments.runs import save_conversations, save_model

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("wandb") and importlib.util.find_spec("tensorboard")),
    reason="needs the environment of make setup-trackers",
)
METRICS = ("rewards/accuracies", "log_odds_chosen", "nll_loss", "skipped_pairs")


def train(folder: Path, tracker: str) -> None:
    save_model(folder / "base", "llama")
    save_conversations(folder / "pairs.jsonl")
    words = [
        "train", f"--model_name_or_path={folder}/base", f"--dataset_name={folder}/pairs.jsonl",
        f"--output_dir={folder}/out", "--max_steps=3", "--logging_steps=1", "--use_cpu=true",
        "--gradient_checkpointing=false", "--disable_tqdm=true", f"--report_to={tracker}",
        "--max_length=64", "--eval_fraction=0.25", "--eval_strategy=steps", "--eval_steps=2",
    ]  # fmt: skip
    assert cli.main(words) == 0


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    train(tmp_path, "wandb")
    wandb.teardown()  # waits for the process that writes, which finish() does not
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    written = log.read_bytes()  # records of protobuf, their names as they are
    for name in METRICS:
        assert f"train/{name}".encode() in written
        assert f"eval/{name}".encode() in written


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    train(tmp_path, "tensorboard")
    (log,) = (tmp_path / "events").rglob("events.out.tfevents.*")
    events = EventAccumulator(str(log)).Reload()
    for name in METRICS:
        assert [event.step for event in events.Scalars(f"train/{name}")] == [1, 2, 3]
        assert events.Scalars(f"eval/{name}")[0].step == 2
