"""What a call starts on a GPU that is not here: every launch and torch op, in order and in number.

A loop over tiles must start a GEMM, one row kernel and a GEMM for each, a gather and a finish for
each group of rows, and nothing else: a test names the op that is too many.
"""

import contextlib
import itertools
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orpo_kernels.engine import policy, run, scoring
from orpo_kernels.engine.gpu import call
from orpo_kernels.engine.gpu.card import Card
from orpo_kernels.engine.problem import Problem, Transform

pytest.importorskip("triton")

from tests.kernels.dryrun import dryrun

MIB = 2**20
# Llama 3's head, and one of an odd vocabulary that is cast; 1,000 rows: few tiles, a ragged one.
N, H, V = 1000, 4096, 128_256
CARDS = {
    80: Card(108, 2.2e14, 1.6e12, 80), 86: Card(28, 2.5e13, 3e11, 86),
    89: Card(24, 6e13, 2.4e11, 89), 90: Card(132, 7.3e14, 4e12, 90),
    120: Card(36, 7e13, 7e11, 120),
}  # fmt: skip
GEMMS = {"mm.out": "mm", "mm.dtype_out": "mm", "addmm.out": "mm"}
# Nothing runs on the device: memory is taken, or looked at in another way.
FREE = {
    "empty", "new_empty", "empty_like", "view", "_unsafe_view", "slice", "select", "t",
    "transpose", "detach", "alias", "expand", "unsqueeze", "squeeze", "as_strided", "unbind",
    "split", "split_with_sizes", "_reshape_alias", "lift_fresh", "permute",
}  # fmt: skip
# Of forward and backward, while a graph is captured; elsewhere choosing the rows takes one more
# and `torch._assert_async` of what is none takes three less.
MOST_OUTSIDE = {"frozen": 10, "trainable": 15, "evaluation": 8}


class Events(TorchDispatchMode):
    """Names of kernels and torch ops, in the order they are started."""

    def __init__(self, log):
        super().__init__()
        self.log, self.seen, self.names = log, 0, []

    def _launched(self):
        new = self.log[self.seen :]
        self.names += [each.name.removeprefix("_").removesuffix("_kernel") for each in new]
        self.seen = len(self.log)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._launched()
        packet, overload = function.overloadpacket.__name__, function._overloadname
        out = function(*args, **(kwargs or {}))
        on_device = any(
            isinstance(each, torch.Tensor) and each.device.type == "cuda"
            for each in (out, *args)
        )  # fmt: skip
        if packet not in FREE and function.namespace != "prim" and on_device:
            self.names.append(GEMMS.get(f"{packet}.{overload}", f"torch.{packet}"))
        return out

    def all(self):
        self._launched()
        return self.names


class Call(NamedTuple):
    """A head, what trains, and how many label sets."""

    trainable: bool = False
    needs_dhidden: bool = True
    sets: int = 1
    bias: bool = False
    head_dtype: torch.dtype = torch.bfloat16
    vocabulary: int = V


