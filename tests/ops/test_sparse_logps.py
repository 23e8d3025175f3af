"""linear_logps(gradient="sparse") against its definition in float64, with every option."""

import pytest
import torch
from torch.library import opcheck
from torch.profiler import ProfilerActivity, profile

from orpo_kernels import linear_logps
from orpo_kernels.engine import host_copy, scoring
from orpo_kernels.engine.problem import Problem, Transform
from orpo_kernels.engine.run import sparse_plan
from orpo_kernels.engine.sparse import plan, tile_loop
from orpo_kernels.engine.sparse import weight_gradient as sparse_weight
from tests.helpers import peak_bytes
from tests.ops.test_linear_logps import CASES, DTYPES, call, cast, gradients, make
from tests.sparse import sparse_gradients

EPS = 2.0**-8  # of 100 to 5,000 entries: many on either side of it


@pytest.fixture(autouse=True)
def _any_density(monkeypatch):
    # The toy heads here are flat: their tiles would go the exact way, or out of the store.
    monkeypatch.setattr(plan, "live_share", lambda device: 1.0)
    monkeypatch.setattr(plan, "_LIST_ROW_BYTES", 2**15)


def sparse_call(case, inputs, labels, **options):
    out = call(
        linear_logps, case, inputs, labels if case.sets == 2 else labels[0],
        gradient="sparse", workspace_bytes=case.workspace_bytes, **options,
    )  # fmt: skip
    return out if case.sets == 2 else (out,)


def plan_of(case, inputs, dtype, groups=2):
    labels = torch.zeros(case.sets, *inputs["hidden"].shape[:-1], dtype=torch.int64)
    problem = Problem(
        inputs["hidden"], inputs["weight"], labels, inputs.get("bias"), inputs.get("hidden_r"),
        inputs.get("weight_r"), Transform(), -100, dtype, case.workspace_bytes, trainable=True,
        groups=labels[0] if groups == 2 else None,
    )  # fmt: skip
    return sparse_plan(problem).tile


def flat(case, inputs, labels):
    ignore = case.options.get("ignore_index", -100)
    stacked = torch.stack([each.masked_fill(each == ignore, -1).view(-1) for each in labels])
    wide = {"hidden": case.H, "hidden_r": case.rank}
    return {n: t.reshape(-1, wide[n]) if n in wide else t for n, t in inputs.items()}, stacked


