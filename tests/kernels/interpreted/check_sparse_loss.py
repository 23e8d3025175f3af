"""`gradient="sparse"`, forward and backward, through the launchers: as a CUDA tensor would take it.

Against the definition in float64 with columns kept by 64 scored rows. What is left is the rounding
of slots to bfloat16 (2^-9 of an entry), of the head's rows where these are float32 or wider, and
entries that rounding moves across eps.
"""

import itertools
from typing import NamedTuple

import pytest
import torch

from orpo_kernels import orpo_loss, reference
from orpo_kernels.engine import host_copy, scoring
from orpo_kernels.engine.sparse import plan, scan_loop, slot_gradient
from orpo_kernels.kernels import keep_slots, live_columns, scan, tuning
from orpo_kernels.kernels.scan import LOOKED
from orpo_kernels.kernels.slot_store import KEPT_ROUNDING, ScanShape
from orpo_kernels.linear_logps import certified_logps
from orpo_kernels.loss import orpo_loss_from_logps
from orpo_kernels.options import LogpsOptions
from tests.kernels.interpreted.engine import as_on_a_gpu
from tests.kernels.interpreted.plugin import launches

# N = 150: of the scored ones a block of 64 and a ragged one. V = 523: no vector and no tile divides
# it, three blocks of 256.
# At eps a seventh of the entries is kept, and a quarter of the mass is an average.
N, H, V, EPS = 150, 24, 523, 2.0**-4
BLOCKS = 3_000_000  # bytes; with them the tiles of a test are 64 x 256


class Case(NamedTuple):
    """What a call is given."""

    dtype: torch.dtype = torch.bfloat16
    widens: bool = True
    softcap: float | None = None
    scale: float = 1.0
    bias: bool = False
    sets: int = 1
    groups: bool = True
    workspace: int | None = None
    trains: bool = False


