"""The policy: which strategy, that it is what the engine runs, and that it says so once."""

import logging
import re
from dataclasses import replace

import pytest
import torch

from orpo_kernels import linear_logps
from orpo_kernels.engine import policy, run
from orpo_kernels.engine.policy import choose, explain
from tests.engine.test_budget import CPU, CUDA, sizes

LLAMA = (4096, 128_256)
MIB = 2**20


@pytest.fixture
def gpu_here(monkeypatch):
    """Whatever this machine has: Triton's kernels, on the card the plan is for."""
    monkeypatch.setattr(policy, "runs_triton", lambda device, dtype: device.type == "cuda")
    monkeypatch.setattr(policy, "has_tensor_cores", lambda device: True)


@pytest.mark.parametrize(
    ("needs_dhidden", "needs_dweight", "budget", "strategy", "passes"),
    [
        (False, False, 64 * MIB, "one pass", 1),
        (True, False, 64 * MIB, "two passes", 2),
        (True, True, 256 * MIB, "recompute", 4),
        (False, True, 256 * MIB, "recompute", 3),
        (True, True, 4096 * MIB, "E kept", 3),
        (False, True, 4096 * MIB, "E kept", 2),
        (False, False, MIB // 2, "linear_lse", 1),
        (False, True, 24 * MIB, "recompute", 3),
    ],
)
def test_the_table(gpu_here, needs_dhidden, needs_dweight, budget, strategy, passes):
    found = explain(
        5000, LLAMA[1], LLAMA[0], torch.bfloat16, "cuda", needs_dhidden=needs_dhidden,
        needs_dweight=needs_dweight, workspace_bytes=budget,
    )  # fmt: skip
    assert (found.strategy, found.passes) == (strategy, passes)
    assert found.workspace_bytes <= budget


def test_half_a_megabyte_is_legal_on_a_gpu_only(gpu_here):
    few = {"needs_dhidden": False, "needs_dweight": False}
    plan = choose(sizes(LLAMA, CUDA), MIB // 2, **few).plan
    assert plan.columns == LLAMA[1]
    assert 16 <= plan.rows <= 64
    refused = [
        sizes(LLAMA, CPU),
        sizes(LLAMA, CUDA, dtype=torch.float64),  # no such kernel
    ]
    for problem in refused:
        with pytest.raises(ValueError, match="raise workspace_bytes to at least"):
            choose(problem, MIB // 2, **few)
    with pytest.raises(ValueError, match=r"16 rows of a head .* without any logit"):
        choose(sizes(LLAMA, CUDA), 100_000, **few)
    without_triton = replace(sizes(LLAMA, CUDA), on_triton=False)
    with pytest.raises(ValueError, match="the smallest tile"):
        choose(without_triton, MIB // 2, **few)


def test_the_least_it_names_is_enough(gpu_here):
    for problem in (
        sizes(LLAMA, CUDA),
        sizes(LLAMA, CUDA, copied=True),
        sizes(LLAMA, CUDA, rows=3),
    ):
        with pytest.raises(ValueError, match="to at least that") as refusal:
            policy._plan_linear_lse(problem, 1000)
        least = int(re.search(r"take (\d+) bytes", str(refusal.value))[1])
        assert policy._plan_linear_lse(problem, least).workspace_bytes <= least


def test_where_measured_faster(gpu_here, monkeypatch):
    few = {"needs_dhidden": False, "needs_dweight": False}
    assert choose(sizes(LLAMA, CUDA), 64 * MIB, **few).strategy == "one pass"
    monkeypatch.setattr(policy, "FASTER_ON", frozenset({"cuda sm_80+"}))
    faster = choose(sizes(LLAMA, CUDA), 64 * MIB, **few)
    assert faster.strategy == "linear_lse"
    assert faster.plan.workspace_bytes <= 64 * MIB
    assert choose(sizes(LLAMA, CPU), 64 * MIB, **few).strategy == "one pass"
    trains = {"needs_dhidden": False, "needs_dweight": True}
    found = choose(sizes(LLAMA, CUDA), 256 * MIB, **trains)
    assert (found.strategy, found.passes) == ("linear_lse", 3)


def test_the_engine_runs_what_is_decided(monkeypatch, caplog):
    hidden, weight = torch.randn(1100, 16, requires_grad=True), torch.randn(9000, 16)
    labels = torch.randint(0, 9000, (1100,))
    ran = []
    real = run.tile_loop.forward

    def forward(operands, plan, kept, out):
        ran.append((plan.rows, plan.columns))
        real(operands, plan, kept, out)

    monkeypatch.setattr(run.tile_loop, "forward", forward)
    policy._log.cache_clear()
    with caplog.at_level(logging.DEBUG, logger="orpo_kernels"):
        for trains in (False, True, True):
            linear_logps(hidden, weight.requires_grad_(trains), labels)
    expected = [
        explain(1100, 9000, 16, torch.float32, "cpu", needs_dweight=trains)
        for trains in (False, True)
    ]
    assert [each.strategy for each in expected] == ["two passes", "E kept"]
    assert set(ran) == {(each.plan.rows, each.plan.columns) for each in expected}
    assert [record.message for record in caplog.records] == [
        f"linear_logps: {each}" for each in expected
    ]
    assert expected[0].plan.rows == 550  # the text says what was done
    assert "two passes: 2 passes over 1100 rows, 550 rows x 8192 columns" in caplog.text


@pytest.mark.parametrize("trains", [False, True])
def test_a_sparse_call_says_so(monkeypatch, caplog, trains):
    hidden, weight = torch.randn(1100, 16, requires_grad=True), torch.randn(9000, 16)
    labels, groups = torch.randint(0, 9000, (1100,)), torch.arange(1100) % 2
    ran = []
    real = run.sparse_tile_loop.forward

    def forward(operands, plan, *rest):
        even = plan.tile.even(operands.sizes.rows)
        ran.append((even.rows, even.columns))
        return real(operands, plan, *rest)

    monkeypatch.setattr(run.sparse_tile_loop, "forward", forward)
    options = {"gradient": "sparse", "tail_groups": groups}
    policy._log.cache_clear()
    with caplog.at_level(logging.DEBUG, logger="orpo_kernels"):
        for _ in range(2):
            linear_logps(hidden, weight.requires_grad_(trains), labels, **options)
    found = explain(1100, 9000, 16, torch.float32, "cpu", needs_dweight=trains, gradient="sparse")
    assert (found.strategy, found.passes) == ("sparse", 1)
    assert set(ran) == {(found.plan.rows, found.plan.columns)}
    assert found.workspace_bytes <= found.budget
    assert [record.message for record in caplog.records] == [f"linear_logps: {found}"]
    assert ("kept for the backward" in caplog.text) == trains
    # Without a gradient nothing is sparse.
    few = {"needs_dhidden": False, "gradient": "sparse"}
    assert explain(1100, 9000, 16, torch.float32, "cpu", **few).strategy == "one pass"
