"""The theorem of docs/sparse.md: no error is over what eps, the mass and the kept sum promise.

On real or generated rows and on rows made to break it; everything in float64, kept entries rounded
to bf16 or not, so that the only errors are those the theorem speaks of.
"""

import functools
from typing import NamedTuple

import pytest
import torch

from orpo_kernels import reference
from tests.engine.softmax_profile import load, names, problem

EPS = (2.0**-10, 2.0**-12, 2.0**-14)
# Per row as on a CPU; shared by 64 rows and rounded as on a GPU; shared, for the exact statements.
FORMS = [(1, None), (64, torch.bfloat16), (64, None)]
LARGEST_VOCABULARY = 262_144


@functools.cache
def text_like(eps, name):
    profile = load(name)
    rows = slice(64, 192)  # a block of each group
    return torch.exp(profile.logp[rows]).scatter(1, profile.labels[rows, None], 0.0)


def uniform(eps):
    # Random initialisation at the largest vocabulary: every entry is under every eps.
    entries = torch.full((4, LARGEST_VOCABULARY), 1.0 / LARGEST_VOCABULARY, dtype=torch.float64)
    entries[:, 7] = 0.0  # the label
    return entries


def two_spikes(eps):
    # Nothing to drop, but kept entries that bf16 rounds up: mass is negative where they do.
    entries = torch.zeros(64, 300, dtype=torch.float64)
    share = torch.linspace(0.05, 0.95, 64, dtype=torch.float64)
    entries[:, 3], entries[:, 200] = share, 1 - share
    return entries


def just_under(eps):
    # As much as can be dropped: each row has 1 / eps entries that miss the threshold by 0.1 %, in
    # columns that no other row has, so that no tail fits any row.
    entries = torch.zeros(16, LARGEST_VOCABULARY, dtype=torch.float64)
    count = int(1 / eps)
    for row in range(16):
        entries[row, row * count : (row + 1) * count] = 0.999 * eps
    return entries


def live_everywhere(eps):
    # A column of every 64 rows is kept for the sake of one row; in the others it is small.
    entries = torch.full((192, 4096), 0.5 / 4096, dtype=torch.float64)
    entries[[5, 70, 191], [0, 2000, 4095]] = 0.4
    return entries / entries.sum(1, keepdim=True)


def rounding_hides_mass(eps):
    # One kept entry, rounded up by nearly the unit, and half of that dropped: mass is negative
    # although entries were dropped. sqrt(eps * mass) would promise nothing, or be NaN. The column
    # sums to less than is kept in two numbers.
    entries = torch.zeros(4, 3000, dtype=torch.float64)
    entries[:, 0] = (1 + 2.0**-8 + 2.0**-20) / 32
    entries[:, 1:] = 2.0**-9 / 2999 / 32
    return entries


ADVERSARIAL = [uniform, two_spikes, just_under, live_everywhere, rounding_hides_mass]
ROWS = [functools.partial(text_like, name=name) for name in names()] + ADVERSARIAL
IDS = [*names(), *(rows.__name__ for rows in ADVERSARIAL)]


class Promise(NamedTuple):
    """Of the theorem, (N,): what the entries of a row may be off by."""

    root_sum_square: torch.Tensor
    sum: torch.Tensor


def promise(sparse, groups, eps, rounding):
    """From figures an implementation has: the certificate, the kept sum, the norm of the tail."""
    unit = 0.0 if rounding is None else torch.finfo(rounding).eps / 2
    rounded = unit / (1 - unit) * sparse.kept.sum(1)
    dropped = sparse.residual.square() / eps
    tail = sparse.tail.norm(dim=1)[groups]
    return Promise(
        torch.sqrt(sparse.residual.square() + (dropped * tail).square()) + rounded * (1 + tail),
        2 * (dropped + rounded),
    )