class Problem(NamedTuple):
    """Its tensors."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    labels: torch.Tensor  # (K, N)
    groups: torch.Tensor | None
    a: torch.Tensor  # (K, N)


shapes = []  # of the forwards so far that looked once


def problem(case, monkeypatch, *, guarded=False):
    as_on_a_gpu(monkeypatch, widens=case.widens)
    for kernel, dtype in itertools.product(("scan", "scan_softcap"), (torch.float32, case.dtype)):
        key = (kernel, "datacenter", dtype)
        monkeypatch.setitem(tuning.TABLE, key, (tuning.Row(2, 2, 64),))  # two spans to a block
    if case.workspace == BLOCKS:
        shape = ScanShape(64, 256, 1024, V, 4)
        monkeypatch.setattr(plan, "plan_scan", lambda *_: (shape, 0))
    prepared = scan_loop.Prepared

    def noted(candidates, shape):
        shapes.append(shape)
        return prepared(candidates, shape)

    monkeypatch.setattr(scan_loop, "Prepared", noted)
    monkeypatch.setattr(plan, "_MOST_KEPT", 1)  # the store has room for all
    monkeypatch.setattr(keep_slots, "_COUNTED", 1)  # row blocks: several steps
    if not guarded:  # whatever is kept and dropped, no row block is done the exact way
        monkeypatch.setattr(live_columns, "MOST_LOST", 1.0)
        monkeypatch.setattr(live_columns, "MOST_LIVE", 1)
    weight = torch.randn(V, H)
    candidates = torch.randint(0, V, (3, N))
    shares = torch.rand(3, N, 1) * 0.6
    hidden = (shares * weight[candidates]).sum(0) + 0.1 * torch.randn(N, H)
    labels = candidates[: case.sets].clone()
    labels[0, ::5] = -100  # not scored: row blocks are of the others
    labels[-1, 7] = V - 1
    bias = torch.randn(V).to(case.dtype).requires_grad_(case.trains) if case.bias else None
    return Problem(
        hidden.to(case.dtype).requires_grad_(),
        (weight + torch.randn(H)).to(case.dtype).requires_grad_(case.trains),  # common direction
        bias, labels, torch.arange(N) // 70 % 2 if case.groups else None,
        (torch.rand(case.sets, N) + 0.5) * torch.where(torch.arange(N) // 70 % 2 == 1, 0.3, -1.0),
    )  # fmt: skip


def run(case, given):
    """Log-probs, certificate, and gradients by name."""
    options = LogpsOptions(
        case.scale, case.softcap, gradient="sparse", eps=EPS, tail_groups=given.groups,
        workspace_bytes=case.workspace,
    )  # fmt: skip
    labels = tuple(given.labels) if case.sets == 2 else given.labels[0]
    logps, certificate = certified_logps(given.hidden, given.weight, labels, given.bias, options)
    logps = torch.stack(logps) if case.sets == 2 else logps[None]
    named = {"hidden": given.hidden, "weight": given.weight, "bias": given.bias}
    named = {k: v for k, v in named.items() if v is not None and v.requires_grad}
    found = torch.autograd.grad((logps * given.a).sum(), list(named.values()))
    return logps.detach(), certificate, dict(zip(named, found, strict=True))


class Truth(NamedTuple):
    """Gradients by name, and the sparse form of the scored rows, with all entries beside it."""

    gradients: dict
    softmax: reference.SparseSoftmax
    entries: torch.Tensor
    rows: torch.Tensor


def truth(case, given, columns=None, exact_rows=slice(0), looked=None, whole=None):
    """Of the definition; scored rows of `exact_rows` have nothing dropped in dW.

    Those of the mask `whole` have nothing dropped at all.
    """
    wide = [None if t is None else t.detach().double() for t in given[:3]]
    options = {"logit_scale": case.scale, "softcap": case.softcap}
    form = {"eps": EPS, "groups": given.groups, "block": 64, "columns": columns, "looked": looked}
    form["whole"] = whole
    found = reference.sparse_gradients(
        *wide[:2], tuple(given.labels), tuple(given.a.double()), wide[2], **form, **options
    )
    scored = (given.labels != -100).any(0)
    labels, a = given.labels[:, scored], given.a.double()[:, scored]
    a = torch.where(labels != -100, a, 0.0).sum(0)
    raw = wide[0][scored] @ wide[1].t()
    z, slope = reference.transform(raw if wide[2] is None else raw + wide[2], *options.values())
    is_label = torch.isinf(reference.tile_logits(raw, wide[2], labels, 0, *options.values())[0])
    u = (z.softmax(1) * slope).masked_fill(is_label, 0.0)
    kept = found.softmax.kept
    packed = kept.clone()
    packed[exact_rows] = u[exact_rows]
    mass = (u - packed).sum(1)
    group = torch.zeros(len(a), dtype=torch.long) if given.groups is None else given.groups[scored]
    q = found.softmax.tail[group]
    before = kept + found.softmax.mass[:, None] * q
    change = a[:, None] * (before - packed - mass[:, None] * q)
    gradients = {
        "hidden": found.dhidden, "weight": found.dweight + change.t() @ wide[0][scored],
        "bias": found.dbias + change.sum(0),
    }  # fmt: skip
    return Truth(gradients, found.softmax, u, scored)


def relative(found, true):
    return float((found.double() - true).norm() / true.norm())


# float32 heads are rounded to bfloat16 for the product, fp16 and bf16 gradients to their dtype.
CASES = [
    pytest.param(Case(), id="bf16"),
    pytest.param(Case(torch.float16, sets=2, bias=True), id="fp16, two label sets, bias"),
    pytest.param(Case(torch.float32, softcap=20.0, scale=0.8), id="float32, softcap, scale"),
    pytest.param(Case(widens=False, groups=False), id="16-bit logits, one group"),
    pytest.param(Case(torch.float32, workspace=BLOCKS), id="vocabulary blocks, chunks"),
    pytest.param(Case(softcap=20.0, bias=True, sets=2, workspace=BLOCKS), id="all, blocks"),
    pytest.param(Case(trains=True), id="trains"),
    pytest.param(Case(torch.float32, trains=True, bias=True, sets=2), id="trains, float32, all"),
    pytest.param(Case(torch.float16, trains=True, softcap=20.0), id="trains, fp16, softcap"),
    pytest.param(Case(trains=True, workspace=BLOCKS, bias=True, sets=2), id="trains, blocks"),
    pytest.param(Case(widens=False, trains=True, scale=0.7), id="trains, 16-bit logits"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_gradients(case, monkeypatch):
    given = problem(case, monkeypatch)
    before = len(launches)
    logps, certificate, found = run(case, given)
    used = set(launches[before:])
    assert {"scan", "live_columns", "pack_slots", "gather_slots"} <= used
    assert ({"keep_slots", "slot_products", "sum_products", "given_back"} <= used) == case.trains
    assert "weight_probs" not in used  # nothing was recomputed
    shape = shapes[-1]
    assert (shape.columns < V) == (case.workspace == BLOCKS)

    true = truth(case, given, shape.columns, looked=LOOKED)
    # Logits of 16 bits err more than anything here.
    rounding = 0.0 if case.widens else 2e-2
    for name, each in found.items():
        assert relative(each, true.gradients[name]) < 3.5e-3 + rounding, name
    wide = [None if t is None else t.detach().double() for t in given[:3]]
    for mine, labels in zip(logps, given.labels, strict=True):
        expected = reference.linear_logps(
            *wide[:2], labels, wide[2], logit_scale=case.scale, softcap=case.softcap
        )
        torch.testing.assert_close(
            mine.double(), expected, rtol=1e-5 + rounding, atol=1e-5 + rounding
        )
    # The certificate of the definition, kept entries in bfloat16; a bound with a softcap.
    mass, residual = true.softmax.mass / case.scale, certificate.residual_rms
    unit = KEPT_ROUNDING / (1 - KEPT_ROUNDING)
    total = (1 - torch.exp(logps.double()).sum(0))[true.rows]
    kept_sum = (true.entries.sum(1) / case.scale if case.softcap is None else total) - mass
    expected = (EPS * (mass + unit * kept_sum).clamp(min=0.0)).sqrt().mean()
    if case.widens and case.sets == 1:
        torch.testing.assert_close(certificate.tail_mass.double(), mass.mean(), rtol=0, atol=2e-3)
        torch.testing.assert_close(residual.double(), expected, rtol=0.05, atol=0)
    dropped = true.entries.masked_fill(true.softmax.mask, 0.0).norm(dim=1) / case.scale
    assert residual > dropped.mean()
    assert certificate.residual_rms_max > dropped.amax()
    share = true.softmax.mask.double().mean()
    torch.testing.assert_close(certificate.kept_share.double(), share, rtol=0.1, atol=0)


@pytest.mark.parametrize("trains", [False, True], ids=["frozen", "trains"])
def test_the_scale_changes_no_choice(trains, monkeypatch):
    # Cohere's and Granite's logits are a 16th of the product: a power of two, so bits are the same.
    given = problem(Case(trains=trains), monkeypatch)
    large = given._replace(hidden=(16 * given.hidden.detach()).requires_grad_())
    logps, certificate, found = run(Case(trains=trains), given)
    scaled, of_scaled, its = run(Case(trains=trains, scale=1 / 16), large)
    assert torch.equal(logps, scaled)
    assert torch.equal(torch.stack(certificate), torch.stack(of_scaled))
    assert certificate.tail_mass > 0.05
    assert torch.equal(found["hidden"], 16 * its["hidden"])
    assert not trains or torch.equal(found["weight"], its["weight"])


@pytest.mark.parametrize("workspace", [None, BLOCKS], ids=["the vocabulary", "wide blocks"])
def test_tiles_that_are_wider_than_their_first_look(workspace, monkeypatch):
    for module in (scan, scan_loop):
        monkeypatch.setattr(module, "LOOKED", 128)
    case = Case(torch.float32, trains=True, bias=True, workspace=workspace)
    _, certificate, found = run(case, given := problem(case, monkeypatch))
    true, wider = (truth(case, given, shapes[-1].columns, looked=each) for each in (128, LOOKED))
    assert all(relative(each, true.gradients[name]) < 3.5e-3 for name, each in found.items())
    share, less = (each.softmax.mask.double().mean() for each in (true, wider))
    torch.testing.assert_close(certificate.kept_share.double(), share, rtol=0.02, atol=0)
    assert share > less


def test_what_is_tested_is_not_the_exact_gradient(monkeypatch):
    # The tolerance above tells the definition from the exact gradient, and from a dropped tail.
    case = Case(torch.float32, trains=True)
    given = problem(case, monkeypatch)
    true = truth(case, given, V, looked=LOOKED)
    exact = truth(case, given, V, slice(None), LOOKED).gradients["weight"]
    assert relative(exact, true.gradients["weight"]) > 0.02
    _, _, found = run(case, given)
    wide = [each.detach().double().requires_grad_() for each in given[:2]]
    logps = reference.linear_logps(*wide, given.labels[0])
    (exact,) = torch.autograd.grad((logps * given.a[0]).sum(), wide[0])
    assert relative(found["hidden"], exact) > 0.05


def test_the_certificate_counts_the_rounding_of_what_is_kept(monkeypatch):
    # Next to nothing is dropped: m is the rounding of the kept entries, of either sign.
    eps = 2.0**-20
    monkeypatch.setitem(globals(), "EPS", eps)
    given = problem(Case(torch.float32), monkeypatch)
    logps, certificate, _ = run(Case(torch.float32), given)
    assert abs(certificate.tail_mass) < 2e-4
    beside = -torch.expm1(logps[0][given.labels[0] != -100].double())
    unit = KEPT_ROUNDING / (1 - KEPT_ROUNDING)
    expected = (eps * unit * beside).sqrt().mean()
    torch.testing.assert_close(certificate.residual_rms.double(), expected, rtol=0.1, atol=0)


@pytest.mark.parametrize("case", [Case(), Case(trains=True, workspace=BLOCKS, bias=True)])
def test_same_bits_twice(case, monkeypatch):
    given = problem(case, monkeypatch)
    one, two = run(case, given), run(case, given)  # programs run in another order
    assert torch.equal(one[0], two[0])
    for name in one[2]:
        assert torch.equal(one[2][name], two[2][name])


def test_with_a_dense_row_block_the_gradient_of_the_head_is_exact(monkeypatch):
    # The first 64 rows are flat: more than a fifth of their mass would be dropped.
    case = Case(torch.float32, trains=True, bias=True)
    given = problem(case, monkeypatch, guarded=True)
    monkeypatch.setattr(live_columns, "MOST_LIVE", 1)
    monkeypatch.setattr(scan_loop, "MOST_DENSE", 1.0)
    scored = (given.labels != -100).any(0).nonzero()[:, 0]
    flat = given.hidden.detach().clone()
    flat[scored[:64]] *= 0.01
    flat[scored[64:]] *= 3.0  # most of whose mass is in few entries
    given = given._replace(hidden=flat.requires_grad_())
    before = len(launches)
    _, certificate, found = run(case, given)
    assert "weight_probs" in launches[before:]
    assert "sum_products" not in launches[before:]
    assert 0.5 < certificate.kept_share < 1
    true = truth(
        case, given, V, slice(None), LOOKED, whole=torch.arange(len(scored)) < 64
    )  # fmt: skip
    for name in ("hidden", "weight", "bias"):
        assert relative(found[name], true.gradients[name]) < 3.5e-3, name


def test_flat_logits_are_left_to_the_exact_loop_with_the_head(monkeypatch):
    case = Case(trains=True, bias=True)
    given = problem(case, monkeypatch, guarded=True)
    flat = given.hidden.detach() * 0.01
    given = given._replace(hidden=flat.requires_grad_())
    before = len(launches)
    _, certificate, found = run(case, given)
    used = launches[before:]
    assert {"softmax_block", "weight_probs"} <= set(used)
    assert not {"gather_slots", "keep_slots", "sum_products"} & set(used)
    assert certificate.kept_share == 1
    assert certificate.tail_mass == 0
    true = truth(case, given, V, slice(None), LOOKED)
    for name in ("weight", "bias"):
        assert relative(found[name], true.gradients[name]) < 3.5e-3, name


@pytest.mark.parametrize("trains", [False, True])
def test_orpo_loss(trains, monkeypatch):
    case = Case(torch.float32, trains=trains, sets=2)
    given = problem(case, monkeypatch)
    # Three pairs of 25 positions; the two label sets name different tokens at one.
    labels = given.labels[0]
    nll_labels = labels.clone()
    nll_labels[75:] = -100
    nll_labels[3] = 11
    shape, options = (6, 25), {"beta": 0.4}
    hidden = given.hidden.detach().view(*shape, H).requires_grad_()
    out = orpo_loss(
        hidden, given.weight, labels.view(shape), nll_labels=nll_labels.view(shape),
        gradient="sparse", eps=EPS, **options,
    )  # fmt: skip
    found = torch.autograd.grad(out.loss, [hidden, given.weight] if trains else [hidden])

    wide = [each.detach().double() for each in (given.hidden, given.weight)]
    sets = [each.view(shape) for each in (labels, nll_labels)]
    logps = [
        reference.linear_logps(*wide, each.view(-1)).view(shape).requires_grad_() for each in sets
    ]
    true = orpo_loss_from_logps(logps[0], sets[0], logps[1], sets[1], **options)
    a = torch.stack(torch.autograd.grad(true.loss, logps)).view(2, N)
    torch.testing.assert_close(out.loss.double(), true.loss, rtol=1e-5, atol=0, check_dtype=False)
    groups = (torch.arange(N) >= 75).long()  # chosen, rejected
    given = given._replace(labels=torch.stack((labels, nll_labels)), a=a, groups=groups)
    expected = truth(case, given, V, looked=LOOKED).gradients
    for name, each in zip(("hidden", "weight"), found, strict=False):
        assert relative(each.view(expected[name].shape), expected[name]) < 3.5e-3, name


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias of 100"])
def test_rows_that_are_not_scored_under_capture_are_in_no_tail(bias, monkeypatch):
    # Every row is processed then, those not scored as rows of 0: a flat softmax that is all tail,
    # and one whose logits have no maximum to be compared with, as nothing of it is looked at.
    case = Case(torch.float32, trains=True, groups=False, bias=bias)
    given = problem(case, monkeypatch)
    if bias:
        given.bias.detach()[:] += 100.0
    for module in (host_copy, scoring, slot_gradient):
        monkeypatch.setattr(module, "is_capturing", lambda device: True)
    _, _, found = run(case, given)
    # The definition of all rows, with a group of their own for those.
    silent = given.labels[0] == -100
    everything = given._replace(
        hidden=given.hidden.detach().masked_fill(silent[:, None], 0.0), groups=silent.long(),
        labels=given.labels.masked_fill(silent, 0), a=given.a.masked_fill(silent, 0.0),
    )  # fmt: skip
    true = truth(case, everything, V, slice(None), LOOKED)  # no count can be read
    for name, each in found.items():
        assert relative(each, true.gradients[name]) < 3.5e-3, name


@pytest.mark.parametrize("lead", [93.0, 101.0])
def test_a_tail_whose_mass_is_subnormal(lead, monkeypatch):
    # One token, not the label, so far above all others that 1 / (mass of the others) is infinite.
    as_on_a_gpu(monkeypatch, widens=True)
    weight = torch.zeros(V, 1)
    weight[1] = lead
    weight.requires_grad_()
    hidden = torch.ones(3, 1, requires_grad=True)
    labels, options = torch.tensor([0, 1, 5]), LogpsOptions(gradient="sparse", eps=EPS)
    logps, _ = certified_logps(hidden, weight, labels, None, options)
    logps.sum().backward()
    expected = torch.tensor([-lead, 0.0, -lead])
    torch.testing.assert_close(logps.detach(), expected)
    torch.testing.assert_close(hidden.grad[:, 0], expected, rtol=4e-3, atol=1e-6)
    assert weight.grad.isfinite().all()
    torch.testing.assert_close(weight.grad[1], torch.tensor([-2.0]), rtol=8e-3, atol=0)


def test_a_low_rank_of_one_whose_entries_lie_apart(monkeypatch):
    # (1, V) transposed: of a matrix of one column any stride is a row's.
    given = problem(Case(), monkeypatch)
    part, entries = torch.randn(N, 1).bfloat16(), torch.randn(1, V).bfloat16()
    found = []
    for each in (entries.t(), entries.view(V, 1)):
        options = LogpsOptions(gradient="sparse", eps=EPS, low_rank=(part, each))
        logps, _ = certified_logps(given.hidden, given.weight, given.labels[0], None, options)
        found.append(torch.autograd.grad(logps.sum(), given.hidden)[0])
    assert torch.equal(*found)
