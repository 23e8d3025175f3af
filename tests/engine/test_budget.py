"""From a budget to shapes: always within it, never under a useful tile without saying so."""

import pytest
import torch

from orpo_kernels.engine.budget import Sizes, kept_rows, plan_backward, plan_forward, plan_kept

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
# The head of a 0.5B model, of Llama 3, the largest vocabulary, a toy.
HEADS = [(896, 151_936), (4096, 128_256), (1152, 262_144), (32, 500)]
BUDGETS = [16 * 2**20, 64 * 2**20, 1_400 * 2**20]


def sizes(head, device, rows=5000, dtype=torch.bfloat16, copied=False):
    on_gpu = device.type == "cuda"
    widens, on_triton = on_gpu and dtype.itemsize == 2, on_gpu and dtype != torch.float64
    return Sizes(rows, head[1], head[0], 2, dtype, copied, device, widens, on_triton)


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("budget", BUDGETS)
def test_plans_fit(budget, head, device):
    for copied in (False, True):
        problem = sizes(head, device, copied=copied)
        for plan in (
            plan_forward(problem, budget, with_gradient=True),
            plan_forward(problem, budget, with_gradient=False),
            plan_backward(problem, budget, head[0], recompute=True),
        ):
            assert plan.workspace_bytes <= budget
            assert 1 <= plan.rows <= problem.rows
            assert 1 <= plan.columns <= problem.vocabulary
        rows = kept_rows(problem, budget)
        if rows:
            plan = plan_kept(problem, rows, budget)
            assert plan.workspace_bytes <= budget
            assert plan.columns == problem.vocabulary


def test_cpu_prefers_tiles_that_stay_in_cache():
    plan = plan_forward(sizes((1024, 128_256), CPU, rows=1024), 64 * 2**20, with_gradient=True)
    assert (plan.rows, plan.columns) == (1024, 8192)


def test_gpu_prefers_the_whole_vocabulary():
    plan = plan_forward(sizes((4096, 128_256), CUDA, rows=8192), 1_400 * 2**20, with_gradient=True)
    assert plan.columns == 128_256
    assert plan.rows >= 1024


def test_chunks_are_of_even_size():
    # 1025 rows as 1024 + 1 would waste a GEMM on one row.
    plan = plan_forward(sizes((32, 500), CPU, rows=1025), 64 * 2**20, with_gradient=True)
    assert plan.rows == 513


def test_a_budget_below_one_tile_is_refused():
    with pytest.raises(ValueError, match="raise workspace_bytes to at least"):
        plan_forward(sizes((4096, 128_256), CPU), 100_000, with_gradient=True)
