"""The loops of a GPU in the strict interpreter against float64: both kinds of tile, all options."""

from typing import NamedTuple

import pytest
import torch

from orpo_kernels.engine.gpu import backward, forward
from orpo_kernels.engine.gpu.plan import ForwardPlan
from orpo_kernels.engine.gpu.shapes import Shape, Sweep
from orpo_kernels.engine.tile_loop import Results
from orpo_kernels.engine.weight_gradient import HeadGradients
from orpo_kernels.kernels.coefficients import Slopes
from orpo_kernels.kernels.inputs import Inputs
from orpo_kernels.kernels.scale_rows import scale_rows
from tests.kernels.interpreted.engine import as_on_a_gpu, short_steps
from tests.kernels.interpreted.plugin import launches, programs

F32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
# N = 8 rows in chunks of 3, the last one short. H = 24: three vectors, two steps of 16. V = 203: no
# vector divides it, three blocks of 72 columns, the last one ragged; whole rows are four steps of
# 64.
N, H, V, RANK = 8, 24, 203, 8
BLOCKS, WHOLE = Shape(3, 3, 72), Shape(3, 3, V)


class Case(NamedTuple):
    """A problem of a kind, and the shapes of its loops."""

    dtype: torch.dtype
    shape: Shape = BLOCKS
    head_dtype: torch.dtype | None = None
    bias: bool = False
    rank: int = 0
    sets: int = 1
    scale: float = 1.0
    softcap: float | None = None
    columns: int = H
    widens: bool = True
    held: int = 16_384
    kept: int = 0
    sweeps: tuple[Sweep, ...] = (Sweep(0, V, N, 72),)


