"""linear_logps where digits are easily lost: certain tokens, large logits, fp16, huge problems."""

import sys

import pytest
import torch

from orpo_kernels import linear_logps, reference


@pytest.fixture(params=[False, True], ids=["as on a CPU", "GEMMs in fp16"])
def _gemms_in_fp16(request, monkeypatch):
    """A CPU widens fp16 operands; a card without bf16 (sm_75) rounds logits and products to it."""
    if request.param:
        module = sys.modules[linear_logps.__module__]
        monkeypatch.setattr(module, "choose_compute_dtype", lambda *given: torch.float16)


@pytest.mark.parametrize("confidence", [5.0, 20.0, 60.0, 200.0])
def test_confident_tokens_keep_their_digits(confidence):
    # p -> 1: logp and 1 - p must not come from a subtraction of nearly equal numbers.
    weight = torch.eye(4, dtype=torch.float32).requires_grad_()
    hidden = torch.tensor([[confidence, 0.0, 0.5, -1.0]], requires_grad=True)
    labels = torch.tensor([0])
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    z = exact[0] @ exact[1].t()
    rest = torch.logsumexp(z[:, 1:] - z[:, :1], 1)
    truth = -torch.logaddexp(rest, torch.zeros_like(rest))
    torch.testing.assert_close(
        linear_logps(hidden, weight, labels).double(),
        -torch.log1p(rest.exp()),
        rtol=3e-6,
        atol=1e-37,
    )
    found = torch.autograd.grad(linear_logps(hidden, weight, labels).sum(), hidden)[0].double()
    share = torch.exp(rest - torch.logaddexp(rest, torch.zeros_like(rest)))
    torch.testing.assert_close(found[:, 0], share.detach(), rtol=3e-6, atol=1e-37)
    assert (truth <= 0).all()


@pytest.mark.parametrize("shift", [-1e4, 1e4, 3e38])
def test_extreme_logits(shift):
    # A running maximum that starts at 0 loses all-negative rows; exp without it overflows.
    bias = torch.full((6,), shift)
    hidden = torch.randn(3, 4, requires_grad=True)
    out = linear_logps(hidden, torch.randn(6, 4), torch.tensor([0, 3, 5]), bias)
    grad = torch.autograd.grad(out.sum(), hidden)[0]
    assert torch.isfinite(out).all()
    assert torch.isfinite(grad).all()
    assert (out <= 0).all()


@pytest.mark.usefixtures("_gemms_in_fp16")
@pytest.mark.parametrize("gap", [6.0, 10.0, 12.0])
def test_fp16_gradients_of_confident_tokens_survive(gap):
    # 1 - p = 1e-2 ... 4e-6: the gradient itself fits fp16 (a loss scale of 65,536), and must not
    # have been rounded to a subnormal before the scale reached it.
    weight = (torch.randn(2000, 64) * 0.02).half()
    labels = torch.randint(0, 2000, (64,))
    rows = weight[labels].float()
    hidden = (rows / rows.square().sum(1, keepdim=True) * gap * 1.6).half().requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    truth = reference.linear_logps(exact, weight.double(), labels).mean() * 65_536
    found = linear_logps(hidden, weight, labels).mean() * 65_536
    (true,), (ours,) = torch.autograd.grad(truth, exact), torch.autograd.grad(found, hidden)
    assert (ours.double() - true).norm() < 2e-3 * true.norm()


@pytest.mark.usefixtures("_gemms_in_fp16")
def test_fp16_weight_gradient_does_not_overflow():
    # 1,024 rows of h = 80 sum to 81,920 before they are scaled by a_t: fp16 ends at 65,504.
    hidden, weight = torch.full((1024, 16), 80.0).half(), torch.zeros(50, 16).half()
    weight[7] = 0.01
    weight.requires_grad_()
    loss = linear_logps(hidden, weight, torch.zeros(1024, dtype=torch.int64)).mean()
    (grad,) = torch.autograd.grad(loss, weight)
    assert torch.isfinite(grad).all()
    assert grad[7].abs().min() > 0


def test_saturated_softcap_keeps_the_slope():
    # The label at the cap: 1 - tanh^2 has no digits left in float32 unless it comes from exp.
    hidden = (torch.randn(64, 16) * 30).requires_grad_()
    weight = torch.randn(500, 16, requires_grad=True)
    labels = (hidden @ weight.t()).argmax(1)
    exact = [each.detach().double().requires_grad_() for each in (hidden, weight)]
    truth = torch.autograd.grad(reference.linear_logps(*exact, labels, softcap=30.0).sum(), exact)
    found = torch.autograd.grad(
        linear_logps(hidden, weight, labels, softcap=30.0).sum(), (hidden, weight)
    )
    for ours, true in zip(found, truth, strict=True):
        assert (ours.double() - true).norm() < 2e-5 * true.norm()