@pytest.fixture
def started(monkeypatch):
    """Events of a forward and a backward, and what was planned for them."""
    plans = []

    def noted(name):
        real = getattr(call, name)

        def run_it(*args, **kwargs):
            plans.append(next(each for each in args if type(each).__name__.endswith("Plan")))
            return real(*args, **kwargs)

        monkeypatch.setattr(call, name, run_it)

    noted("exact_forward")
    noted("exact_head_gradient")
    # nonzero has no fake: every row is processed, as while a graph is captured.
    monkeypatch.setattr(scoring, "is_capturing", lambda device: True)
    monkeypatch.setattr(
        run, "select_again", lambda problem, scored, places: run.select(problem, scored)
    )

    def start(architecture, mib, kind, memory=None):
        card = CARDS[architecture]
        for module in (policy, run):
            monkeypatch.setattr(module, "card_of", lambda device: card)
        monkeypatch.setattr(policy, "device_class", lambda device: "cuda sm_80+")
        plans.clear()
        watch = memory or contextlib.nullcontext()
        with dryrun(architecture) as log, Events(log) as events, watch:
            problem = _problem(kind, mib * MIB)
            begin = len(events.all())
            _, state = run.exact_forward(problem, needs_dhidden=kind.needs_dhidden)
            middle = len(events.all())
            dlogps = torch.empty(kind.sets, N, device="cuda")
            if kind.needs_dhidden:
                run.hidden_gradient_(problem, dlogps, state.statistics, (state.g, state.g_r))
            if kind.trainable:
                bias = None if problem.bias is None else torch.empty_like(problem.bias)
                out = run.HeadGradients((torch.empty_like(problem.weight),), bias)
                places = run.Places(state.places, state.number)
                run.exact_head_gradient(problem, dlogps, state.statistics, state.kept, places, out)
            names = events.all()
        return names[begin:middle], names[middle:], plans, state.kept.shape[0]

    return start


def _problem(kind, budget):
    def cuda(*shape, dtype=torch.bfloat16):
        return torch.empty(shape, dtype=dtype, device="cuda")

    bias = cuda(kind.vocabulary, dtype=kind.head_dtype) if kind.bias else None
    return Problem(
        cuda(N, H), cuda(kind.vocabulary, H, dtype=kind.head_dtype),
        cuda(kind.sets, N, dtype=torch.int64), bias, None, None, Transform(), -100,
        torch.bfloat16, budget, kind.trainable,
    )  # fmt: skip


def _spans(count, step):
    return [(i, min(i + step, count)) for i in range(0, count, step)]


def expected_forward(plan, kept, kind):
    """The launches of the forward's loop, from its plan."""
    cast, odd = kind.head_dtype != torch.bfloat16, kind.vocabulary % 8 > 0
    parts = [(plan.kept_shape, 0, kept)] if kept else []
    parts += [(plan.shape, kept, N)] if kept < N else []
    once = ["label_terms"]  # behind the first product, with which the device is busy meanwhile
    for shape, first, last in parts:
        yield from ["torch.new_zeros"] * cast
        for group in _spans(last - first, shape.group):
            yield "take_rows"
            blocks = _spans(kind.vocabulary, shape.columns)
            for _, v1 in blocks:
                ragged = odd and not cast and v1 == kind.vocabulary
                if ragged and group[0] == 0 and not plan.folded:
                    yield from PADDED
                if cast:
                    yield "take_rows"
                if plan.folded:
                    yield from ("linear_lse", *once, "combine_rows")
                    once = []
                    continue
                gemms = ["mm"] * (1 + ragged)
                for _ in _spans(group[1] - group[0], shape.rows):
                    whole = shape.columns > 8192
                    yield from (*gemms, *once, "softmax_rows" if whole else "softmax_block")
                    once = []
                    if kind.needs_dhidden:
                        yield from gemms
            yield "finish_rows"


# The last entries of an odd vocabulary, when they are first taken.
PADDED = ("torch.new_zeros", "torch.copy_")


def expected_backward(plan, kept, kind):
    """The launches of the weight gradient, from its plan."""
    yield "coefficients"
    for sweep in plan.sweeps:
        cast = kind.head_dtype != torch.bfloat16
        yield from ["torch.new_zeros"] * cast
        if sweep.rows >= N:
            yield "take_rows"
        for _, last in _spans(sweep.last - sweep.first, sweep.columns):
            ragged = kind.vocabulary % 8 > 0 and last + sweep.first == kind.vocabulary
            if ragged and not cast:
                yield from PADDED
            yield from _expected_block(sweep, kept, kind, ragged)
    if kind.bias:
        yield "take_rows"


