"""The sparse strategy on rows made to break it, and its share of the budget."""

import dataclasses

import pytest
import torch

from orpo_kernels import linear_logps
from orpo_kernels.engine.budget import Sizes, plan_backward
from orpo_kernels.engine.sparse import plan
from orpo_kernels.linear_logps import certified_logps
from orpo_kernels.options import LogpsOptions
from tests.engine.test_budget import BUDGETS, CPU, CUDA, HEADS, sizes
from tests.sparse import sparse_gradients

V, EPS = 600, 1 / 512


def uniform(p):
    """Every entry, the label's too, has probability p; one more takes what is left."""
    row = torch.zeros(V, dtype=torch.float64)
    count = min(V, int(1 / p))
    row[count:] = -60.0
    rest = 1 - p * (count - 1)
    row[0] = torch.log(torch.tensor(rest / p))
    return row


def spikes(*columns):
    row = torch.full((V,), -8.0, dtype=torch.float64)
    row[list(columns)] = 4.0
    return row


ROWS = {
    "uniform": [torch.zeros(V, dtype=torch.float64)] * 8,
    "two spikes": [spikes(3, 500), spikes(3, 599)],
    "all just under eps": [uniform(EPS * (1 - 1e-6))] * 3,
    "all just over eps": [uniform(EPS * (1 + 1e-6))] * 3,
    "one column live in every block": [spikes(5, 300, 550)] * 4,
    "certain of the label": [spikes(1) * 10] * 2,
    "certain of another": [spikes(2) * 10, spikes(599) * 10],
    "rising": [torch.linspace(-30, 30, V).double()] * 2,  # every block lifts the maximum
    "falling": [torch.linspace(30, -30, V).double()] * 2,
    "rows that share nothing": [spikes(i * 50) for i in range(12)],
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("name", list(ROWS))
def test_adversarial_rows(name, blocks, dtype, monkeypatch):
    monkeypatch.setattr(plan, "live_share", lambda device: 1.0)
    if blocks == 3:
        smallest = plan.plan_lists
        monkeypatch.setattr(
            plan, "plan_lists",
            lambda *args: dataclasses.replace(smallest(*args), columns=256),
        )  # fmt: skip
    # The head is the identity: hidden states are the logits, their gradient is that of the logits.
    hidden = torch.stack(ROWS[name]).to(dtype).requires_grad_()
    weight = torch.eye(V, dtype=dtype, requires_grad=True)
    N = len(hidden)
    labels, a = torch.ones(N, dtype=torch.int64), torch.randn(N, dtype=torch.float64)
    groups = torch.arange(N) % 2
    options = LogpsOptions(gradient="sparse", eps=EPS, tail_groups=groups)
    logps, certificate = certified_logps(hidden, weight, labels, None, options)
    found = torch.autograd.grad((logps * a.to(logps.dtype)).sum(), (hidden, weight))
    inputs = {"hidden": hidden, "weight": weight}
    columns = V if blocks == 1 else 256
    true = sparse_gradients(inputs, labels[None], a[None], {}, EPS, groups, columns)
    p = torch.softmax(hidden.detach().double(), 1)
    for ours, expected in zip(found, true.values(), strict=True):
        assert torch.isfinite(ours).all()
        # An entry within rounding of eps may be kept or dropped: worth eps each, and few.
        tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
        bound = tolerance * expected.norm() + tolerance * p.norm()
        assert (ours.double() - expected).norm() <= bound
    # The certificate: nothing dropped is over eps, and what is dropped is no larger than promised.
    exact = linear_logps(hidden, weight, labels)
    truth = torch.autograd.grad((exact * a.to(exact.dtype)).sum(), hidden)[0]
    error = (found[0].double() - truth.double()).norm(dim=1) / a.abs()
    mass = float(certificate.tail_mass_max)
    rounding = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert float(error.max()) <= float(certificate.residual_rms_max) + mass + rounding
    assert 0 <= mass + 1e-6 <= 1 + 2e-6


def test_the_label_counts_from_the_first_block():
    # A confident token: nothing but the label is over eps, in no block, whatever came before.
    hidden = (spikes(599) * 3)[None].float().requires_grad_()
    options = LogpsOptions(gradient="sparse")
    label = torch.tensor([599])
    _, certificate = certified_logps(hidden, torch.eye(V), label, None, options)
    assert certificate.kept_share == 0


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("budget", BUDGETS)
def test_everything_fits_the_budget(budget, head, device, trainable):
    problem = sizes(head, device)
    found = plan.plan_sparse(problem, 2, budget, trainable=trainable)
    assert found.tile.workspace_bytes <= budget
    assert found.blocks * found.tile.columns >= problem.vocabulary
    chunks = -(-problem.rows // found.tile.rows)
    assert found.items == chunks * found.blocks
    # The smallest budget has no room for kept entries beside a tile of the larger heads.
    assert (found.store_bytes > 0) == trainable or (trainable and budget == BUDGETS[0])
    if trainable:
        backward = plan_backward(
            problem, budget, head[0], recompute=True, reserved=found.reserved_bytes
        )
        assert backward.workspace_bytes <= budget
        assert found.store_bytes % 16 == 0
    even = found.tile.even(problem.rows)
    assert even.rows <= found.tile.rows
    assert -(-problem.rows // even.rows) == chunks


def test_the_default_keeps_the_tile_of_the_exact_forward():
    problem = Sizes(1024, 128_256, 1024, 2, torch.bfloat16, False, CPU)
    for trainable in (False, True):
        tile = plan.plan_sparse(problem, 2, 64 * 2**20, trainable=trainable).tile
        assert (tile.rows, tile.columns) == (1024, 8192)
