"""Metric sums: their weights, what is absent, and that a step does not wait for the device."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_kernels.loss import orpo_loss_from_logps
from orpo_kernels.options import Certificate
from orpo_kernels.training.metrics import MetricSums, pair_table
from tests.ops.test_launches import Operations
from tests.training.distributed_worker import run_to_the_end
from tests.training.runs import history, make, pairs

IGNORED = -100


def output(chosen: list[float], rejected: list[float | None]) -> Any:
    """The loss of sequences of one token each; None: no scored token."""
    logps = torch.tensor([[0.0 if x is None else x] for x in [*chosen, *rejected]])
    labels = torch.tensor([[IGNORED if x is None else 1] for x in [*chosen, *rejected]])
    return orpo_loss_from_logps(logps, labels)


def test_means_over_pairs_and_batches() -> None:
    sums = MetricSums(0.5)
    first, second = output([-1.0, -2.0], [-2.0, -1.5]), output([-3.0], [-4.0])
    for orpo in (first, second):
        sums.add(pair_table(orpo, weight=1.0))
    means = sums.pop()
    assert means["logps/chosen"] == pytest.approx(-2.0)
    assert means["rewards/rejected"] == pytest.approx(0.5 * -2.5)
    assert means["rewards/accuracies"] == pytest.approx(2 / 3)
    assert means["rewards/margins"] == pytest.approx(0.5 * 0.5)
    # Batches weigh one each here, as in the mean of micro-batches: (1.5 + 3) / 2.
    assert means["nll_loss"] == pytest.approx(2.25)
    ratio = torch.cat([first.log_odds_ratio, second.log_odds_ratio])
    assert means["log_odds_chosen"] == pytest.approx(ratio.mean().item())
    assert means["log_odds_ratio"] == pytest.approx(ratio.sigmoid().log().mean().item())
    assert means["skipped_pairs"] == means["clamped_logps"] == 0
    assert "aux_loss" not in means
    assert "logits/chosen" not in means
    assert sums.pop() == {}


def test_every_row_weighs_one_in_evaluation() -> None:
    sums = MetricSums(0.1)
    for orpo in (output([-1.0, -2.0], [-2.0, -1.5]), output([-3.0], [-4.0])):
        logits = torch.arange(2.0 * len(orpo.chosen_logps)).view(-1, 2)
        sums.add(pair_table(orpo, mean_logits=logits, aux_loss=torch.tensor(7.0)))
    means = sums.pop()
    assert means["nll_loss"] == pytest.approx((2 * 1.5 + 3) / 3)
    assert means["aux_loss"] == pytest.approx(7)
    assert means["logits/chosen"] == pytest.approx((0 + 2 + 0) / 3)
    assert means["logits/rejected"] == pytest.approx((1 + 3 + 1) / 3)


def test_what_the_sparse_gradient_leaves_out() -> None:
    sums = MetricSums(0.1)
    for share, weight in ((0.02, 1.0), (0.05, 3.0)):
        fields = [torch.tensor(share * factor) for factor in (1.0, 2.0, 3.0, 4.0, 5.0)]
        orpo = output([-1.0, -2.0], [-2.0, -1.5])._replace(sparse=Certificate(*fields))
        sums.add(pair_table(orpo, weight=weight))
    means = sums.pop()
    mean = (0.02 + 3 * 0.05) / 4
    assert means["sparse/kept_share"] == pytest.approx(mean)
    assert means["sparse/tail_mass"] == pytest.approx(2 * mean)
    assert means["sparse/residual_rms"] == pytest.approx(4 * mean)
    sums.add(pair_table(output([-1.0], [-2.0])))
    assert not [name for name in sums.pop() if name.startswith("sparse")]


def test_skipped_and_clamped_pairs_are_counted() -> None:
    sums = MetricSums(0.1)
    sums.add(pair_table(output([-1.0, -0.0, -2.0], [None, -1.0, -3.0])))
    means = sums.pop()
    assert means["skipped_pairs"] == 1
    assert means["clamped_logps"] == 1
    assert means["logps/rejected"] == pytest.approx(-2.0)
    sums.add(pair_table(output([-1.0], [None])))
    assert math.isnan(sums.pop()["logps/chosen"])


def test_accuracy_is_there_without_rewards() -> None:
    # beta = 0 is plain fine-tuning; all rewards are 0, but the answers still have an order.
    sums = MetricSums(0.0)
    sums.add(pair_table(output([-1.0, -1.0], [-2.0, -0.5])))
    assert sums.pop()["rewards/accuracies"] == 0.5


def test_what_is_nan_is_logged_and_what_is_absent_is_not() -> None:
    sums, nan = MetricSums(0.1), torch.tensor(float("nan"))
    fields = [torch.tensor(0.5), nan, *[torch.tensor(0.1)] * 3]
    broken = output([-1.0], [-2.0])._replace(sparse=Certificate(*fields))
    logits = torch.tensor([[nan, 1.0]])
    sums.add(pair_table(broken, mean_logits=logits, aux_loss=nan))
    # A batch that reports none of it weighs nothing in their means.
    sums.add(pair_table(output([-3.0], [-4.0])))
    means = sums.pop()
    broken_names = ("logits/chosen", "aux_loss", "sparse/tail_mass")
    assert [name for name in means if math.isnan(means[name])] == list(broken_names)
    assert (means["logits/rejected"], means["sparse/kept_share"]) == (1.0, 0.5)
    sums.add(pair_table(output([float("nan")], [-2.0])))
    assert math.isnan(sums.pop()["rewards/chosen"])
    # A pair that does not count does not, whatever is in it.
    sums.add(pair_table(output([-1.0, float("nan")], [-2.0, None])))
    assert sums.pop()["logps/chosen"] == -1.0


def test_sums_are_reduced_over_ranks() -> None:
    sums = MetricSums(0.1)
    sums.add(pair_table(output([-1.0], [-2.0])))
    other = pair_table(output([-3.0], [-5.0])).sum(0)
    assert sums.pop(lambda mine: mine + other)["logps/rejected"] == pytest.approx(-3.5)


def test_unequal_micro_batches(tmp_path: Path) -> None:
    # 7 pairs of one step in batches of 4 and 3. Ours: each pair counts once. TRL's: each batch
    # does, and because the step is the epoch's last, only the first 7 % 4 pairs of each.
    options = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    _, results = run_to_the_end(tmp_path / "ours", **options)
    (log,), seen = results["logs"], results["seen"]
    assert [len(chosen) for chosen, _ in seen] == [4, 3]
    chosen = [torch.tensor(batch[0]) for batch in seen]
    mean = torch.cat(chosen).mean().item()
    mean_of_means = torch.stack([each[:3].mean() for each in chosen]).mean().item()
    assert log["logps/chosen"] == pytest.approx(mean, rel=1e-6)
    assert abs(mean - mean_of_means) > 1e-2
    options |= {"max_steps": -1, "num_train_epochs": 1, "train_dataset": pairs(7)}
    trl_log = history(make(tmp_path / "trl", trl=True, **options))[0]
    assert trl_log["logps/chosen"] == pytest.approx(mean_of_means, rel=1e-5)
    # The loss and its NLL are averaged as the gradient is, in both.
    for name in ("loss", "nll_loss", "grad_norm"):
        assert log[name] == pytest.approx(trl_log[name], rel=1e-4), name


def test_a_step_does_not_wait_for_the_device(tmp_path: Path, monkeypatch: Any) -> None:
    # On a GPU each of these copies a value to the host. Ours may do so when a log is written.
    calls: list[str] = []

    def watch(name: str) -> None:
        original = getattr(torch.Tensor, name)

        def watched(tensor: torch.Tensor, *args: Any) -> Any:
            caller = sys._getframe(1)
            path = Path(caller.f_code.co_filename)
            if "orpo_kernels" in path.parts and path.stem not in ("collator", "selfcheck"):
                calls.append(f"{path.stem}.{caller.f_code.co_name}: {name}")
            return original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, watched)

    trainer = make(tmp_path, max_steps=4, logging_steps=4, loss_normalization="global")
    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy"):
        watch(name)
    trainer.train()
    ours = [call for call in calls if call.split(".")[0] in ("trainer", "metrics", "loss")]
    # one log of the metrics, one of the token count at the end
    assert ours == ["metrics.pop: tolist", "trainer.log: item"]


@pytest.mark.parametrize("everything", [False, True])
def test_a_table_is_few_operations(everything: bool) -> None:
    # On a GPU each is a launch; there were 40.
    orpo, options = output([-1.0, -2.0], [-2.0, -1.5]), {}
    if everything:
        orpo = orpo._replace(sparse=Certificate(*[torch.tensor(0.5)] * 5))
        options = {"mean_logits": torch.ones(2, 2), "aux_loss": torch.tensor(1.0)}
    sums = MetricSums(0.1)
    sums.add(pair_table(orpo, **options, weight=torch.tensor(0.5), is_share=True))
    with Operations() as started:
        sums.add(pair_table(orpo, **options, weight=torch.tensor(0.5), is_share=True))
    assert len(started.names) <= 16, started.names
