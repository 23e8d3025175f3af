"""The policy: which strategy, that it is what the engine runs, and that it says so once."""

import logging
from dataclasses import replace

import pytest
import torch

from orpo_kernels import linear_logps
from orpo_kernels.engine import policy, run
from orpo_kernels.engine.gpu.card import Card
from orpo_kernels.engine.gpu.model import job_of
from orpo_kernels.engine.policy import choose, choose_on_gpu, explain
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
        (False, False, MIB // 2, "one pass", 1),
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
    assert on_gpu(MIB // 2, **few)[1].workspace_bytes <= MIB // 2
    refused = [
        sizes(LLAMA, CPU),
        sizes(LLAMA, CUDA, dtype=torch.float64),  # no such kernel
        replace(sizes(LLAMA, CUDA), on_triton=False),
    ]
    for problem in refused:
        with pytest.raises(ValueError, match="raise workspace_bytes to at least"):
            choose(problem, MIB // 2, **few)
    with pytest.raises(ValueError, match="the smallest tile takes"):
        on_gpu(10_000, **few)


def on_gpu(budget, **needs):
    return choose_on_gpu(job_of(sizes(LLAMA, CUDA), 2), CUDA, budget, **needs)


def test_without_a_gradient_what_is_faster(gpu_here, monkeypatch):
    # On sm_90 `linear_lse` was measured at 9 tenths of cuBLAS, and a tile has to be read again.
    few = {"needs_dhidden": False, "needs_dweight": False}
    assert on_gpu(64 * MIB, **few)[0].strategy == "one pass"
    monkeypatch.setattr(policy, "card_of", lambda device: Card(132, 7.3e14, 4e12, 90))
    assert on_gpu(64 * MIB, **few)[0].strategy == "linear_lse"
    trains = {"needs_dhidden": False, "needs_dweight": True}
    found, _ = on_gpu(256 * MIB, **trains)
    assert (found.strategy, found.passes) == ("linear_lse", 3)
    assert choose(sizes(LLAMA, CPU), 64 * MIB, **few).strategy == "one pass"


def test_e_is_kept_of_some_rows(gpu_here):
    needs = {"needs_dhidden": True, "needs_dweight": True}
    found, plan = on_gpu(1400 * MIB, kept=2000, **needs)
    assert (found.strategy, found.passes) == ("E kept", 4)
    assert "E of 2000 rows fits" in str(found)
    assert " ms expected" in str(found)
    assert plan.kept_shape.columns == LLAMA[1]
    assert 2000 * 2 * LLAMA[1] < found.workspace_bytes <= 1400 * MIB


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
    assert "two passes: 2 passes in float32 over 1100 rows, 550 rows x 8192 columns" in caplog.text


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
