"""`gradient="sparse"` on a device: against float64, in bits, in a graph, in budget, overflowing.

The shares of what is dropped are large on purpose: the head is small for its eps.
"""

import importlib
import importlib.util

import pytest
import torch

from orpo_kernels import linear_logps, reference
from orpo_kernels.engine import host_copy, scoring
from orpo_kernels.engine.sparse import plan
from orpo_kernels.kernels import has_slots
from orpo_kernels.kernels.slot_store import COLUMN_BYTES, SLOT_BYTES
from tests.gpu.cases import pairwise
from tests.gpu.waits import waits
from tests.helpers import problem

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = [(None, False, False), (None, False, True), (20.0, True, True)]  # softcap, bias, trains
WORKSPACES = [None, 40 * 2**20]  # the default, and one of several chunks
EPS = 2.0**-6


@pytest.fixture(autouse=True)
def _any_density(monkeypatch):
    monkeypatch.setattr(plan, "live_share", lambda device: 1.0)
    monkeypatch.setattr(plan, "_MOST_KEPT", 1)
    if importlib.util.find_spec("triton") is not None:
        live_columns = importlib.import_module("orpo_kernels.kernels.live_columns")
        monkeypatch.setattr(live_columns, "MOST_LOST", 1.0)
        monkeypatch.setattr(live_columns, "MOST_LIVE", 1)


