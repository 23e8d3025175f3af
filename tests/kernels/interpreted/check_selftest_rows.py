"""The self-test of whole rows: the loop that most heads take on a GPU, at 8,209 columns."""

import pytest
import torch

from orpo_kernels.kernels.softmax_rows import SoftmaxRows
from orpo_kernels.selftest import logps, schedule
from orpo_kernels.selftest.figures import Setting
from tests.kernels.interpreted.engine import as_on_a_gpu
from tests.kernels.interpreted.plugin import launches


def check(dtype, monkeypatch):
    """The one check, and the kernels it launched."""
    as_on_a_gpu(monkeypatch, widens=True)
    setting, before = Setting(torch.device("cpu"), dtype), len(launches)
    (case,) = [each for each in logps.cases(setting) if each.name == "trainable head, whole rows"]
    ((found,), _) = schedule.run([case], setting.device)
    return found, set(launches[before:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_passes_on_whole_rows(dtype, monkeypatch):
    found, names = check(dtype, monkeypatch)
    assert found.passed, found
    assert "softmax_rows" in names
    assert "softmax_block" not in names


def test_it_finds_a_wrong_sum(monkeypatch):
    def wrong(self, *given):
        right(self, *given)
        state = self.start.tensors[0]
        state[1, given[0][0] : given[0][1]] *= 1.0001

    right = SoftmaxRows.__call__
    monkeypatch.setattr(SoftmaxRows, "__call__", wrong)
    found, _ = check(torch.float32, monkeypatch)
    assert "log-probs 1 is off by" in found.message
