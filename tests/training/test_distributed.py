"""Two gloo ranks on the CPU against one process with the same pairs in every step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.distributed_worker import CASES, run

pytestmark = pytest.mark.slow  # two processes that import torch and transformers

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: Any) -> Path:
    folder: Path = tmp_path_factory.mktemp("ranks")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    worker = ["-m", "tests.training.distributed_worker", str(folder)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env |= {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launcher, *worker], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def of_rank(folder: Path, case: str, rank: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    path = folder / f"{case}-{rank}"
    return json.loads(path.with_suffix(".json").read_text()), torch.load(path.with_suffix(".pt"))


@pytest.mark.parametrize("case", CASES)
def test_ranks_stay_equal(case: str, ranks: Path) -> None:
    (logs, state), (other_logs, other) = (of_rank(ranks, case, rank) for rank in (0, 1))
    assert state.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in state.items())
    for one, two in zip(logs["logs"], other_logs["logs"], strict=True):
        assert one == two


def test_global_equals_one_process(ranks: Path, tmp_path: Path) -> None:
    results, state = of_rank(ranks, "global", 0)
    trainer, alone = run(tmp_path, "global", per_device_train_batch_size=4)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=2e-6)
    assert sum(log["skipped_pairs"] for log in alone["logs"]) > 0
    for one, other in zip(results["logs"], alone["logs"], strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if not name.startswith("logits/"):  # over all positions: padding is another
                assert one[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_a_layout_equals_a_padded_process(ranks: Path, tmp_path: Path) -> None:
    results, state = of_rank(ranks, "shared", 0)
    trainer, alone = run(tmp_path, "shared", per_device_train_batch_size=4, batch_layout="padded")
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=2e-6)
    for one, other in zip(results["logs"], alone["logs"], strict=True):
        assert one["batch/computed_share"] < 1
        for name, value in other.items():
            if not name.startswith("logits/"):
                assert one[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("case", ["global", "micro_batch"])
def test_evaluation_counts_every_row_once(case: str, ranks: Path, tmp_path: Path) -> None:
    results, _ = of_rank(ranks, case, 0)
    # The same model as the ranks', so that only the evaluation is compared.
    trainer, _ = run(tmp_path, case, max_steps=1)
    trainer.model.load_state_dict(of_rank(ranks, case, 0)[1])
    alone = trainer.evaluate()
    names = [name for name in alone if "rewards" in name or "logps/" in name or "odds" in name]
    for name in [*names, "eval_skipped_pairs"]:
        assert results["eval"][name] == pytest.approx(alone[name], rel=1e-5), name
        # Of a stream, accelerate cannot tell which pairs it has repeated.
        assert results["streamed"][name] == pytest.approx(alone[name], rel=1e-5), name
    for name in ("eval_loss", "eval_nll_loss"):  # these depend on which pairs share a batch
        assert results["streamed"][name] == pytest.approx(results["eval"][name], rel=1e-2), name
    streamed = results["streamed"]
    pairs_seen = streamed["eval_samples_per_second"] * streamed["eval_runtime"]
    assert pairs_seen == pytest.approx(7, rel=0.1)


def test_micro_batch_is_the_mean_over_ranks(ranks: Path, tmp_path: Path) -> None:
    # As gradient accumulation over the same micro-batches in one process.
    results, state = of_rank(ranks, "micro_batch", 0)
    trainer, alone = run(tmp_path, "micro_batch", gradient_accumulation_steps=2)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=2e-6)
    for one, other in zip(results["logs"], alone["logs"], strict=True):
        for name, value in other.items():
            assert one[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


def test_metrics_are_means_over_the_pairs_of_a_padded_last_batch(ranks: Path) -> None:
    results = [json.loads((ranks / f"padded-{rank}.json").read_text()) for rank in (0, 1)]
    assert results[0]["logs"] == results[1]["logs"]
    assert [len(side[0]) for each in results for side in each["seen"]] == [2, 2, 2, 2]
    for step, log in enumerate(results[0]["logs"]):
        chosen, rejected = (
            torch.tensor([logp for each in results for logp in each["seen"][step][side]])
            for side in (0, 1)
        )
        assert log["logps/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-5)
        assert log["rewards/rejected"] == pytest.approx(0.1 * rejected.mean().item(), rel=1e-5)
        assert log["rewards/accuracies"] == (chosen > rejected).double().mean().item()
        assert log["skipped_pairs"] == 0
    # The pair that fills the batch up is trained on again, and so it is counted again.
    logps = [logp for each in results for sides in each["seen"] for logp in sides[0]]
    assert (len(logps), len({round(logp, 3) for logp in logps})) == (8, 7)
