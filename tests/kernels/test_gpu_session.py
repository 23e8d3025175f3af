"""The one call for a rented GPU runs, here on a CPU: a session is too short to find a typo in."""

import json
import subprocess
import sys


def test_dry_run(tmp_path):
    command = [sys.executable, "-m", "tests.gpu.session", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert [step["exit"] for step in json.loads((tmp_path / "session.json").read_text())] == [0, 0]
    names = {kernel["name"].split()[0] for kernel in _rows(tmp_path)}
    assert names == {
        "softmax_stats", "softmax_grad_", "column_sums", "sequence_mean", "odds_ratio",
    }  # fmt: skip


def _rows(folder):
    return json.loads((folder / "rows.json").read_text())["kernels"]
