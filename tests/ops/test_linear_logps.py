"""linear_logps against the float64 reference: forward, every gradient, every option."""

from dataclasses import dataclass, field

import pytest
import torch
from torch.library import opcheck

from orpo_kernels import linear_logps, reference
from tests.helpers import assert_accurate, peak_bytes


@dataclass(frozen=True)
class Case:
    name: str
    why: str
    shape: tuple = (2, 7)
    H: int = 32
    V: int = 100
    sets: int = 1
    bias: bool = False
    rank: int = 0
    options: dict = field(default_factory=dict)
    workspace_bytes: int | None = None


CASES = [
    Case("plain", "the smallest common case"),
    Case("odd", "H = 31, V = 1003: nothing divides a vector width", H=31, V=1003),
    Case("large V", "V = 262,144, the largest vocabulary in use", shape=(3,), H=8, V=262_144),
    Case("one token", "a single row", shape=(1,)),
    Case("one entry", "V = 1: the label is the whole vocabulary", V=1),
    Case("two entries", "V = 2: the rest is one entry", V=2),
    Case("H = 1", "a dot product of one term", H=1),
    Case("bias", "Phi has one", bias=True),
    Case("scale", "Cohere, Granite", options={"logit_scale": 0.3}),
    Case("softcap", "Gemma 2", options={"softcap": 5.0, "logit_scale": 1.7}, bias=True),
    Case("ignore inside", "ignore_index inside [0, V)", options={"ignore_index": 5}),
    Case("two sets", "odds and NLL labels in one pass", sets=2),
    Case(
        "two sets, all", "with every option", sets=2, bias=True, rank=3, V=203,
        options={"softcap": 5.0, "logit_scale": 0.7, "ignore_index": 7},
    ),
    Case("low rank", "LoRA on the head", rank=4, bias=True),
    Case("blocks", "several row chunks and vocabulary blocks", shape=(300,), V=2500, sets=2,
         bias=True, rank=2, workspace_bytes=4_700_000),
    Case("kept", "E fits the workspace: 3 passes", shape=(40,), V=700, bias=True, rank=2,
         workspace_bytes=64 * 2**20),
    Case("recomputed", "E does not fit: 4 passes", shape=(600,), V=5003, workspace_bytes=8 * 2**20),
]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(case, dtype, requires_grad=True):
    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)

    inputs = {"hidden": tensor(*case.shape, case.H), "weight": tensor(case.V, case.H)}
    if case.bias:
        inputs["bias"] = tensor(case.V)
    if case.rank:
        inputs["hidden_r"] = tensor(*case.shape, case.rank)
        inputs["weight_r"] = tensor(case.V, case.rank)
    ignore = case.options.get("ignore_index", -100)
    labels = [torch.randint(0, case.V, case.shape) for _ in range(case.sets)]
    for each in labels:
        each[torch.rand(case.shape) < 0.3] = ignore
    if case.sets == 2:  # half of the rows agree, as in a preference pair
        labels[1] = torch.where(torch.rand(case.shape) < 0.5, labels[0], labels[1])
    return inputs, tuple(labels)


def call(function, case, inputs, labels, **options):
    low_rank = (inputs["hidden_r"], inputs["weight_r"]) if case.rank else None
    return function(
        inputs["hidden"], inputs["weight"], labels, inputs.get("bias"),
        low_rank=low_rank, **case.options, **options,
    )  # fmt: skip


def production(case, inputs, labels):
    out = call(
        linear_logps, case, inputs, labels if case.sets == 2 else labels[0],
        workspace_bytes=case.workspace_bytes,
    )  # fmt: skip
    return out if case.sets == 2 else (out,)


def oracle(case, inputs, labels):
    return [call(reference.linear_logps, case, inputs, each) for each in labels]


def cast(inputs, dtype):
    return {name: t.detach().to(dtype).requires_grad_(True) for name, t in inputs.items()}


