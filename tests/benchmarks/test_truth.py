"""The figure that decides whether an implementation is timed at all."""

import pytest
import torch

from benchmarks.heads import Case
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.peers import BETA
from benchmarks.steps import Step
from benchmarks.truth import LIMITS, OWN_LIMITS, WrongResult, compute_truth, errors, judge
from benchmarks.workloads import make_workload
from orpo_kernels import reference


# Gemma 2's head has a softcap, so its derivative is in dweight; two pairs: an odds term each.
@pytest.fixture(params=[("mistral-7b", 1), ("gemma-2-2b", 2)], ids=["plain", "softcap"])
def workload(request):
    head, pairs = request.param
    return make_workload(Case(head, pairs=pairs, dtype="float32"), tiny=True)


def test_truth_is_the_reference_on_everything(workload):
    truth = compute_truth(workload)
    hidden = workload.hidden.detach().double().requires_grad_()
    weight = workload.weight.detach().double().requires_grad_()
    result = reference.orpo_loss(
        hidden, weight, workload.labels, nll_labels=workload.nll_labels, beta=BETA,
        softcap=workload.softcap,
    )  # fmt: skip
    result.loss.backward()
    assert truth.loss == pytest.approx(result.loss.item(), rel=1e-12)
    torch.testing.assert_close(truth.dhidden, hidden.grad.flatten(0, 1)[truth.rows])
    torch.testing.assert_close(truth.dweight, weight.grad[truth.columns])


@pytest.mark.parametrize("mode", ["frozen", "trainable", "eval"])
def test_ours_is_within_our_own_limits(workload, mode):
    step = Step(IMPLEMENTATIONS["ours-exact"], workload, mode)
    loss = step.run()
    found = errors(compute_truth(workload), loss, *step.gradients)
    expected = {"frozen": {"loss", "dhidden"}, "trainable": {"loss", "dhidden", "dweight"}}
    assert set(found) == expected.get(mode, {"loss"})
    assert judge(found, "float32", peer=False)


def test_a_wrong_gradient_is_not_timed(workload):
    truth = compute_truth(workload)
    step = Step(IMPLEMENTATIONS["eager"], workload, "frozen")
    loss = step.run()
    good, _ = step.gradients
    scaled = errors(truth, loss, 1.02 * good, None)  # over our limits, not gross
    with pytest.raises(WrongResult, match="must be within"):
        judge(scaled, "float32", peer=False)
    assert not judge(scaled, "float32", peer=True)  # a peer's is recorded
    for wrong in (0.5 * good, good * float("nan")):
        with pytest.raises(WrongResult):
            judge(errors(truth, loss, wrong, None), "float32", peer=True)


def test_limits_are_known_for_every_dtype_that_is_measured():
    assert set(LIMITS) == set(OWN_LIMITS) == {"float32", "bfloat16"}


def test_what_a_race_cost_is_not_timed():
    # dW of a kernel whose warps did not wait for one another, at 64 MiB, as it was measured.
    found = {"loss": 3.3e-6, "dhidden": 5.5e-3, "dweight": 9.9e-3}
    with pytest.raises(WrongResult, match="must be within"):
        judge(found, "bfloat16", peer=False)
    assert judge(found | {"dweight": 1.8e-3}, "bfloat16", peer=False)
