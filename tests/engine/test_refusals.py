"""One refusal of a workspace names what suffices for forward and backward, to the byte."""

import random
import re

import pytest
import torch

from orpo_kernels import linear_logps
from orpo_kernels.engine.budget import TooSmallError, sufficient
from orpo_kernels.engine.policy import explain


def named(refusal):
    return int(re.search(r"takes (\d+) bytes; raise workspace_bytes to at least", refusal)[1])


def draw(seed):
    """A random call as a function of its workspace; it runs forward and backward."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    # One row, fewer than the smallest tile, more; a head of one entry, of several blocks.
    N, H, V = rng.choice((1, 7, 40, 300)), rng.choice((1, 16, 256)), rng.choice((1, 40, 500, 5003))
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16, torch.float64))
    of_hidden, of_weight, of_bias = (rng.random() < share for share in (0.7, 0.7, 0.5))

    def leaf(*shape, requires_grad, dtype=dtype):
        return torch.randn(*shape).to(dtype).requires_grad_(requires_grad)

    hidden = leaf(N, H, requires_grad=of_hidden)
    weight = leaf(V, H, requires_grad=of_weight, dtype=rng.choice((dtype, torch.float32)))
    bias = leaf(V, requires_grad=of_bias) if rng.random() < 0.4 else None
    low_rank = None
    if rng.random() < 0.3:
        low_rank = (leaf(N, 4, requires_grad=of_hidden), leaf(V, 4, requires_grad=of_weight))
    labels = [torch.randint(0, V, (N,)) for _ in range(rng.choice((1, 2)))]
    for each in labels:
        each[torch.rand(N) < rng.choice((0.0, 0.3))] = -100
    options = {"softcap": rng.choice((None, 5.0)), "gradient": rng.choice(("exact", "sparse"))}
    if options["gradient"] == "sparse" and rng.random() < 0.5:
        options["tail_groups"] = torch.randint(0, 2, (N,))

    def step(workspace_bytes):
        given = tuple(labels) if len(labels) == 2 else labels[0]
        logps = linear_logps(
            hidden, weight, given, bias, low_rank=low_rank, workspace_bytes=workspace_bytes,
            **options,
        )  # fmt: skip
        total = sum(each.sum() for each in (logps if len(labels) == 2 else (logps,)))
        if total.requires_grad:
            total.backward()

    return step, rng.choice((1, 1000, 20_000))


def test_random_calls():
    refused = 0
    for seed in range(150):
        step, workspace_bytes = draw(seed)
        try:
            step(workspace_bytes)
        except TooSmallError as refusal:
            least = named(str(refusal))
        else:
            continue
        refused += 1
        step(least)
        with pytest.raises(TooSmallError) as again:
            step(least - 1)
        assert named(str(again.value)) == least, seed
    assert refused > 100


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
@pytest.mark.parametrize("trains", [False, True])
def test_explain(trains, gradient, device):
    call = (5000, 128_256, 4096, torch.bfloat16, device)
    needs = {"needs_dweight": trains, "gradient": gradient}
    with pytest.raises(TooSmallError) as refusal:
        explain(*call, workspace_bytes=1000, **needs)
    least = named(str(refusal.value))
    assert explain(*call, workspace_bytes=least, **needs).workspace_bytes <= least
    with pytest.raises(TooSmallError):
        explain(*call, workspace_bytes=least - 1, **needs)


def test_two_plans_of_which_the_first_asks_for_less():
    def plan(budget):
        for need in (10, 1000):
            if budget < need:
                raise TooSmallError(budget, need, (1, 1))
        return budget

    assert sufficient(plan, 1000) == 1000
    for budget in (1, 10, 999):
        with pytest.raises(TooSmallError, match=f"workspace_bytes={budget} .* takes 1000 bytes"):
            sufficient(plan, budget)