def gradients(outputs, upstream, inputs):
    loss = sum((up.to(out.dtype) * out).sum() for up, out in zip(upstream, outputs, strict=True))
    return torch.autograd.grad(loss, list(inputs.values()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_forward_backward(case, dtype):
    inputs, labels = make(case, dtype)
    upstream = [torch.randn(case.shape) for _ in labels]
    exact, eager = cast(inputs, torch.float64), cast(inputs, dtype)
    truth, naive, ours = oracle(case, exact, labels), oracle(case, eager, labels), None
    ours = production(case, inputs, labels)
    for out, true, plain in zip(ours, truth, naive, strict=True):
        assert out.dtype == torch.float32
        assert (out <= 0).all()
        assert_accurate(out, true, plain)
    found = gradients(ours, upstream, inputs)
    expected = gradients(truth, upstream, exact)
    plain = gradients(naive, upstream, eager)
    for name, d, true, rough in zip(inputs, found, expected, plain, strict=True):
        assert d.dtype == inputs[name].dtype
        assert d.shape == inputs[name].shape
        assert_accurate(d, true, rough)


@pytest.mark.parametrize("case", CASES[:10], ids=lambda case: case.name)
def test_float64_is_exact(case):
    inputs, labels = make(case, torch.float64)
    upstream = [torch.randn(case.shape, dtype=torch.float64) for _ in labels]
    exact = cast(inputs, torch.float64)
    truth, ours = oracle(case, exact, labels), production(case, inputs, labels)
    for out, true in zip(ours, truth, strict=True):
        assert out.dtype == torch.float64
        torch.testing.assert_close(out, true, rtol=1e-12, atol=1e-12)
    pairs = zip(gradients(ours, upstream, inputs), gradients(truth, upstream, exact), strict=True)
    for found, true in pairs:
        torch.testing.assert_close(found, true, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("hidden_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
def test_mixed_dtypes(hidden_dtype, weight_dtype):
    # prepare_model_for_kbit_training hands over an fp32 head, with 16-bit hidden states or fp32.
    hidden = torch.randn(9, 16).to(hidden_dtype).requires_grad_()
    weight = torch.randn(50, 16).to(weight_dtype).requires_grad_()
    labels = torch.randint(0, 50, (9,))
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    out = linear_logps(hidden, weight, labels)
    truth = reference.linear_logps(*exact, labels)
    tolerance = 0.05 if hidden_dtype == weight_dtype != torch.float32 else 1e-5
    torch.testing.assert_close(out.double(), truth, rtol=0, atol=tolerance)
    for found, true in zip(
        torch.autograd.grad(out.sum(), (hidden, weight)),
        torch.autograd.grad(truth.sum(), exact),
        strict=True,
    ):
        assert (found.double() - true).norm() < 0.03 * true.norm()
    assert (
        torch.autograd.grad(linear_logps(hidden, weight, labels).sum(), hidden)[0].dtype
        == hidden_dtype
    )


@pytest.mark.usefixtures("_bfloat16_gemms")
@pytest.mark.parametrize("asked", ["autocast", "compute_dtype"])
def test_reduced_compute_dtype(asked):
    hidden, weight = torch.randn(9, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 50, (9,))
    rounded = [each.detach().bfloat16().requires_grad_() for each in (hidden, weight)]
    expected = linear_logps(*rounded, labels)
    if asked == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = linear_logps(hidden, weight, labels)
    else:
        found = linear_logps(hidden, weight, labels, compute_dtype=torch.bfloat16)
    assert torch.equal(found, expected)
    dhidden, dweight = torch.autograd.grad(found.sum(), (hidden, weight))
    assert dhidden.dtype == dweight.dtype == torch.float32
    # The same GEMMs; a float32 gradient is summed beside them, a bfloat16 one is rounded by them.
    true = torch.autograd.grad(expected.sum(), rounded)[1].float()
    assert (dweight - true).norm() < 2**-8 * true.norm()


def test_noncontiguous_inputs_and_gradients():
    # A shifted slice of hidden states has no (N, H) view; an expanded gradient has stride 0.
    base = torch.randn(3, 8, 2, 16, dtype=torch.float64)
    hidden = base[:, :-1, 0].requires_grad_()
    weight = torch.randn(16, 40, dtype=torch.float64).t().requires_grad_()
    labels = torch.randint(0, 40, (3, 8))[:, 1:]
    upstream = torch.randn(3, 1, dtype=torch.float64).expand(3, 7)
    for mask in (labels, labels.masked_fill(torch.rand(3, 7) < 0.5, -100)):
        found = torch.autograd.grad(linear_logps(hidden, weight, mask), (hidden, weight), upstream)
        exact = torch.autograd.grad(
            reference.linear_logps(hidden, weight, mask), (hidden, weight), upstream
        )
        for ours, true in zip(found, exact, strict=True):
            torch.testing.assert_close(ours, true)


def test_upstream_on_ignored_positions_is_dropped():
    hidden = torch.randn(4, 8, requires_grad=True)
    labels = torch.tensor([1, -100, 2, -100])
    upstream = torch.tensor([1.0, float("nan"), 1.0, float("inf")])
    grad = torch.autograd.grad(linear_logps(hidden, torch.randn(9, 8), labels), hidden, upstream)[0]
    assert torch.isfinite(grad).all()
    assert not grad[labels == -100].any()


@pytest.mark.parametrize("shape", [(0, 5), (3, 5)])
def test_nothing_scored(shape):
    hidden = torch.randn(*shape, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=True)
    out = linear_logps(hidden, weight, torch.full(shape, -100))
    assert out.shape == shape
    assert not out.any()
    for grad in torch.autograd.grad(out.sum(), (hidden, weight)):
        assert not grad.any()


@pytest.mark.parametrize(("hidden_grad", "weight_grad"), [(True, False), (False, True)])
def test_partial_gradients(hidden_grad, weight_grad):
    hidden = torch.randn(5, 8, requires_grad=hidden_grad)
    weight, bias = torch.randn(11, 8, requires_grad=weight_grad), torch.randn(11)
    out = linear_logps(hidden, weight, torch.randint(0, 11, (5,)), bias)
    out.sum().backward()
    assert (hidden.grad is not None) == hidden_grad
    assert (weight.grad is not None) == weight_grad
    assert bias.grad is None


def test_bias_alone_is_trained():
    bias = torch.randn(11, dtype=torch.float64, requires_grad=True)
    hidden, weight = torch.randn(5, 8).double(), torch.randn(11, 8).double()
    labels = torch.randint(0, 11, (5,))
    found = torch.autograd.grad(linear_logps(hidden, weight, labels, bias).sum(), bias)
    true = torch.autograd.grad(reference.linear_logps(hidden, weight, labels, bias).sum(), bias)
    torch.testing.assert_close(found, true)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic(dtype):
    case = next(case for case in CASES if case.name == "blocks")
    inputs, labels = make(case, dtype)

    def run():
        outputs = production(case, inputs, labels)
        return [
            *outputs,
            *torch.autograd.grad(sum(out.sum() for out in outputs), list(inputs.values())),
        ]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_backward_twice():
    # The first backward of a kept graph must not consume what the second needs.
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(12, 8, requires_grad=True)
    out = linear_logps(hidden, weight, torch.randint(0, 12, (6,))).sum()
    first = torch.autograd.grad(out, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(out, (hidden, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inference_keeps_nothing():
    hidden, weight = (
        torch.randn(64, 16, requires_grad=True),
        torch.randn(3000, 16, requires_grad=True),
    )
    labels = torch.randint(0, 3000, (64,))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not linear_logps(hidden, weight, labels).requires_grad
    with torch.no_grad():
        outputs = torch.ops.orpo_kernels.exact_linear_logps(
            hidden, weight, labels[None], None, None, None, 1.0, None, -100, torch.float32, None,
            False, False, True,
        )  # fmt: skip
    assert all(each.numel() == 0 for each in outputs[2:])


# Budgets around one tile, and a V (16,000) whose (N, V) logits are 45 MB: none of them may appear.
@pytest.mark.parametrize("budget", [8 * 2**20, 24 * 2**20, 64 * 2**20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("trainable", [False, True], ids=["frozen", "trainable"])
def test_workspace_is_within_the_budget(trainable, dtype, budget):
    hidden = torch.randn(700, 64, dtype=dtype, requires_grad=True)
    weight = torch.randn(16_000, 64, dtype=dtype, requires_grad=trainable)
    labels = torch.randint(0, 16_000, (700,))
    wanted = [each for each in (hidden, weight) if each.requires_grad]

    def step():
        out = linear_logps(hidden, weight, labels, workspace_bytes=budget)
        return torch.autograd.grad(out.sum(), wanted)

    results = sum(each.nbytes for each in wanted)
    per_token = 700 * 64  # log-probs, statistics, labels, index
    assert peak_bytes(step) <= budget + results + per_token * 2


@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("workspace_bytes", [None, 5_000_000], ids=["kept", "recomputed"])
def test_opcheck(sets, workspace_bytes):
    hidden = torch.randn(6, 5, requires_grad=True)
    weight, bias = torch.randn(90_00, 5, requires_grad=True), torch.randn(90_00, requires_grad=True)
    labels = torch.randint(0, 9000, (sets, 6))
    labels[0, 2] = -100
    args = (
        hidden, weight, labels, bias, None, None, 1.0, None, -100, torch.float32, workspace_bytes,
        True, True, False,
    )  # fmt: skip
    opcheck(torch.ops.orpo_kernels.exact_linear_logps.default, args)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiles_without_breaks_or_extra_recompiles(backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    def step(hidden, weight, labels):
        return linear_logps(hidden, weight, labels).mean()

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


def _arguments(**changes):
    arguments = {
        "hidden": torch.randn(2, 3, 4),
        "weight": torch.randn(9, 4),
        "labels": torch.zeros(2, 3, dtype=torch.int64),
    }
    return {**arguments, **changes}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4, dtype=torch.int64)}, TypeError, "hidden must be floating"),
        ({"weight": torch.zeros(9, 4, dtype=torch.uint8)}, TypeError, "dequantise the head first"),
        ({"weight": torch.randn(9, 5)}, ValueError, "hidden must be"),
        ({"weight": torch.randn(4, 9)}, ValueError, "not transposed"),
        ({"labels": torch.zeros(2, 2).long()}, ValueError, "labels must have the shape"),
        ({"labels": torch.zeros(2, 3)}, TypeError, "labels must be integer"),
        ({"labels": torch.full((2, 3), 9)}, ValueError, r"\[0, 9\).*got 9"),
        ({"labels": torch.full((2, 3), -1)}, ValueError, "got -1"),
        ({"labels": (torch.zeros(2, 3, dtype=torch.int64),) * 3}, ValueError, "tuple of two"),
        ({"bias": torch.randn(8)}, ValueError, r"bias must be \(V,\)"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive"),
        ({"softcap": float("inf")}, ValueError, "softcap must be positive and finite"),
        ({"labels": [torch.zeros(2, 3).long()] * 2}, TypeError, "a tuple of two, got list"),
        ({"weight": torch.randn(9, 4).to(torch.float8_e4m3fn)}, TypeError, "16 to 64 bits"),
        ({"gradient": "sparce"}, ValueError, "gradient must be one of .*; did you mean 'sparse'"),
        ({"compute_dtype": torch.int8}, TypeError, "compute_dtype must be floating"),
        ({"workspace_bytes": 100}, ValueError, "raise workspace_bytes"),
        ({"low_rank": (torch.randn(2, 3, 2), torch.randn(9, 3))}, ValueError, "low_rank must be"),
    ],
)  # fmt: skip
def test_rejects(changes, error, message):
    with pytest.raises(error, match=message):
        linear_logps(**_arguments(**changes))


def test_second_derivative_is_refused():
    # Through a non-leaf, where autograd would silently drop the second-order term.
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    between = hidden * 1.0
    out = linear_logps(between, weight, torch.zeros(3, dtype=torch.int64)).sum()
    for each in (between, weight):
        with pytest.raises(NotImplementedError, match="second derivatives"):
            torch.autograd.grad(out, each, create_graph=True)


def test_forward_mode_is_refused():
    labels = torch.zeros(3, dtype=torch.int64)

    def logps(hidden):
        return linear_logps(hidden, torch.ones(9, 4), labels)

    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(logps, (torch.randn(3, 4),), (torch.ones(3, 4),))


def test_a_budget_too_small_for_the_backward_is_refused_in_the_forward():
    hidden, weight = torch.randn(17, 257), torch.randn(3000, 257, requires_grad=True)
    with pytest.raises(ValueError, match="raise workspace_bytes"):
        linear_logps(hidden, weight, torch.zeros(17, dtype=torch.int64), workspace_bytes=2**18)