class Problem:
    """Tensors of a case, what it fills, and the truth in float64."""

    def __init__(self, case, monkeypatch):
        as_on_a_gpu(monkeypatch, widens=case.widens)
        monkeypatch.setattr(forward, "MOST_HELD", case.held)
        short_steps(monkeypatch)
        self.case = case
        self.hidden = [torch.randn(N, case.columns).to(case.dtype)]
        weight = torch.randn(V, case.columns) * 3 * case.columns**-0.5
        self.weight = [weight.to(case.head_dtype or case.dtype)]
        if case.rank:
            self.hidden.append(torch.randn(N, case.rank).to(case.dtype))
            self.weight.append((torch.randn(V, case.rank) / 3).to(case.dtype))
        self.bias = torch.randn(V).to(case.dtype) if case.bias else None
        self.labels = torch.randint(0, V, (case.sets, N))
        self.labels[:, 3] = -100
        if case.sets == 2:  # alike, differing, and one of them alone
            self.labels[1, 4:] = self.labels[0, 4:]
            self.labels[0, 1] = self.labels[1, 2] = -100
            self.labels[1, 5] = V - 9
        self.labels[0, 0], self.labels[-1, -1] = 0, V - 1  # the first column and the last
        self.dlogps = torch.randn(case.sets, N)

    def inputs(self, *, masked=False):
        masks = self.labels != -100
        first = torch.where(masks[0], self.labels[0], self.labels[-1])
        first = torch.where(masks.any(0), first, -1)
        second = None
        if self.case.sets == 2:
            differs = masks[0] & masks[1] & (self.labels[0] != self.labels[1])
            second = torch.where(differs, self.labels[1], -1)
        places = None if masked else masks.any(0).nonzero()[:, 0]
        if places is not None:
            first, second = first[places], None if second is None else second[places]
        case = self.case
        wide = F32 if case.widens else case.dtype
        return Inputs(
            tuple(self.hidden), tuple(self.weight), self.bias, first, second, places,
            masks.any(0) if masked else None, case.scale, case.softcap, case.dtype, wide,
        )  # fmt: skip

    def forward(self, *, with_g=True, masked=False):
        case, rows = self.case, N if with_g else 0
        self.statistics = torch.zeros(7, N)
        self.g = [torch.zeros(rows, part.shape[1], dtype=part.dtype) for part in self.hidden]
        self.kept = None
        if case.kept:
            self.kept = torch.full((case.kept, -(-V // 8) * 8), torch.nan, dtype=case.dtype)
        nothing = torch.zeros(rows, 0, dtype=case.dtype)
        out = Results(self.statistics, *[*self.g, nothing][:2])
        plan = ForwardPlan(case.shape, WHOLE if case.kept else None, False, 0, 0.0)
        forward.forward(self.inputs(masked=masked), plan, self.kept, out)

    def backward(self, *, masked=False, wanted=None, dtype=None):
        slopes = Slopes(self.dlogps, self.labels, -100)
        weights = tuple(
            torch.full_like(part, torch.nan, dtype=dtype) if wanted is None or i in wanted else None
            for i, part in enumerate(self.weight)
        )
        self.gradients = HeadGradients(
            weights, None if self.bias is None else torch.full_like(self.bias, torch.nan)
        )
        backward.weight_gradient(
            self.inputs(masked=masked), self.statistics, slopes, self.case.sweeps, self.kept,
            self.gradients,
        )  # fmt: skip
        scale_rows(tuple(self.g), self.statistics, slopes, tuple(self.weight), self.case.dtype)

    def truth(self):
        """Log-probs of both sets, and the gradients, of the operands as the GEMMs round them."""
        case = self.case
        rounded = [
            [part.to(case.dtype).double().requires_grad_() for part in parts]
            for parts in (self.hidden, self.weight)
        ]
        hidden, weight = (torch.cat(parts, 1) for parts in rounded)
        bias = None if self.bias is None else self.bias.double().requires_grad_()
        z = hidden @ weight.t()
        z = case.scale * (z if bias is None else z + bias)
        if case.softcap is not None:
            z = case.softcap * torch.tanh(z / case.softcap)
        logps = torch.log_softmax(z, 1)
        scored = self.labels != -100
        of_labels = logps.gather(1, self.labels.clamp(min=0).t()).t()
        of_labels = torch.where(scored, of_labels, 0.0)
        leaves = [*rounded[0], *rounded[1], *([] if bias is None else [bias])]
        found = torch.autograd.grad((of_labels * self.dlogps.double()).sum(), leaves)
        return of_labels.detach(), found

    def logps(self):
        scored = self.labels != -100
        first, second = self.statistics[3:5]
        found = [first]
        if self.case.sets == 2:
            differs = scored[0] & scored[1] & (self.labels[0] != self.labels[1])
            found.append(torch.where(differs, second, first))
        return torch.where(scored, torch.stack(found), 0.0)

    def check(self, bound=None):
        """The gradients, within the rounding of what the GEMMs multiply and of the results."""
        case = self.case
        logps, truth = self.truth()
        wide = F32 if case.widens else case.dtype
        error = 3e-5 if wide == F32 else 16 * torch.finfo(wide).eps
        torch.testing.assert_close(self.logps().double(), logps, rtol=error, atol=error)
        found = [*self.g, *self.gradients.weights]
        found += [] if self.bias is None else [self.gradients.bias]
        bound = bound or (3e-6 if case.dtype == F32 else 2 * torch.finfo(case.dtype).eps)
        for ours, true in zip(found, truth, strict=True):
            if ours is not None:
                assert (ours.double() - true).norm() <= bound * true.norm()
        assert not self.g[0][3].any()  # of the row nobody scores


@pytest.fixture
def solved(monkeypatch):
    def solve(case, **options):
        problem = Problem(case, monkeypatch)
        problem.forward()
        problem.backward(**options)
        return problem

    return solve


CHUNKS = (Sweep(0, V, 3, 72),)
ALL = {"bias": True, "sets": 2, "scale": 0.7, "softcap": 5.0}
CASES = [
    pytest.param(Case(F32), id="float32: sums and products in place"),
    pytest.param(Case(F32, WHOLE, sweeps=CHUNKS), id="float32, one block, rows in chunks"),
    pytest.param(Case(F32, WHOLE, held=128), id="float32, rows too long to be held: two looks"),
    pytest.param(Case(BF16), id="bfloat16: P over the logits"),
    pytest.param(Case(BF16, WHOLE, held=128, **ALL), id="bfloat16, whole rows: one look"),
    pytest.param(Case(BF16, **ALL, rank=RANK, sweeps=CHUNKS), id="every option, a LoRA"),
    pytest.param(Case(BF16, Shape(6, 3, 72), F32, **ALL), id="a head that is cast, in groups"),
    pytest.param(Case(BF16, Shape(4, 4, 72), F32, sweeps=CHUNKS), id="float32 dW, added in place"),
    pytest.param(Case(BF16, columns=17), id="odd H: no vectors"),
    pytest.param(Case(FP16, **ALL), id="float16, scaled"),
    pytest.param(Case(FP16, widens=False, sweeps=CHUNKS), id="16-bit logits: products apart"),
    pytest.param(Case(FP16, WHOLE, widens=False, held=128), id="16-bit logits, whole rows"),
    pytest.param(Case(BF16, widens=False, **ALL), id="16-bit logits of bfloat16"),
    pytest.param(Case(BF16, kept=N, **ALL), id="E kept"),
    pytest.param(Case(BF16, kept=5, held=128), id="E kept of some rows"),
    pytest.param(Case(F32, kept=5, sweeps=CHUNKS), id="E kept where the logits were"),
    pytest.param(Case(FP16, kept=5, widens=False), id="E kept of 16-bit logits"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_against_float64(solved, case):
    # 16-bit logits cost a rounding of z: eps |z|, of E and of what is summed from it.
    bound = None if case.widens else 24 * torch.finfo(case.dtype).eps
    solved(case).check(bound)


def test_rows_at_hand_in_the_end_of_the_gradient(solved):
    # 7 rows in bfloat16 lie in the last 59 entries of dW, which are done in chunks after it.
    sweeps = (Sweep(0, 144, N, 72, in_result=True), Sweep(144, V, 3, 40))
    solved(Case(BF16, bias=True, sweeps=sweeps)).check()


def test_only_a_lora_trains(solved):
    problem = solved(Case(BF16, rank=RANK), wanted={1})
    assert problem.gradients.weights[0] is None
    problem.check()


def test_a_gradient_in_another_dtype_than_the_gemm_writes(solved):
    solved(Case(BF16, head_dtype=FP16, sets=2)).check(2 * torch.finfo(BF16).eps)


@pytest.mark.parametrize("kind", ["blocks", "whole rows"])
@pytest.mark.parametrize("dtype", [F32, BF16, FP16], ids=str)
def test_a_maximum_that_comes_last_by_a_hundred_nats(solved, monkeypatch, dtype, kind):
    shape, held = (BLOCKS, 16_384) if kind == "blocks" else (WHOLE, 256)
    case = Case(dtype, shape, held=held, bias=True)
    problem = Problem(case, monkeypatch)
    problem.weight[0] /= 8
    # Steps that leave the reference, that move it, and one of 100; logits from -150 to 100.
    for v0, v1, level in ((0, 72, -150.0), (72, 90, -40.0), (90, 144, -35.0), (199, V, 100.0)):
        problem.bias[v0:v1] += level
    problem.labels[0, :4] = torch.tensor([10, 201, 150, -100])
    problem.forward()
    problem.backward()
    problem.check()


@pytest.mark.parametrize("kind", ["blocks", "whole rows"])
def test_masked_entries(solved, monkeypatch, kind):
    # -inf in all of the first block; finfo.min in another; for one row nothing is left but its
    # label, and the rest has no mass.
    shape, held = (BLOCKS, 16_384) if kind == "blocks" else (WHOLE, 64)
    problem = Problem(Case(F32, shape, held=held, bias=True), monkeypatch)
    problem.bias[:72] = -torch.inf
    problem.bias[80:100] = torch.finfo(F32).min
    problem.labels[problem.labels >= 0] = 150
    problem.forward()
    problem.backward()
    problem.check()
    alone = Problem(Case(F32, shape, held=held, bias=True), monkeypatch)
    alone.bias[:] = -torch.inf
    alone.bias[7] = 0.0
    alone.labels[alone.labels >= 0] = 7
    alone.forward()
    alone.backward()
    assert not alone.logps().any()
    assert not alone.g[0].any()
    assert not alone.gradients.weights[0].any()


def test_rows_that_are_not_scored_are_read_as_zero(monkeypatch):
    # As while a CUDA graph is captured: every row is processed, whatever padding left in it.
    problem = Problem(Case(BF16, sets=2, rank=RANK, sweeps=CHUNKS), monkeypatch)
    for part in problem.hidden:
        part[3] = torch.nan
    problem.forward(masked=True)
    problem.backward(masked=True)
    for part in problem.hidden:
        part[3] = 0.0
    problem.check()


def test_a_slice_of_a_batch_is_read_where_it_is(monkeypatch):
    # hidden[:, :-1] of (2, 5, H): rows at two strides, none of which is a view of (N, H).
    problem = Problem(Case(BF16), monkeypatch)
    whole = torch.full((2, 5, H), torch.nan, dtype=BF16)
    whole[:, :4] = problem.hidden[0].view(2, 4, H)
    flat = problem.inputs()
    inputs = flat._replace(hidden=(whole[:, :4],))
    found = []
    for each in (flat, inputs):
        out = Results(torch.zeros(7, N), torch.zeros(N, H, dtype=BF16), torch.zeros(N, 0))
        forward.forward(each, ForwardPlan(BLOCKS, None, False, 0, 0.0), None, out)
        found.append(out)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_smallest_gradients_of_float16(solved, monkeypatch):
    # Unscaled, coefficients of 1e-6 on probabilities of 1e-3 are under its smallest number.
    problem = Problem(Case(FP16, head_dtype=F32), monkeypatch)
    problem.dlogps *= 1e-6
    problem.forward()
    problem.backward()
    _, truth = problem.truth()
    error = problem.gradients.weights[0].double() - truth[1]
    assert error.norm() <= 2 * torch.finfo(FP16).eps * truth[1].norm()


def test_hidden_states_that_float16_products_leave_room_for(solved, monkeypatch):
    # Where a GEMM writes float16 its products are scaled to 2^14, and what multiplies h of 1 / 64
    # must not be 64 times that.
    problem = Problem(Case(FP16, widens=False), monkeypatch)
    problem.hidden[0] /= 64 * problem.hidden[0].abs().max()
    problem.labels[:, 1:] = -100
    problem.forward()
    problem.backward()
    problem.check()


def test_a_repeated_label_costs_nothing(solved, monkeypatch):
    # The labels' entries are in P: the same launches and programs, whatever the labels are.
    started = []
    for repeated in (False, True):
        problem = Problem(Case(BF16, sweeps=CHUNKS), monkeypatch)
        if repeated:
            problem.labels[problem.labels >= 0] = 11
        before = len(programs)
        problem.forward()
        problem.backward()
        problem.check()
        started.append(programs[before:])
    assert started[0] == started[1]


def test_launches_of_both_kinds(monkeypatch):
    problem = Problem(Case(BF16), monkeypatch)
    before = len(launches)
    problem.forward()
    # GEMMs are not in the list: the labels' terms come behind the first one.
    chunk = ["take_rows", *["softmax_block"] * 3, "finish_rows"]
    assert launches[before:] == ["take_rows", "label_terms", *chunk[1:], *chunk * 2]
    problem = Problem(Case(BF16, WHOLE, held=128), monkeypatch)
    before = len(launches)
    problem.forward()
    chunk = ["take_rows", "softmax_rows", "finish_rows"]
    assert launches[before:] == ["take_rows", "label_terms", *chunk[1:], *chunk * 2]


@pytest.mark.parametrize("kind", ["blocks", "whole rows"])
def test_without_a_gradient(monkeypatch, kind):
    shape, held = (BLOCKS, 16_384) if kind == "blocks" else (WHOLE, 256)
    problem = Problem(Case(BF16, shape, held=held, **ALL), monkeypatch)
    problem.forward(with_g=False)
    torch.testing.assert_close(problem.logps().double(), problem.truth()[0], rtol=3e-5, atol=3e-5)


def test_same_bits_in_any_order(monkeypatch):
    # Programs run in another order each time.
    problem = Problem(Case(BF16, bias=True, kept=5, sweeps=CHUNKS), monkeypatch)
    found = []
    for _ in range(2):
        problem.forward()
        problem.backward()
        found.append([problem.statistics, *problem.g, *problem.gradients.weights])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
