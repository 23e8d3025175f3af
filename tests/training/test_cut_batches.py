"""Two gloo ranks whose batches `accelerate` cuts along dimension 0, against one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.training.cut_batches_worker import CASES, ROWS, run

pytestmark = pytest.mark.slow  # two processes that import torch and transformers, three times

ROOT = Path(__file__).parents[2]


def launch(folder: Path, case: str) -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = ["-m", "tests.training.cut_batches_worker", str(folder), case]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [*launcher, *worker], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
    )


@pytest.mark.parametrize("case", CASES)
def test_ranks_train_on_whole_pairs(case: str, tmp_path: Path) -> None:
    done = launch(tmp_path, case)
    assert done.returncode == 0, done.stderr[-3000:]
    states = [torch.load(tmp_path / f"{case}-{rank}.pt") for rank in (0, 1)]
    # The stream ends within the second step; accelerate fills it up from the first batch.
    rows = [*ROWS, ROWS[0]]
    alone = run(tmp_path / "alone", rows, per_device_train_batch_size=4).model.state_dict()
    for name, value in alone.items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], value, rtol=1e-5, atol=2e-6)


def test_stacked_batch_is_refused_before_a_gradient(tmp_path: Path) -> None:
    done = launch(tmp_path, "stacked")
    assert done.returncode != 0
    assert "nll_labels must be -100 in the rejected sequences" in done.stderr
    assert "cut along dimension 0 since (dispatch_batches, split_batches)" in done.stderr
    assert not list(tmp_path.glob("stacked-*.pt"))
