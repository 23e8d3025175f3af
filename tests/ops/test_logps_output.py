"""Log-sum-exp and mean logits of each row, and their gradients, against float64 logits."""

import pytest
import torch

from orpo_kernels import linear_logps, linear_logps_output, reference
from tests.helpers import problem

# Name: softcap, scale, low-rank part. V 97: no block size divides it.
TRANSFORMS = {
    "plain": (None, 1.0, False),
    "scale": (None, 0.3, False),
    "softcap": (3.0, 0.7, False),
    "LoRA on the head": (None, 1.0, True),
    "LoRA under a softcap": (3.0, 1.0, True),
}


def operands(dtype=torch.float32, sets=1, with_low_rank=False):
    given = problem((2, 9), 16, 97, dtype, bias=True, sets=sets, unscored=-100)
    leaves = [given.hidden, given.weight, given.bias]
    if with_low_rank:
        leaves += [torch.randn(2, 9, 3, dtype=dtype), torch.randn(97, 3, dtype=dtype)]
    return [each.requires_grad_() for each in leaves], given.labels


def logits_of(leaves, scale, softcap):
    hidden, weight, bias, *low_rank = leaves
    raw = hidden @ weight.t() + bias
    if low_rank:
        raw = raw + low_rank[0] @ low_rank[1].t()
    return reference.transform(raw, scale, softcap)[0]


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("sets", [1, 2])
def test_float64_logits(name, sets):
    softcap, scale, with_low_rank = TRANSFORMS[name]
    leaves, labels = operands(sets=sets, with_low_rank=with_low_rank)
    wide = [each.detach().double().requires_grad_() for each in leaves]
    z = logits_of(wide, scale, softcap)
    scored = (labels != -100).any(0)
    true_lse = torch.where(scored, z.logsumexp(-1), 0.0)
    true_logps = z.log_softmax(-1).gather(-1, labels[0].clamp(min=0)[..., None])[..., 0]
    hidden, weight, bias, *low_rank = leaves
    found = linear_logps_output(
        hidden, weight, labels[0] if sets == 1 else tuple(labels), bias,
        lse=True, mean_logits=True, logit_scale=scale, softcap=softcap,
        low_rank=tuple(low_rank) or None,
    )  # fmt: skip
    logps = found.logps if sets == 1 else found.logps[0]
    # Logits up to about 20 in float32.
    torch.testing.assert_close(found.lse.double(), true_lse, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.mean_logits.double(), z.mean(-1), rtol=1e-5, atol=1e-5)
    assert not found.mean_logits.requires_grad
    assert found.certificate is None
    # A z-loss beside a loss of the log-probs.
    mask = labels[0] != -100
    truth = torch.autograd.grad(
        0.1 * true_lse.square().sum() - torch.where(mask, true_logps, 0.0).sum(), wide
    )
    gradients = torch.autograd.grad(0.1 * found.lse.square().sum() - logps.sum(), leaves)
    for ours, exact in zip(gradients, truth, strict=True):
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


def test_rows_that_are_not_scored_are_not_read():
    (hidden, weight, bias), labels = operands()
    broken = hidden.detach().clone()
    broken[labels[0] == -100] = torch.nan
    broken.requires_grad_()
    found = linear_logps_output(broken, weight, labels[0], bias, lse=True)
    found.lse.sum().backward()
    for each in (found.lse, broken.grad, weight.grad):
        assert torch.isfinite(each).all()
    assert (broken.grad[labels[0] == -100] == 0).all()


def test_16_bits_and_autocast():
    # lse - logp is the label's logit: what the log-probs' own operands give, in float32.
    leaves, labels = operands(torch.bfloat16)
    hidden, weight, bias = leaves
    z = logits_of([each.double() for each in leaves], 1.0, None)
    true = torch.where(labels[0] != -100, z.logsumexp(-1), 0.0)
    found = linear_logps_output(hidden, weight, labels[0], bias, lse=True)
    assert found.lse.dtype == torch.float32
    torch.testing.assert_close(found.lse.double(), true, rtol=0, atol=2e-2)  # a bf16 GEMM's
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = [each.detach().float() for each in leaves]
        again = linear_logps_output(wide[0], wide[1], labels[0], wide[2], lse=True)
    torch.testing.assert_close(again.lse, found.lse, rtol=0, atol=1e-5)


def test_a_sparse_gradient_has_its_certificate():
    # Two confident tokens: nothing but the labels is over eps.
    hidden = (20.0 * torch.eye(600)[:2]).requires_grad_()
    labels = torch.tensor([0, 5])
    found = linear_logps_output(hidden, torch.eye(600), labels, gradient="sparse")
    assert found.certificate.kept_share < 2 / 600
    assert found.lse is found.mean_logits is None
    torch.testing.assert_close(found.logps, linear_logps(hidden, torch.eye(600), labels))


def test_what_is_refused():
    (hidden, weight, bias), labels = operands()
    with pytest.raises(TypeError, match="has no argument 'softcaps'; did you mean 'softcap'"):
        linear_logps_output(hidden, weight, labels[0], bias, softcaps=1.0)
    with pytest.raises(TypeError, match="lse must be True or False"):
        linear_logps_output(hidden, weight, labels[0], bias, lse="yes")
