"""Unsloth's adapter, by a stand-in: its package is in the environment of `make setup-race` only."""

import sys
from types import ModuleType

import pytest
import torch

from benchmarks import peers
from benchmarks.heads import Case
from benchmarks.workloads import make_workload


def stand_in(hidden, weight, labels, mask, logit_softcapping):
    """What its function of this name returns, from all logits."""
    logits = hidden @ weight.t()
    if logit_softcapping:
        logits = logit_softcapping * torch.tanh(logits / logit_softcapping)
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return logps.masked_fill(~mask, 0.0)


@pytest.fixture
def _unsloth(monkeypatch):
    losses = ModuleType("unsloth_zoo.fused_losses")
    losses.unsloth_masked_logprobs = stand_in
    monkeypatch.setitem(sys.modules, "unsloth_zoo", ModuleType("unsloth_zoo"))
    monkeypatch.setitem(sys.modules, "unsloth_zoo.fused_losses", losses)
    for name in ("UNSLOTH_IS_PRESENT", "UNSLOTH_COMPILE_LOCATION", "UNSLOTH_ZOO_DISABLE_GPU_INIT"):
        monkeypatch.setenv(name, "")  # put back afterwards


@pytest.mark.usefixtures("_unsloth")
@pytest.mark.parametrize("head", ["cpu", "gemma-2-2b"])  # without and with a softcap
def test_its_call(head):
    workload = make_workload(Case(head, dtype="float32"), tiny=True)
    torch.testing.assert_close(peers.unsloth(workload)(), peers.eager(workload)())


@pytest.mark.usefixtures("_unsloth")
def test_the_others_are_imported_before_it(monkeypatch):
    # Cut Cross Entropy does not import after unsloth_zoo 2026.10.9 on a CPU.
    for name in [each for each in sys.modules if each.startswith("cut_cross_entropy")]:
        monkeypatch.delitem(sys.modules, name)
    peers.unsloth(make_workload(Case("cpu"), tiny=True))
    assert "cut_cross_entropy" in sys.modules
