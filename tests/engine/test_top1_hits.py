"""Top-1 hits read off the statistics, against the argmax of the logits they were taken of."""

import pytest
import torch

from orpo_kernels import reference
from orpo_kernels.engine.exact import top1_hits

N, H, V = 64, 16, 303


def hits(hidden, weight, *label_sets, softcap=None):
    """Of the first label of every row."""
    options = (1.0, softcap, -100, hidden.dtype, None, False, False, False)
    labels = torch.stack(label_sets)
    _, statistics, *_ = torch.ops.orpo_kernels.linear_logps(
        hidden, weight, labels, None, None, None, *options
    )
    return top1_hits(statistics)


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_against_argmax(dtype, softcap, sets):
    hidden, weight = torch.randn(N, H).to(dtype), torch.randn(V, H).to(dtype)
    z = reference.logits(hidden.double(), weight.double(), softcap=softcap)
    best, runner_up = z.topk(2).indices.unbind(1)
    # Right; nearly right; by chance. A second label: the best token, the first label, another one.
    row, any_token = torch.arange(N), torch.randint(0, V, (2, N))
    first = torch.stack((best, runner_up, any_token[0]))[row % 3, row]
    second = torch.stack((best, first, any_token[1]))[row // 3 % 3, row]
    found = hits(hidden, weight, *(first, second)[:sets], softcap=softcap)
    # Nearer than the rounding of a tile of this dtype nothing can be told.
    gap = z.gather(1, best[:, None]) - z.gather(1, runner_up[:, None])
    clear = gap[:, 0] > 2 * torch.finfo(dtype).eps * z.abs().amax(1) + 1e-5
    assert clear.sum() > N // 2
    assert torch.equal(found[clear], (first == best)[clear])


def integers(rows):
    """Logits that are exact in any order of summation: hidden is the identity."""
    logits = torch.tensor(rows, dtype=torch.float32)
    return torch.eye(len(rows)), logits.t().contiguous()


def test_every_token_of_a_tie_is_a_hit():
    for V in (3, 303, 30_003):  # log-sums of this size round by up to 1e-6
        rows = [[0.0] * V, [5.0] + [0.0] * (V - 2) + [5.0], [-3.0] * (V - 1) + [-4.0]]
        hidden, weight = integers(rows)
        assert hits(hidden, weight, torch.tensor([1, 0, 0])).all()
        assert hits(hidden, weight, torch.tensor([V - 1, V - 1, 1])).all()
        assert hits(hidden, weight, torch.tensor([0, 1, V - 1])).tolist() == [True, False, False]


def test_a_narrow_miss_is_a_miss():
    step = 2.0**-14
    hidden, weight = integers([[1.0, 1.0 + step] + [0.0] * 300, [1.0 + step, 1.0] + [0.0] * 300])
    assert hits(hidden, weight, torch.tensor([0, 0])).tolist() == [False, True]


@pytest.mark.parametrize("lead", [2.0**-14, 3.0, 40.0, 95.0, 1000.0])
def test_a_second_label_above_the_first(lead):
    # The maximum leaves out both labels: beyond 88 nats e^lead overflows, and beyond 104 all that
    # is left of the others is 0. Row 2: both name one token; row 3: they tie.
    above, level = [7.0, 7.0 + lead, 7.0, 0.0], [7.0, 7.0, 7.0 - lead, 0.0]
    hidden, weight = integers([above, above, above, level])
    first, second = torch.tensor([0, 1, 1, 0]), torch.tensor([1, 0, 1, 1])
    assert hits(hidden, weight, first, second).tolist() == [False, True, True, True]


def test_nothing_but_labels():
    assert hits(*integers([[3.0]]), torch.tensor([0])).all()
    both = (torch.tensor([0, 1]), torch.tensor([1, 0]))
    assert hits(*integers([[3.0, 2.0]] * 2), *both).tolist() == [True, False]