def sparse_form(entries, eps, form):
    groups = (torch.arange(len(entries)) >= len(entries) // 2).long()
    block, rounding = form
    sparse = reference.sparse_softmax(entries, groups, eps=eps, block=block, rounding=rounding)
    return sparse, groups, entries - sparse.kept - sparse.mass[:, None] * sparse.tail[groups]


def at_most(found, bound):
    # Room for float64 itself.
    assert torch.isfinite(bound).all()
    assert (found <= bound * (1 + 1e-12) + 1e-13).all()


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("eps", EPS)
@pytest.mark.parametrize("rows", ROWS, ids=IDS)
def test_entries(rows, eps, form):
    entries = rows(eps)
    sparse, groups, error = sparse_form(entries, eps, form)
    dropped = entries.masked_fill(sparse.mask, 0.0)
    at_most(dropped.norm(dim=1), sparse.residual)
    promised = promise(sparse, groups, eps, form[1])
    at_most(error.norm(dim=1), promised.root_sum_square)
    at_most(error.abs().sum(1), promised.sum)
    some = sparse.tail.sum(1)[groups] > 0
    at_most(error[some].sum(1).abs(), torch.zeros(()))
    for group in range(reference.GROUPS):
        mine = groups == group
        mean = dropped[mine].sum() / mine.sum()
        at_most(sparse.tail[group].square().sum() * mean, torch.tensor(eps).double())
        if form[1] is None:  # what is left is the rounding of kept entries
            at_most(error[mine].sum(0).abs(), torch.zeros(()))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("rows", ADVERSARIAL)
def test_any_head(rows, form):
    eps = EPS[1]
    entries = rows(eps)
    sparse, groups, error = sparse_form(entries, eps, form)
    promised = promise(sparse, groups, eps, form[1])
    # A mean ten times the deviations, and the head for which the error of one row is largest.
    noise = torch.randn(entries.shape[1], 8, dtype=torch.float64)
    worst = error[0][:, None] * torch.randn(8, dtype=torch.float64)
    for weight in (noise, noise + 10 * torch.randn(8, dtype=torch.float64), worst):
        centred = weight - weight.mean(0)
        spectral, longest = torch.linalg.matrix_norm(centred, 2), centred.norm(dim=1).max()
        bound = torch.minimum(spectral * promised.root_sum_square, longest * promised.sum)
        balanced = sparse.tail.sum(1)[groups] > 0
        at_most((error @ weight).norm(dim=1)[balanced], bound[balanced])


@pytest.mark.slow
@pytest.mark.parametrize("head", ["common mean", "tilted"])
@pytest.mark.parametrize("name", names())
def test_gradients(name, head):
    eps = EPS[1]
    inputs = problem(load(name), head)
    hidden, weight, a = (x.double() for x in (inputs.hidden, inputs.weight, inputs.a))
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    logps = reference.linear_logps(*leaves, inputs.labels)
    true_dhidden, true_dweight = torch.autograd.grad(logps, leaves, a)
    hidden, weight = hidden.detach(), weight.detach()
    found = reference.sparse_gradients(
        hidden, weight, (inputs.labels,), (a,), eps=eps, groups=inputs.groups, block=64,
        rounding=torch.bfloat16,
    )  # fmt: skip
    promised = promise(found.softmax, inputs.groups, eps, torch.bfloat16)
    centred = weight - weight.mean(0)
    spectral = torch.linalg.eigvalsh(centred.t() @ centred)[-1].sqrt()
    longest = centred.norm(dim=1).max()
    bound = torch.minimum(spectral * promised.root_sum_square, longest * promised.sum)
    error = (found.dhidden - true_dhidden).norm(dim=1) / a.abs()
    at_most(error, bound)
    # hidden is orthogonal here: its largest singular value is its longest row.
    scaled = (a[:, None] * hidden).norm(dim=1).max()
    at_most((found.dweight - true_dweight).norm(), scaled * promised.root_sum_square.norm())


def test_the_promise_is_not_vacuous():
    # Where everything is just under eps, nearly all that is promised happens.
    eps = EPS[1]
    sparse, groups, error = sparse_form(just_under(eps), eps, FORMS[0])
    promised = promise(sparse, groups, eps, None)
    assert (error.norm(dim=1) >= 0.87 * promised.root_sum_square).all()
    dropped = just_under(eps).norm(dim=1)
    assert (dropped >= 0.99 * sparse.residual).all()


def test_mass_alone_promises_too_little():
    # Why the certificate adds the rounding of what is kept.
    entries = rounding_hides_mass(EPS[1])
    sparse, _, _ = sparse_form(entries, EPS[1], FORMS[1])
    assert (sparse.mass < 0).all()
    assert (entries.masked_fill(sparse.mask, 0.0).sum(1) > 0).all()
