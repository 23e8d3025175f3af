"""A shift common to all logits of a row changes no softmax: what it costs in each GEMM's dtype."""

import pytest
import torch

from orpo_kernels import linear_logps, reference
from tests.csrc.forms import PlainForms, needs_extension

N, H, V = 96, 128, 4000

# Largest error of log-probs in nats and RMS of dhidden, relative, before it is rounded: at most 3
# times what docs/mathematics.md says was measured. "clusters": 40 similar tokens each, as a trained
# head has them; "flat": random logits.
BOUNDS = {
    ("clusters", 0): (2e-4, 1e-4),
    ("clusters", 20): (6e-4, 3e-4),
    ("clusters", 100): (1e-3, 1.5e-3),
    ("flat", 0): (2e-4, 1e-4),
    ("flat", 20): (2.5e-3, 4e-2),
    ("flat", 100): (1.5e-2, 0.2),
}


def shifted(kind, shift):
    """hidden and weight, bfloat16 numbers in float32, whose logits are all `shift` higher."""
    if kind == "clusters":
        centers = torch.randn(100, H)
        weight = 0.12 * (centers.repeat_interleave(V // 100, 0) + torch.randn(V, H))
        hidden = centers[torch.randint(0, 100, (N,))] + torch.randn(N, H)
    else:
        weight, hidden = torch.randn(V, H) * H**-0.5, torch.randn(N, H)
    hidden[:, 0], weight[:, 0] = 1.0, shift
    return hidden.bfloat16().float(), weight.bfloat16().float()


def errors(kind, shift, compute_dtype):
    """Of log-probs and of dhidden; of ours, and of plain torch with bfloat16 logits."""
    torch.manual_seed(0)
    hidden, weight = shifted(kind, shift)
    exact = hidden.double().requires_grad_()
    probabilities = (exact @ weight.double().t()).softmax(1).detach()
    labels, a = torch.multinomial(probabilities, 1)[:, 0], torch.randn(N)
    truth = reference.linear_logps(exact, weight.double(), labels)
    (true,) = torch.autograd.grad(truth @ a.double(), exact)
    found = []
    for eager in (False, True):
        leaf = hidden.clone().requires_grad_()
        if eager:
            logits = (leaf.bfloat16() @ weight.bfloat16().t()).float()
            logps = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
        else:
            logps = linear_logps(leaf, weight, labels, compute_dtype=compute_dtype)
        (gradient,) = torch.autograd.grad(logps @ a, leaf)
        error = (gradient.double() - true).norm() / true.norm()
        found.append((float((logps - truth).detach().abs().max()), float(error)))
    return found


@pytest.fixture(params=[pytest.param(None, id="c++", marks=needs_extension), "plain torch"])
def _form(request):
    if request.param is None:
        yield
        return
    with PlainForms():
        yield


@pytest.mark.usefixtures("_form", "_bfloat16_gemms")
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("case", BOUNDS, ids=lambda case: f"{case[0]}, {case[1]}")
def test_bfloat16_logits(case, sign):
    kind, shift = case
    (logps, dhidden), eager = errors(kind, sign * shift, torch.bfloat16)
    assert logps < BOUNDS[case][0]
    assert dhidden < BOUNDS[case][1]
    assert dhidden < eager[1]
    assert logps < eager[0]


@pytest.mark.usefixtures("_form")
@pytest.mark.parametrize("shift", [20, -20, 100, -100])
@pytest.mark.parametrize("kind", ["clusters", "flat"])
def test_float32_logits(kind, shift):
    # A float32 logit of 100 is right to 4e-6, and a sum of 128 products to a few times that.
    (logps, dhidden), _ = errors(kind, shift, torch.float32)
    assert logps < 1e-4
    assert dhidden < 1e-4
