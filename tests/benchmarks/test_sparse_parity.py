"""The parity runs, without the training: what is read, compared and drawn of finished ones."""

import json

import pytest

from benchmarks import sparse_parity
from benchmarks.results import latest_runs


@pytest.fixture
def finished(tmp_path, monkeypatch):
    """Eighteen runs whose metrics are the seed; sparse ones are 0.5 higher on `full`."""
    monkeypatch.setattr(sparse_parity, "prepare", lambda *args, **kwargs: None)
    for kind, gradient, seed, folder in sparse_parity.runs(tmp_path):
        more = 0.5 if (kind, gradient) == ("full", "sparse") else 0.0
        metrics = dict.fromkeys(sparse_parity.METRICS, 2.0 * seed + more)
        kept = {"sparse/kept_share": 0.1, "sparse/tail_mass": 0.2, "sparse/residual_rms": 0.3}
        log = [
            {"step": 1, **metrics, **kept},
            {"step": 1, **{f"eval_{k}": v for k, v in metrics.items()}},
        ]
        folder.mkdir()
        (folder / "metrics.json").write_text(json.dumps({"eval_last": metrics}))
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    return tmp_path


def main(folder):
    results = folder / "results" / "machine" / sparse_parity.FILE
    status = sparse_parity.main([
        "pairs.jsonl", f"--out={folder}", f"--results={results}", f"--picture={folder}/p.png",
    ])  # fmt: skip
    return status, json.loads(results.read_text())


def test_finished_runs_are_compared_not_repeated(finished):
    # Seeds 1, 2, 3 give 2, 4, 6: a standard deviation of 2, four times the difference.
    status, found = main(finished)
    assert status == 0
    assert len(found["runs"]) == 18
    rows = {(row["kind"], row["metric"]): row for row in found["summary"]}
    assert len(rows) == 3 * len(sparse_parity.METRICS)
    assert rows["full", "loss"]["difference"] == pytest.approx(0.5)
    assert rows["demo", "loss"]["difference"] == 0
    assert rows["full", "loss"]["noise"] == pytest.approx(2.0)
    assert (finished / "p.png").read_bytes().startswith(b"\x89PNG")
    assert latest_runs(finished / "results") == []  # not a benchmark of times


def test_everything_kept_is_no_comparison(finished):
    for seed in sparse_parity.SEEDS:
        path = finished / f"real-sparse-{seed}" / "trainer_state.json"
        path.write_text(
            path.read_text().replace('"sparse/kept_share": 0.1', '"sparse/kept_share": 1')
        )
    status, found = main(finished)
    assert status == 1
    assert [row["kept_share"] for row in found["left_out"]] == pytest.approx([0.1, 1.0, 0.1])


def test_a_difference_over_the_noise_fails(finished):
    for seed in sparse_parity.SEEDS:
        path = finished / f"real-sparse-{seed}" / "metrics.json"
        path.write_text(json.dumps({"eval_last": dict.fromkeys(sparse_parity.METRICS, 9.0)}))
    status, found = main(finished)
    assert status == 1
    assert {row["kind"] for row in found["summary"] if not row["within_noise"]} == {"real"}


def test_a_failed_run_ends_all(tmp_path, monkeypatch):
    monkeypatch.setattr(sparse_parity.cli, "main", lambda words: 2)
    with pytest.raises(SystemExit):
        sparse_parity.train(sparse_parity.KINDS["full"], "sparse", 1, tmp_path / "run", ())
