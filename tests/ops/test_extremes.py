"""Logits of 1e4, subnormal numbers, a bias of -inf: log-probs are right, gradients finite."""

from typing import NamedTuple

import pytest
import torch

from orpo_kernels import linear_logps
from orpo_kernels.engine.sparse import plan
from tests.csrc.forms import PlainForms, needs_extension


@pytest.fixture(params=[pytest.param(None, id="c++", marks=needs_extension), "plain torch"])
def _form(request):
    if request.param is None:
        yield
        return
    with PlainForms():
        yield


pytestmark = pytest.mark.usefixtures("_form")


def expected(hidden, weight, bias, labels, scale=1.0, softcap=None):
    """Log-probs (K, N) in float64 of the same numbers, and the leaves their gradients go to."""
    leaves = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    z = leaves[0] @ leaves[1].t()
    z = (z if bias is None else z + bias.double()) * scale
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    scored = labels >= 0
    logps = z.log_softmax(1).gather(1, labels.clamp(min=0).t()).t()
    return torch.where(scored, logps, 0.0), leaves


def test_a_tail_whose_mass_is_subnormal():
    # One token 93 to 103 nats above all others, and not the label: 1 / (mass of the others) is inf.
    for lead in (93.0, 101.0, 103.0):
        weight = torch.zeros(32_000, 1)
        weight[1] = lead
        hidden = torch.ones(3, 1, requires_grad=True)
        labels = torch.tensor([0, 1, 5])
        groups = torch.tensor([0, 1, 1])
        weight.requires_grad_()
        logps = linear_logps(hidden, weight, labels, gradient="sparse", tail_groups=groups)
        logps.sum().backward()
        torch.testing.assert_close(logps.detach(), torch.tensor([-lead, 0.0, -lead]))
        torch.testing.assert_close(hidden.grad[:, 0], torch.tensor([-lead, 0.0, -lead]))
        wanted = torch.zeros(32_000, 1)
        wanted[0], wanted[1], wanted[5] = 1.0, -2.0, 1.0
        torch.testing.assert_close(weight.grad, wanted)


@pytest.mark.parametrize("gradient", ["exact", "sparse"])
@pytest.mark.parametrize("base", [1024.0, 8192.0, 65536.0], ids=str)
def test_a_largest_logit_that_rounding_lifts(base, gradient, monkeypatch):
    # In bfloat16 5 and 6 of 8 steps above the base are rounded to a whole one; 30 entries are far
    # below. The labels: one of the two, and one of the 30.
    monkeypatch.setattr(plan, "live_share", lambda device: 1.0)
    step = base * 2**-7
    offsets = torch.full((32,), -64.0 * step)
    offsets[3], offsets[7] = step * 5 / 8, step * 6 / 8
    weight = torch.stack((torch.full((32,), base), offsets), 1).bfloat16().requires_grad_()
    hidden = torch.ones(2, 2).bfloat16().requires_grad_()
    labels = torch.tensor([7, 5])
    true, (wide_hidden, wide_weight) = expected(hidden, weight, None, labels[None])
    logps = linear_logps(hidden, weight, labels, gradient=gradient, eps=0.0)
    with torch.no_grad():
        torch.testing.assert_close(linear_logps(hidden, weight, labels), logps.detach())
    logps.sum().backward()
    true.sum().backward()
    if base == 1024:  # by e^3: redone, and right
        torch.testing.assert_close(logps.double(), true[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(hidden.grad.double(), wide_hidden.grad, rtol=2**-8, atol=1e-2)
        torch.testing.assert_close(weight.grad.double(), wide_weight.grad, rtol=2**-7, atol=1e-3)
    else:  # by e^24 and more: wrong by the rounding of a logit, and no gradient beyond its size
        assert ((logps - true[0]).abs() <= step / 2).all()
        assert (weight.grad.abs().amax() <= 4 * hidden.abs().amax()).all()
        assert (hidden.grad.abs() <= 4 * weight.abs().amax(0)).all()


class Draw(NamedTuple):
    """One random call: operands, and the keywords of `linear_logps`."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    labels: torch.Tensor
    options: dict
    gradient: dict


# Usual |hidden|, |weight| as powers of ten: logits to 1e4, and beyond what is redone.
SIZES = {
    "large": (3, 0),
    "larger": (5, 0.5),
    "small": (-20, -20),
    "subnormal": (-40, 0),
    "usual": (0, 0),
}


def draw(size, dtype):
    def choice(*values):
        return values[int(torch.randint(0, len(values), ()))]

    N, H, V = choice(1, 3, 70), choice(1, 4, 16), choice(7, 300, 1000)  # no multiple of a vector
    of_hidden, of_weight = (10.0**each for each in SIZES[size])
    hidden, weight = torch.randn(N, H) * of_hidden, torch.randn(V, H) * of_weight
    bias = None
    if choice(True, False):
        bias = torch.randn(V) * choice(1, 1e4)
        bias[torch.rand(V) < choice(0.0, 0.1, 0.9)] = -torch.inf
        bias[int(torch.randint(0, V, ()))] = 0.0
        bias = bias.to(dtype)
    labels = torch.randint(0, V, (choice(1, 2), N))
    if bias is not None:  # a label of -inf has no gradient to speak of
        labels = torch.where(torch.isinf(bias[labels]), int(bias.argmax()), labels)
    labels[torch.rand(labels.shape) < 0.2] = -100
    options = {"scale": choice(1.0, 0.0625, 3.0), "softcap": choice(None, None, 30.0)}
    gradient = {"gradient": "exact"}
    if choice(True, False):
        groups = choice(None, torch.randint(0, 2, (N,)))
        gradient = {"gradient": "sparse", "eps": choice(0.0, 2**-8, 1.0), "tail_groups": groups}
    return Draw(hidden.to(dtype), weight.to(dtype), bias, labels, options, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_random_calls(size, dtype, monkeypatch):
    monkeypatch.setattr(plan, "live_share", lambda device: 1.0)
    for seed in range(40):
        torch.manual_seed(seed)
        given = draw(size, dtype)
        if not (given.hidden.isfinite().all() and given.weight.isfinite().all()):
            continue  # float16 ends at 65,504
        true, leaves = expected(given.hidden, given.weight, given.bias, given.labels,
                                **given.options)  # fmt: skip
        hidden, weight = given.hidden.requires_grad_(), given.weight.requires_grad_()
        named = {"logit_scale": given.options["scale"], "softcap": given.options["softcap"]}
        labels = tuple(given.labels) if len(given.labels) == 2 else given.labels[0]
        logps = linear_logps(hidden, weight, labels, given.bias, **named, **given.gradient)
        logps = torch.stack(logps) if len(given.labels) == 2 else logps[None]
        # A logit is as wrong as its dtype makes it; the log-prob is the difference of two of them.
        raw = (leaves[0].abs() @ leaves[1].abs().t()).detach().amax(1)
        if given.bias is not None:
            raw = raw + given.bias.double().nan_to_num(neginf=0.0).abs().amax()
        bound = 2.0 * named["logit_scale"] * raw * torch.finfo(dtype).eps + 1e-4
        assert ((logps - true).abs() <= bound).all(), seed
        logps.sum().backward()
        true.sum().backward()
        for found, leaf in zip((hidden, weight), leaves, strict=True):
            if leaf.grad.abs().amax() < torch.finfo(dtype).max / 2:
                assert found.grad.isfinite().all(), seed
