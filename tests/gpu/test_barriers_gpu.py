"""What several warps read and one writes, on a device: many programs, again and again, same bits.

A race is seldom seen: where results lie over what they are made of they are compared with results
that lie elsewhere. What no barrier orders `tests/kernels/barriers.py` refuses without a device.
"""

import pytest
import torch

from orpo_kernels import linear_logps
from orpo_kernels.kernels import gpu_backend, has_slots
from tests.helpers import problem

pytestmark = pytest.mark.gpu

ROWS, TIMES = 8192, 20
COLUMNS = (512, 1536, 4096, 8192)  # every row of the table holds one of them


@pytest.fixture
def generator(gpu):
    """Random numbers, where Triton's kernels run."""
    gpu.needs_cuda()
    if gpu_backend() != "triton":
        pytest.skip("triton is not installed or switched off")
    return torch.Generator(gpu.device).manual_seed(0)


def normal(generator, *shape):
    return torch.randn(shape, generator=generator, device=generator.device)


def inputs_of(generator, columns):
    """Of kernels that read labels alone."""
    from orpo_kernels.kernels.inputs import Inputs

    labels = torch.randint(0, columns, (ROWS,), generator=generator, device=generator.device)
    head = torch.zeros(columns, 8, dtype=torch.bfloat16, device=generator.device)
    return Inputs(
        (head[:1],), (head,), None, labels, None, None, None, 1.0, None, torch.bfloat16,
        torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("columns", COLUMNS)
def test_p_of_the_weight_gradient_over_its_logits(generator, columns):
    from orpo_kernels.kernels.weight_probs import WeightProbs

    logits, figures = normal(generator, ROWS, columns), normal(generator, 5, ROWS)
    inputs = inputs_of(generator, columns)

    def p(out, source):
        step = WeightProbs(inputs, out, source, figures, None, columns=columns, kept=False)
        step((0, ROWS), 0, (0, columns))
        return out[:, :columns]

    apart = p(torch.empty_like(logits, dtype=torch.bfloat16), logits)
    for _ in range(TIMES):
        over = logits.clone()
        assert torch.equal(p(over.view(torch.bfloat16), over), apart)


@pytest.mark.parametrize("columns", COLUMNS)
def test_p_of_the_forward_over_its_logits(generator, columns):
    # The reference of most rows moves, by which all warps of a program scale what they write.
    from orpo_kernels.kernels.inputs import Tiles
    from orpo_kernels.kernels.softmax_block import SoftmaxBlock

    logits, before = 8 * normal(generator, ROWS, columns), 8 * normal(generator, 4, ROWS).abs()
    inputs = inputs_of(generator, columns)

    def p(out, source):
        state = before.clone()
        SoftmaxBlock(inputs, state, Tiles(source, out, columns), None, 8.0)(
            (0, ROWS), 0, (0, columns), 1
        )
        return out[:, :columns], state

    apart, figures = p(torch.empty_like(logits, dtype=torch.bfloat16), logits)
    for _ in range(TIMES):
        over = logits.clone()
        found, state = p(over.view(torch.bfloat16), over)
        assert torch.equal(found, apart)
        assert torch.equal(state, figures)


@pytest.mark.parametrize("splits", [1, 8, 64])
def test_running_figures_of_rows(generator, splits):
    from orpo_kernels.kernels.combine_rows import combine_rows

    before = 8 * normal(generator, 4, ROWS).abs()
    partials = 8 * normal(generator, 2, ROWS, splits).abs()
    top = torch.maximum(before[0], partials[0].amax(1))
    total = before[1].double() * torch.exp((before[0] - top).double())
    total += (partials[1].double() * torch.exp((partials[0] - top[:, None]).double())).sum(1)
    for _ in range(TIMES):
        state = before.clone()
        combine_rows(state, partials, 0)
        assert torch.equal(state[0], top)
        torch.testing.assert_close(state[1].double(), total, rtol=1e-5, atol=0)


def test_the_sparse_gradient_again_and_again(gpu, generator):
    # Two groups, 128 row blocks, several vocabulary blocks: references move, slots are rescaled.
    if not has_slots(gpu.device, torch.bfloat16):
        pytest.skip("slots need tensor cores")
    given = problem(ROWS, 256, 32003, torch.bfloat16, peaked=True, unscored=-100, device=gpu.device)
    hidden, weight = (each.requires_grad_() for each in given[:2])
    groups = (torch.arange(ROWS, device=gpu.device) >= ROWS // 2).long()

    def step():
        logps = linear_logps(
            hidden, weight, given.labels[0], gradient="sparse", eps=2.0**-9, tail_groups=groups,
            workspace_bytes=64 * 2**20,
        )  # fmt: skip
        return logps, *torch.autograd.grad(logps.sum(), (hidden, weight))

    first = step()
    for _ in range(TIMES // 2):
        assert all(torch.equal(x, y) for x, y in zip(step(), first, strict=True))