def step(gpu, dtype, *, trains=True, bias=False):
    """hidden, weight, bias, labels, groups, upstream gradient."""
    N, H, V = (700, 256, 5003) if gpu.real else (150, 24, 1003)
    given = problem(N, H, V, dtype, peaked=True, bias=bias, unscored=-100, device=gpu.device)
    for tensor, needs in zip(given[:3], (True, trains, trains), strict=True):
        if tensor is not None:
            tensor.requires_grad_(needs)
    groups = (torch.arange(N) >= N // 2).long()
    a = (torch.rand(N) + 0.5) * torch.where(groups == 1, 0.3, -1.0)
    return *given[:3], given.labels[0], groups.to(gpu.device), a.to(gpu.device)


def run(hidden, weight, bias, labels, groups, a, **options):
    """Log-probs and the gradients of what needs one."""
    logps = linear_logps(
        hidden, weight, labels, bias, gradient="sparse", eps=EPS, tail_groups=groups, **options
    )
    wanted = [each for each in (hidden, weight, bias) if each is not None and each.requires_grad]
    return logps, *torch.autograd.grad((logps * a).sum(), wanted)


def slot_gradient():
    """Imports triton."""
    return importlib.import_module("orpo_kernels.engine.sparse.slot_gradient")


def relative(found, true):
    return float((found.double() - true).norm() / true.norm())


@pytest.mark.parametrize(
    ("option", "dtype", "workspace"), pairwise(OPTIONS, DTYPES, WORKSPACES), ids=str
)
def test_against_float64(gpu, option, dtype, workspace):
    softcap, bias, trains = option
    given = step(gpu, dtype, trains=trains, bias=bias)
    options = {"softcap": softcap, "workspace_bytes": workspace}
    logps, *found = run(*given, **options)
    again = run(*given, **options)
    assert all(torch.equal(x, y) for x, y in zip((logps, *found), again, strict=True))

    hidden, weight, bias_, labels, groups, a = (t if t is None else t.cpu() for t in given)
    wide = [None if t is None else t.detach().double() for t in (hidden, weight, bias_)]
    in_slots = gpu.real and has_slots(gpu.device, dtype)
    true = reference.sparse_gradients(
        *wide[:2], (labels,), (a.double(),), wide[2], eps=EPS, groups=groups,
        block=64 if in_slots else 1, softcap=softcap,
    )  # fmt: skip
    # A CPU's 16-bit GEMM rounds its logits; a slot's entries are bfloat16.
    rounding = 0.0 if gpu.real or dtype == torch.float32 else 8 * torch.finfo(dtype).eps
    expected = reference.linear_logps(*wide[:2], labels, wide[2], softcap=softcap)
    torch.testing.assert_close(
        logps.detach().cpu().double(), expected, rtol=2e-5 + rounding, atol=1e-4 + rounding
    )
    assert relative(found[0].cpu(), true.dhidden) < 4e-3 + rounding
    if trains:
        assert relative(found[1].cpu(), true.dweight) < 5e-3 + rounding
    if bias:
        assert relative(found[2].cpu(), true.dbias) < 5e-3 + rounding


@pytest.mark.parametrize("blocks", [0, 1], ids=["none", "the first 64 rows"])
def test_a_store_without_room(gpu, monkeypatch, blocks):
    # Where a row block finds no room dW is exact, of all rows; dhidden does not ask.
    gpu.needs_cuda()
    given = step(gpu, torch.float32, bias=True)
    counts, kept_blocks, planned = [], slot_gradient().kept_blocks, plan.plan_scan
    budget = 256 * 2**20

    def noted(table):
        counts.append(kept_blocks(table))
        return counts[-1]

    monkeypatch.setattr(slot_gradient(), "kept_blocks", noted)
    # The store would take from the forward's memory, and so from its shape.
    monkeypatch.setattr(
        plan, "plan_scan", lambda job, groups, _, card: planned(job, groups, budget // 2, card)
    )
    stored = run(*given, workspace_bytes=budget)
    assert min(counts[0]) > 0

    room = plan.aligned((sum(counts[0][:blocks]) + blocks) * SLOT_BYTES)
    monkeypatch.setattr(plan, "slot_stores", lambda *_: [plan.Store(room, False)])
    found = run(*given, workspace_bytes=budget)
    if blocks:  # without a store there is no table
        assert [each >= 0 for each in counts[1]] == [i < blocks for i in range(len(counts[0]))]
    assert torch.equal(found[0], stored[0])
    assert torch.equal(found[1], stored[1])
    wide = [t.detach().double().requires_grad_() for t in given[:3]]
    logps = reference.linear_logps(wide[0], wide[1], given[3], wide[2])
    _, dweight, dbias = torch.autograd.grad((logps * given[5].double()).sum(), wide)
    for mine, before, exact in zip(found[2:], stored[2:], (dweight, dbias), strict=True):
        assert relative(mine, exact) < 1e-5
        assert relative(before, exact) > 1e-3  # over what slots alone would be wrong by


@pytest.mark.parametrize("option", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_slots_that_are_made_again(gpu, monkeypatch, dtype, option):
    # A store of columns alone: the same forward, and dW as right as from the slots themselves.
    gpu.needs_cuda()
    softcap, bias, _ = option
    given = step(gpu, dtype, bias=bias)
    budget, planned = 256 * 2**20, plan.plan_scan
    monkeypatch.setattr(
        plan, "plan_scan", lambda job, groups, _, card: planned(job, groups, budget // 2, card)
    )
    found = []
    for remade, size in ((False, SLOT_BYTES), (True, COLUMN_BYTES)):
        store = plan.Store(plan.aligned(size * given[1].shape[0] * -(-len(given[4]) // 64)), remade)
        monkeypatch.setattr(plan, "slot_stores", lambda *_, store=store: [store])
        found.append(run(*given, workspace_bytes=budget, softcap=softcap))
    (logps, dhidden, *stored), (again, dhidden_again, *remade) = found
    assert torch.equal(logps, again)
    assert torch.equal(dhidden, dhidden_again)
    for mine, other in zip(remade, stored, strict=True):
        assert relative(mine, other.double()) < 2e-3


def test_the_waits_of_a_call(gpu, monkeypatch):
    # The forward counts the scored rows and tells the backward; it looks at its first tile, and the
    # backward at what is in the store: small copies that the device makes on its way, none of which
    # waits for what was launched after it.
    gpu.needs_cuda()
    given = step(gpu, torch.bfloat16, bias=True)
    for _ in range(2):
        run(*given)
    copies, get = [], host_copy.HostCopy.get

    def noted(copy):
        copies.append(get(copy))
        return copies[-1]

    monkeypatch.setattr(host_copy.HostCopy, "get", noted)
    assert waits(lambda: run(*given)) == []
    assert [each.device.type for each in copies] == ["cpu"] * 3
    assert all(each.is_pinned() for each in copies)


@pytest.mark.parametrize("trains", [False, True])
def test_cuda_graph(gpu, trains):
    # A head that trains is done the exact way in the backward: the flags cannot be read there.
    gpu.needs_cuda()
    given = step(gpu, torch.bfloat16, trains=trains)
    hidden, labels = given[0], given[3]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(*given)
        if trains:  # what the captured backward will launch
            with pytest.MonkeyPatch.context() as patch:
                for module in (slot_gradient(), host_copy):
                    patch.setattr(module, "is_capturing", lambda device: True)
                run(*given)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(*given)
    for seed in (1, 2):
        torch.manual_seed(seed)
        with torch.no_grad():
            hidden.copy_(hidden.flip(0))
        labels[9] = seed
        graph.replay()
        with pytest.MonkeyPatch.context() as patch:  # the same rows share their columns
            for module in (host_copy, scoring, slot_gradient()):
                patch.setattr(module, "is_capturing", lambda device: True)
            eager = run(*given)
        for mine, true in zip(captured, eager, strict=True):
            torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("trains", [False, True])
def test_peak_is_the_workspace(gpu, trains):
    gpu.needs_cuda()
    budget, N, H, V = 256 * 2**20, 3000, 1024, 128256
    weight = torch.randn(V, H, device=gpu.device, dtype=torch.bfloat16).requires_grad_(trains)
    labels = torch.randint(0, V, (N,), device=gpu.device)
    hidden = (weight.detach()[labels] * (12 / H)).requires_grad_()
    wanted = [hidden, weight] if trains else [hidden]
    for _ in range(2):  # the first allocates cuBLAS's own workspace
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logps = linear_logps(hidden, weight, labels, gradient="sparse", workspace_bytes=budget)
        found = torch.autograd.grad(logps.sum(), wanted)
        peak = torch.cuda.max_memory_allocated() - before
        results = torch.cuda.memory_allocated() - before
        del logps, found
    # The kept graph's g and statistics are results until the backward.
    assert peak - results <= budget + 2 * N * H + 600 * N