@pytest.mark.slow
def test_more_than_two_to_the_31_logits():
    # N V = 2.2e9 > 2^31: a 32-bit index would wrap; 4 GB of logits must not appear either.
    N, V = 16_900, 128_256
    hidden, weight = torch.randn(N, 4).requires_grad_(), torch.randn(V, 4)
    labels = torch.randint(0, V, (N,))
    rows = torch.tensor([0, N // 2, N - 1])
    exact = hidden.detach()[rows].double().requires_grad_()
    truth = reference.linear_logps(exact, weight.double(), labels[rows])
    out = linear_logps(hidden, weight, labels)
    torch.testing.assert_close(out[rows].double(), truth, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(out.sum(), hidden)[0][rows]
    true = torch.autograd.grad(truth.sum(), exact)[0]
    torch.testing.assert_close(found.double(), true, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_two_label_sets_on_a_head_with_a_common_part(gradient, dtype):
    # Rows of W whose common part is 5 times their own: it cancels, and must not be rounded before.
    labels = torch.randint(0, 1000, (2, 64))
    labels[1, ::4] = labels[0, ::4]  # where they agree they are one
    hidden = torch.randn(64, 64).to(dtype)
    weight = torch.randn(1000, 64) / 8 + 5 / 8 * torch.randn(64)

    def relative_error(softcap, *given):
        grads = []
        for h, w in ((hidden.double(), weight.double()), (hidden, weight)):
            h = h.detach().requires_grad_()
            options = {"softcap": softcap} if h.dtype == torch.float64 else {
                "softcap": softcap, "gradient": gradient, "eps": 1e-6}  # fmt: skip
            logps = linear_logps(h, w, tuple(given) if len(given) == 2 else given[0], **options)
            logps = torch.stack(logps) if len(given) == 2 else logps[None]
            (torch.arange(1, 65) % 7 * logps).sum().backward()
            grads.append(h.grad.double())
        return float((grads[1] - grads[0]).norm() / grads[0].norm())

    for softcap in (None, 20.0):
        both, one = relative_error(softcap, *labels), relative_error(softcap, labels[0])
        # Measured 1.0 to 1.8 times; 5 times where the sum is rounded before the label rows come.
        assert both < 2.2 * one + 4 * torch.finfo(torch.float32).eps


@pytest.mark.usefixtures("_bfloat16_gemms")
@pytest.mark.parametrize("workspace", [None, 2**21], ids=["kept", "recomputed, in blocks"])
def test_rounded_logits_are_refined(monkeypatch, workspace):
    # On a CPU a bf16 GEMM rounds logits. Clusters of 40 similar tokens, as a trained head has them:
    # about 50 entries of a row are above 2^-10.
    centers = torch.randn(100, 128)
    weight = centers.repeat_interleave(40, 0) + torch.randn(4000, 128)
    weight = (weight * 0.12).bfloat16()
    hidden = (centers[torch.randint(0, 100, (96,))] + torch.randn(96, 128)).bfloat16()
    exact = [each.double().requires_grad_() for each in (hidden, weight)]
    labels = torch.multinomial((exact[0] @ exact[1].t()).softmax(1).detach(), 1)[:, 0]
    coefficients = torch.randn(96)
    truth = reference.linear_logps(*exact, labels)
    true = torch.autograd.grad(truth @ coefficients.double(), exact)

    def errors():
        # float32 inputs that bfloat16 holds: dhidden comes back before its final rounding.
        inputs = [each.float().requires_grad_() for each in (hidden, weight)]
        found = linear_logps(
            *inputs, labels, compute_dtype=torch.bfloat16, workspace_bytes=workspace
        )
        gradients = torch.autograd.grad(found @ coefficients, inputs)
        relative = [
            float((ours - of).norm() / of.norm()) for ours, of in zip(gradients, true, strict=True)
        ]
        return float((found - truth).detach().abs().max()), *relative

    logps, dhidden, dweight = errors()
    assert logps < 5e-4
    assert dhidden < 1e-4
    assert dweight < 2e-3  # the operands of its GEMM are rounded: probabilities, a_t h_t
    monkeypatch.setattr("orpo_kernels.engine.tile_loop.LARGE", 2.0)
    monkeypatch.setattr("orpo_kernels.engine.weight_gradient.LARGE", 2.0)
    unrefined = errors()
    assert unrefined[0] > 10 * logps
    assert unrefined[1] > 20 * dhidden
    assert unrefined[2] > 2 * dweight