def _expected_block(sweep, kept, kind, ragged):
    cast = kind.head_dtype != torch.bfloat16
    if cast and kept < N:
        yield "take_rows"
    for start, stop in _spans(N, sweep.rows):
        if sweep.rows < N:
            yield "take_rows"
        split = max(start, min(kept, stop))
        if split > start:
            yield "weight_probs"
        if split < stop:
            yield from (*["mm"] * (2 if ragged and not cast else 1), "weight_probs")
        if kind.bias:
            yield "column_totals"
        yield from ["mm"] * (2 if ragged else 1)
    if sweep.rows < N and not cast:  # the sum of the chunks is rounded
        yield "take_rows"


def outside(names, loop):
    """The events around a loop, which must be there as it is expected."""
    first, second = loop[:2]  # the state of a call is made with new_zeros too
    pairs = list(itertools.pairwise(names))
    begin = pairs.index((first, second)) if (first, second) in pairs else names.index(first)
    for i, (found, expected) in enumerate(
        itertools.zip_longest(names[begin : begin + len(loop)], loop)
    ):
        assert found == expected, f"launch {i} of the loop is {found}, not {expected}"
    return names[:begin] + names[begin + len(loop) :]


KINDS = {
    "frozen": Call(),
    "trainable": Call(trainable=True, sets=2, bias=True),
    "evaluation": Call(needs_dhidden=False),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mib", [64, 256, 1024])
@pytest.mark.parametrize("architecture", [80, 86, 89, 90, 120])
def test_the_loops_start_nothing_else(started, architecture, mib, kind):
    name, kind, score, scale = kind, KINDS[kind], ["score_rows"], ["scale_rows"]
    forward, backward, plans, kept = started(architecture, mib, kind)
    around = outside(forward, list(expected_forward(plans[0], kept, kind)))
    if kind.trainable:
        around += outside(backward, list(expected_backward(plans[1], kept, kind)))
        assert (kept == N) == (mib == 1024)
    else:
        around += backward
    assert len(around) <= MOST_OUTSIDE[name], around
    # Labels, coefficients and g are each done for all rows at once.
    once = {"frozen": [*score, *scale], "trainable": [*score, *scale, *score]}.get(name, score)
    assert [each for each in around if "torch" not in each] == once


@pytest.mark.parametrize("trainable", [False, True])
def test_a_head_that_is_cast_and_odd(started, trainable):
    for dtype in (torch.bfloat16, torch.float32):
        kind = Call(trainable, head_dtype=dtype, vocabulary=32_003)
        forward, backward, plans, kept = started(90, 64, kind)
        assert kept == 0
        outside(forward, list(expected_forward(plans[0], kept, kind)))
        if trainable:
            outside(backward, list(expected_backward(plans[1], kept, kind)))


def test_e_of_some_rows(started):
    kind = Call(trainable=True)
    forward, backward, plans, kept = started(90, 300, kind)
    assert 0 < kept < N
    outside(forward, list(expected_forward(plans[0], kept, kind)))
    outside(backward, list(expected_backward(plans[1], kept, kind)))


@pytest.mark.parametrize("sets", [1, 2])
def test_choosing_the_rows(sets, monkeypatch):
    # Everything between the call and the wait for the count, and between the wait and the loop.
    monkeypatch.setattr(scoring, "waited_for", lambda totals: [N - 1, 0, 0])
    monkeypatch.setattr(scoring, "is_capturing", lambda device: False)
    with dryrun(90) as log, Events(log) as events:
        problem = _problem(Call(sets=sets), 64 * MIB)
        begin = len(events.all())
        scored = scoring.score(problem.labels, -100, V)
        chosen = scoring.select(problem, scored)
        names = events.all()[begin:]
    assert names == ["score_rows", "choose_rows"]
    assert chosen.places.shape == chosen.labels.first.shape == (N - 1,)


def test_an_op_too_many_is_named():
    with pytest.raises(AssertionError, match=r"launch 1 of the loop is torch.clamp, not mm"):
        outside(["torch.ne", "take_rows", "torch.clamp", "mm"], ["take_rows", "mm"])