def expected_gradients(case, inputs, labels, upstream, groups, columns, unstored=None):
    rows, stacked = flat(case, inputs, labels)
    ups = torch.stack([up.reshape(-1) for up in upstream])
    found = sparse_gradients(
        rows, stacked, ups, case.options, EPS, groups.reshape(-1), columns, unstored
    )
    return [found[name].view(each.shape) for name, each in inputs.items()]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float64_is_the_definition(case):
    inputs, labels = make(case, torch.float64)
    upstream = [torch.randn(case.shape, dtype=torch.float64) for _ in labels]
    groups = torch.randint(0, 2, case.shape)
    ours = sparse_call(case, inputs, labels, eps=EPS, tail_groups=groups)
    exact = call(linear_logps, case, inputs, labels if case.sets == 2 else labels[0])
    for out, true in zip(ours, exact if case.sets == 2 else (exact,), strict=True):
        torch.testing.assert_close(out, true, rtol=1e-13, atol=1e-13)
    found = gradients(ours, upstream, inputs)
    columns = plan_of(case, inputs, torch.float64).columns
    true = expected_gradients(case, inputs, labels, upstream, groups, columns)
    for name, d, expected in zip(inputs, found, true, strict=True):
        torch.testing.assert_close(d, expected, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_dtype(case, dtype):
    # Entries near eps fall on either side of it when rounded: at most eps each, so the error of an
    # entry is bounded by it. The exact gradient in the same dtype has the other errors.
    inputs, labels = make(case, dtype)
    upstream = [torch.randn(case.shape) for _ in labels]
    groups = torch.randint(0, 2, case.shape)
    found = gradients(sparse_call(case, inputs, labels, eps=EPS, tail_groups=groups),
                      upstream, inputs)  # fmt: skip
    columns = plan_of(case, inputs, torch.float32 if dtype == torch.float16 else dtype).columns
    true = expected_gradients(case, inputs, labels, upstream, groups, columns)
    plain = call(linear_logps, case, inputs, labels if case.sets == 2 else labels[0],
                 workspace_bytes=case.workspace_bytes)  # fmt: skip
    exact = gradients(plain if case.sets == 2 else (plain,), upstream, inputs)
    wide = cast(inputs, torch.float64)
    truth = call(linear_logps, case, wide, labels if case.sets == 2 else labels[0])
    truth = gradients(truth if case.sets == 2 else (truth,), upstream, wide)
    for name, d, expected, rounded, t in zip(inputs, found, true, exact, truth, strict=True):
        assert d.dtype == inputs[name].dtype
        noise = (rounded.double() - t).norm()
        assert (d.double() - expected).norm() <= 2 * noise + 2e-3 * expected.norm(), name


@pytest.mark.parametrize("eps", [0.0, 1.0])
def test_extreme_eps(eps):
    # 0 keeps all there is: exact. 1 keeps nothing: still, nothing is lost in the sum over the rows.
    case = next(case for case in CASES if case.name == "odd")
    inputs, (labels,) = make(case, torch.float64)
    ones = [torch.ones(case.shape, dtype=torch.float64)]
    found = gradients(sparse_call(case, inputs, (labels,), eps=eps), ones, inputs)
    exact = gradients((call(linear_logps, case, inputs, labels),), ones, inputs)
    if eps == 0.0:
        for ours, true in zip(found, exact, strict=True):
            torch.testing.assert_close(ours, true)
    else:
        for ours, true in zip(found, exact, strict=True):
            assert not torch.allclose(ours, true)
        torch.testing.assert_close(found[0].sum((0, 1)), exact[0].sum((0, 1)))


def store_of(monkeypatch, row_bytes):
    monkeypatch.setattr(plan, "_LIST_ROW_BYTES", row_bytes)


@pytest.mark.parametrize("name", ["blocks", "two sets, all"])
def test_without_a_store_the_weight_gradient_is_exact(name, monkeypatch):
    store_of(monkeypatch, 0)
    case = next(case for case in CASES if case.name == name)
    inputs, labels = make(case, torch.float64)
    upstream = [torch.randn(case.shape, dtype=torch.float64) for _ in labels]
    found = gradients(sparse_call(case, inputs, labels, eps=EPS), upstream, inputs)
    exact = gradients(call(linear_logps, case, inputs, labels), upstream, inputs)
    for name, ours, true in zip(inputs, found, exact, strict=True):
        assert name in ("hidden", "hidden_r") or torch.allclose(ours, true, rtol=1e-12)


# The first tiles fit; at 300 bytes a row about half of them.
@pytest.mark.parametrize(("name", "row_bytes"), [("recomputed", 300), ("blocks", 300)])
def test_tiles_out_of_the_store_are_recomputed(name, row_bytes, monkeypatch):
    store_of(monkeypatch, row_bytes)
    case = next(case for case in CASES if case.name == name)
    inputs, labels = make(case, torch.float64)
    upstream = [torch.randn(case.shape, dtype=torch.float64) for _ in labels]
    groups = torch.randint(0, 2, case.shape)
    unstored = unstored_tiles(case, inputs, labels, groups)
    assert unstored.any()
    assert not unstored.all()
    ours = sparse_call(case, inputs, labels, eps=EPS, tail_groups=groups)
    found = gradients(ours, upstream, inputs)
    columns = plan_of(case, inputs, torch.float64).columns
    true = expected_gradients(case, inputs, labels, upstream, groups, columns, unstored=unstored)
    for name, d, expected in zip(inputs, found, true, strict=True):
        torch.testing.assert_close(d, expected, rtol=1e-9, atol=1e-10, msg=name)


def unstored_tiles(case, inputs, labels, groups):
    """(blocks, N) bool, from the table of the op."""
    scale, cap = case.options.get("logit_scale", 1.0), case.options.get("softcap")
    with torch.no_grad():
        outputs = torch.ops.orpo_kernels.sparse_token_logps(
            inputs["hidden"], inputs["weight"], torch.stack(labels), inputs.get("bias"),
            inputs.get("hidden_r"), inputs.get("weight_r"), scale, cap,
            case.options.get("ignore_index", -100), torch.float64, case.workspace_bytes, groups,
            EPS, True, True, False,
        )  # fmt: skip
    table, blocks = outputs[8:10]
    ignore = case.options.get("ignore_index", -100)
    scored = (torch.stack(labels) != ignore).any(0).view(-1)
    rows = int(scored.sum())
    per_chunk = plan_of(case, inputs, torch.float64).even(rows).rows
    missing = (table[:, 1] < 0).view(-1, blocks.shape[0]).repeat_interleave(per_chunk, 0)[:rows]
    found = torch.zeros(blocks.shape[0], scored.shape[0], dtype=torch.bool)
    found[:, scored] = missing.t()
    return found


def test_a_dense_tile_goes_the_exact_way(monkeypatch):
    # Flat rows: the first tile of each chunk is looked at, none is kept.
    monkeypatch.setattr(plan, "live_share", lambda device: 1 / 16)
    case = next(case for case in CASES if case.name == "blocks")
    inputs, labels = make(case, torch.bfloat16)
    with torch.no_grad():
        inputs["hidden"] *= 1e-2
    kept = kept_tiles(monkeypatch)
    upstream = [torch.randn(case.shape) for _ in labels]
    found = gradients(sparse_call(case, inputs, labels), upstream, inputs)
    exact = call(linear_logps, case, inputs, labels, workspace_bytes=case.workspace_bytes)
    for ours, true in zip(found, gradients(exact, upstream, inputs), strict=True):
        assert (ours.double() - true.double()).norm() <= 1e-2 * true.double().norm()
    chunks = len(kept)
    assert 0 < chunks < 10
    assert not any(kept)


def kept_tiles(monkeypatch):
    """Of every tile that is looked at, whether its entries are kept."""
    kept, compact = [], tile_loop.softmax_compact_online_

    def counted(*args):
        results = compact(*args)
        kept.append(results[-1].numel() > 0)
        return results

    monkeypatch.setattr(tile_loop, "softmax_compact_online_", counted)
    return kept


def test_a_sparse_step_has_one_matrix_product(monkeypatch):
    # Peaked rows on the default budget: no product but hidden @ weight.T, forward and backward.
    monkeypatch.setattr(plan, "live_share", lambda device: 1 / 16)
    weight = torch.randn(3000, 16, requires_grad=True)
    labels = torch.randint(0, 3000, (50,))
    hidden = (weight.detach()[labels] * 3).requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as prof:
        linear_logps(hidden, weight, labels, gradient="sparse").sum().backward()
    products = [e.input_shapes for e in prof.events() if e.name in ("aten::mm", "aten::addmm")]
    # Of rank 1: the tail of dW, and the column sums of the dropped entries.
    products = [shapes for shapes in products if all(1 not in shape for shape in shapes)]
    assert [shapes[:2] for shapes in products] == [[[50, 16], [16, 3000]]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(dtype):
    case = next(case for case in CASES if case.name == "blocks")
    inputs, labels = make(case, dtype)

    def run():
        outputs = sparse_call(case, inputs, labels)
        loss = sum(out.sum() for out in outputs)
        return [*outputs, *torch.autograd.grad(loss, list(inputs.values()))]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_backward_twice():
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(12, 8, requires_grad=True)
    labels = torch.randint(0, 12, (6,))
    out = linear_logps(hidden, weight, labels, gradient="sparse", eps=0.1).sum()
    first = torch.autograd.grad(out, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(out, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("shape", [(0, 5), (3, 5)])
def test_nothing_scored(shape):
    hidden = torch.randn(*shape, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    out = linear_logps(hidden, weight, torch.full(shape, -100), gradient="sparse")
    assert not out.any()
    for grad in torch.autograd.grad(out.sum(), (hidden, weight)):
        assert not grad.any()


def test_bias_alone_is_trained():
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    hidden, weight = torch.randn(5, 8).double(), torch.randn(11, 8).double()
    labels = torch.randint(0, 11, (5,))
    out = linear_logps(hidden, weight, labels, bias, gradient="sparse", eps=0.1)
    found = torch.autograd.grad(out.sum(), bias)[0]
    true = sparse_gradients(
        {"hidden": hidden, "weight": weight, "bias": bias}, labels[None], torch.ones(1, 5), {},
        0.1, torch.zeros(5, dtype=torch.int64), 11,
    )["bias"]  # fmt: skip
    torch.testing.assert_close(found, true)


def test_without_gradient_the_exact_op_runs(monkeypatch):
    looked = kept_tiles(monkeypatch)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(12, 8)
    labels = torch.randint(0, 12, (6,))
    with torch.no_grad():
        found = linear_logps(hidden, weight, labels, gradient="sparse")
    assert torch.equal(found, linear_logps(hidden, weight, labels))
    assert looked == []


@pytest.mark.usefixtures("_bfloat16_gemms")
@pytest.mark.parametrize(("dtype", "sparse_calls"), [(torch.float32, 0), (torch.bfloat16, 1)])
def test_auto_is_sparse_for_16_bit(dtype, sparse_calls, monkeypatch):
    looked = kept_tiles(monkeypatch)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(12, 8)
    labels = torch.randint(0, 12, (6,))
    linear_logps(hidden, weight, labels, gradient="auto", compute_dtype=dtype)
    assert len(looked) == sparse_calls


# Around one tile, and the default; logits of 45 MB; every tile kept, or every one refused.
@pytest.mark.parametrize(
    ("budget", "dtype", "trainable", "spread"),
    [
        (8 * 2**20, torch.float32, False, 1.0),
        (8 * 2**20, torch.bfloat16, True, 1.0),
        (64 * 2**20, torch.float32, True, 1.0),
        (24 * 2**20, torch.bfloat16, True, 0.01),
    ],
)
def test_workspace_is_within_the_budget(spread, trainable, dtype, budget, monkeypatch):
    monkeypatch.setattr(plan, "live_share", lambda device: 1 / 16)
    hidden = (torch.randn(700, 64) * spread).to(dtype).requires_grad_()
    weight = torch.randn(16_000, 64, dtype=dtype, requires_grad=trainable)
    labels = torch.randint(0, 16_000, (700,))
    wanted = [each for each in (hidden, weight) if each.requires_grad]

    def step():
        out = linear_logps(hidden, weight, labels, gradient="sparse", workspace_bytes=budget)
        return torch.autograd.grad(out.sum(), wanted)

    results = sum(each.nbytes for each in wanted)
    per_token = 700 * 64
    assert peak_bytes(step) <= budget + results + per_token * 2


@pytest.mark.parametrize("sets", [1, 2])
def test_opcheck(sets):
    hidden = torch.randn(6, 5, requires_grad=True)
    weight, bias = torch.randn(900, 5, requires_grad=True), torch.randn(900, requires_grad=True)
    labels = torch.randint(0, 900, (sets, 6))
    labels[0, 2] = -100
    groups = torch.tensor([0, 0, 0, 1, 1, 1])
    args = (
        hidden, weight, labels, bias, None, None, 1.0, None, -100, torch.float32, None, groups, EPS,
        True, True, False,
    )  # fmt: skip
    opcheck(torch.ops.orpo_kernels.sparse_token_logps.default, args)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_breaks_or_extra_recompiles(backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def step(hidden, weight, labels):
        return linear_logps(hidden, weight, labels, gradient="sparse", eps=0.05).mean()

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    weight = torch.randn(30, 8, requires_grad=True)
    for T in (7, 12, 19):
        hidden, labels = torch.randn(2, T, 8, requires_grad=True), torch.randint(0, 30, (2, T))
        found, expected = compiled(hidden, weight, labels), step(hidden, weight, labels)
        torch.testing.assert_close(found, expected)
        for ours, eager in zip(
            torch.autograd.grad(found, (hidden, weight)),
            torch.autograd.grad(expected, (hidden, weight)),
            strict=True,
        ):
            torch.testing.assert_close(ours, eager)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"eps": -0.1}, ValueError, "eps must be a probability"),
        ({"eps": 1.5}, ValueError, "eps must be a probability"),
        ({"logit_scale": 0.0}, ValueError, "positive logit_scale"),
        ({"tail_groups": torch.zeros(2, 2).long()}, ValueError, "the shape of labels"),
        ({"tail_groups": torch.zeros(2, 3)}, TypeError, "tail_groups must be"),
        ({"tail_groups": torch.full((2, 3), 2)}, ValueError, "0 or 1 everywhere"),
        ({"workspace_bytes": 100}, ValueError, "raise workspace_bytes"),
    ],
)  # fmt: skip
def test_rejects(changes, error, message):
    hidden, labels = torch.randn(2, 3, 4, requires_grad=True), torch.zeros(2, 3).long()
    with pytest.raises(error, match=message):
        linear_logps(hidden, torch.randn(9, 4), labels, gradient="sparse", **changes)


def test_second_derivative_is_refused():
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    between = hidden * 1.0
    labels = torch.zeros(3, dtype=torch.int64)
    out = linear_logps(between, weight, labels, gradient="sparse").sum()
    for each in (between, weight):
        with pytest.raises(NotImplementedError, match="second derivatives"):
            torch.autograd.grad(out, each, create_graph=True)


def test_unscored_rows_under_capture_are_in_no_tail(monkeypatch):
    # Every row is processed then: those not scored as rows of 0, a flat softmax that is all tail.
    case = next(case for case in CASES if case.name == "two sets, all")
    inputs, labels = make(case, torch.float64)
    upstream = [torch.randn(case.shape, dtype=torch.float64) for _ in labels]
    groups = torch.randint(0, 2, case.shape)

    def run():
        ours = sparse_call(case, inputs, labels, eps=EPS, tail_groups=groups)
        return gradients(ours, upstream, inputs)

    plain = run()
    for module in (host_copy, scoring, sparse_weight):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)
    for name, found, expected in zip(inputs, run(), plain, strict=True):
        if "hidden" in name:  # the store is not looked at: the weight gradient is exact
            torch.testing.assert_close(found, expected)
