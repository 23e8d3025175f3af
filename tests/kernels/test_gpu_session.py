"""The one call for a rented GPU runs, here on a CPU: a session is too short to find a typo in."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import run
from tests.gpu import session


def test_dry_run(tmp_path):
    command = [sys.executable, "-m", "tests.gpu.session", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    session = json.loads((tmp_path / "session.json").read_text())
    assert [step["exit"] for step in session] == [0] * 4
    assert done.stdout.endswith((tmp_path / "budgets.txt").read_text())
    modes = {row["mode"] for row in json.loads((tmp_path / "budgets.json").read_text())["results"]}
    assert modes == {"frozen", "trainable", "eval"}
    models = json.loads((tmp_path / "models.json").read_text())["results"]
    assert [row["loss"] for row in models] == ["TRL ORPO", "ours, 64 MiB", "ours, default"]
    names = {kernel["name"].split()[0] for kernel in _rows(tmp_path)}
    assert names == {
        "softmax_stats", "softmax_grad_", "column_sums", "sequence_mean", "odds_ratio", "pair_loss",
    }  # fmt: skip
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [each["name"] for each in rows["gemm"]] == ["linear_lse plain torch"]
    assert {each["name"].split()[0] for each in rows["sparse"]} == {
        "linear_logps",
    }  # fmt: skip


def test_what_a_dry_run_leaves_out(monkeypatch):
    # The sanitizer's selection holds every kernel, the benchmarks' arguments are theirs.
    monkeypatch.setattr(session.shutil, "which", lambda name: f"/bin/{name}")
    steps = {step.name: step for step in session.steps(Path("out"), 9.0, dry_run=False)}
    assert list(steps) == ["tests", "budgets", "models", "rows", "sanitizer", "benchmarks"]
    assert sum(step.share for step in steps.values()) <= 1.0
    sanitizer, *rest = steps["sanitizer"].command
    small = rest[rest.index(sys.executable) :]
    assert sanitizer == "/bin/compute-sanitizer"
    done = subprocess.run(
        [*small, "--collect-only"], cwd=session.REPOSITORY, capture_output=True, text=True
    )
    chosen = {
        line.split("::")[1].split("[")[0] for line in done.stdout.splitlines() if "::" in line
    }
    assert chosen == {
        "test_stats_and_gradient", "test_column_sums", "test_sequence_mean", "test_odds_ratio",
        "test_pair_loss", "test_a_store_without_room",
    }  # fmt: skip
    options = run._parse(steps["benchmarks"].command[3:])
    assert (options.device, options.results) == ("cuda", "out")


def _rows(folder):
    return json.loads((folder / "rows.json").read_text())["kernels"]
