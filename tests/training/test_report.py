import json
import sys

import pytest
import torch

from orpo_kernels.training import report

HISTORY = [
    {"step": 0, "eval_loss": 2.0, "eval_logps/chosen": -1.5, "eval_rewards/accuracies": 0.5},
    {"step": 1, "loss": 2.1, "nll_loss": 1.9, "logps/chosen": -1.4, "logps/rejected": -1.4,
     "log_odds_chosen": 0.0, "rewards/accuracies": 0.4, "rewards/margins": 0.0},
    {"step": 2, "loss": 1.8, "nll_loss": 1.7, "logps/chosen": -1.2, "logps/rejected": -1.6,
     "log_odds_chosen": 0.5, "rewards/accuracies": 0.7, "rewards/margins": 0.04},
    {"step": 2, "eval_loss": 1.7, "eval_logps/chosen": -1.1, "eval_rewards/accuracies": 0.8},
    {"step": 2, "train_runtime": 3.0, "train_loss": 1.9},
]  # fmt: skip


class State:
    log_history = HISTORY
    global_step = 2
    epoch = 1.0


@pytest.fixture
def metrics():
    train = {"train_tokens": 300.0, "train_tokens_per_second": 100.0}
    return report.collect(State, train, 4.2, torch.device("cpu"))


def write_run(folder, history=HISTORY):
    folder.mkdir()
    (folder / report.STATE_FILE).write_text(json.dumps({"log_history": history}))
    return folder


def test_curves_separate_training_from_evaluation():
    train, evaluations = report.curves(HISTORY)
    assert [entry["step"] for entry in train] == [1, 2]
    assert [entry["step"] for entry in evaluations] == [0, 2]
    assert evaluations[1]["loss"] == 1.7
    assert not any(key.startswith("eval_") for entry in evaluations for key in entry)


def test_a_step_logged_twice_counts_once_in_order():
    # A resumed run repeats steps after its last checkpoint.
    train, _ = report.curves([{"step": 2, "loss": 1.0}, {"step": 1, "loss": 3.0}, HISTORY[2]])
    assert [(entry["step"], entry["loss"]) for entry in train] == [(1, 3.0), (2, 1.8)]


def test_collect(metrics):
    assert metrics["steps"] == 2
    assert metrics["train"]["loss"] == 1.8
    assert metrics["eval_first"]["loss"] == 2.0
    assert metrics["eval_last"]["loss"] == 1.7
    assert metrics["train_tokens_per_second"] == 100.0
    assert metrics["peak_rss_bytes"] > 2**27  # torch alone takes more
    json.dumps(metrics)


def test_collect_without_any_log():
    class Empty(State):
        log_history = ()

    metrics = report.collect(Empty, {}, 0.1, torch.device("cpu"))
    assert metrics["train"] is None
    assert "tokens/s             -" in report.table(metrics)


def test_table_names_units_and_columns(metrics):
    text = report.table(metrics)
    assert "tokens/s             100" in text
    assert "peak memory (RSS)" in text
    assert "GiB" in text
    assert "eval, step 0" in text
    assert "train, step 2" in text
    accuracies = next(line for line in text.splitlines() if line.startswith("rewards/acc"))
    assert accuracies.split()[1:] == ["0.7000", "0.5000", "0.8000"]


def test_draw_report_and_comparison(tmp_path):
    pytest.importorskip("matplotlib")
    folder = write_run(tmp_path / "orpo")
    without_eval = write_run(tmp_path / "sft", HISTORY[1:3])
    for folders in ([folder], [without_eval], [folder, without_eval]):
        path = tmp_path / f"{len(folders)}{folders[0].name}.png"
        assert str(path) in report.draw(folders, path)
        assert path.read_bytes().startswith(b"\x89PNG")
        assert 10_000 < path.stat().st_size < 1_000_000


def test_runs_of_the_same_name_are_told_apart(tmp_path):
    pytest.importorskip("matplotlib")
    for parent in ("a", "b"):
        (tmp_path / parent).mkdir()
    folders = [write_run(tmp_path / parent / "orpo") for parent in ("a", "b")]
    assert len(report.named_histories(folders)) == 2


def test_no_matplotlib_is_a_sentence_not_an_error(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    monkeypatch.delitem(sys.modules, "orpo_kernels.training.plots", raising=False)
    monkeypatch.delattr("orpo_kernels.training.plots", raising=False)
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    sentence = report.draw([folder], tmp_path / "report.png")
    assert "orpo_kernels[plot]" in sentence
    assert f"orpo-kernels report {folder}" in sentence
    assert not (tmp_path / "report.png").exists()


def test_read_history_rejects(tmp_path):
    with pytest.raises(FileNotFoundError, match="output folder of a run"):
        report.read_history(tmp_path)
    (tmp_path / report.STATE_FILE).write_text("{}")
    with pytest.raises(ValueError, match="written by Trainer"):
        report.read_history(tmp_path)
