"""The self-test of whole rows, at 8,209 columns, of E kept, and of what is folded."""

import pytest
import torch

from orpo_kernels.engine import policy
from orpo_kernels.engine.gpu import folded
from orpo_kernels.kernels.softmax_rows import SoftmaxRows
from orpo_kernels.kernels.weight_probs import WeightProbs
from orpo_kernels.selftest import kept, logps, schedule
from orpo_kernels.selftest.figures import Setting
from tests.kernels.interpreted.engine import as_on_a_gpu
from tests.kernels.interpreted.plugin import launches

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def check(dtype, monkeypatch, name="trainable head, whole rows"):
    """The one check, and the kernels it launched."""
    as_on_a_gpu(monkeypatch, widens=True)
    setting, before = Setting(torch.device("cpu"), dtype), len(launches)
    (case,) = [case for case in (*logps.cases(setting), *kept.cases(setting)) if case.name == name]
    ((found,), _) = schedule.run([case], setting.device)
    return found, set(launches[before:])


@DTYPES
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


@DTYPES
def test_it_passes_on_rows_that_keep_e(dtype, monkeypatch):
    found, names = check(dtype, monkeypatch, kept.VARIANT.name)
    assert found.passed, found
    assert {"softmax_rows", "weight_probs", "scale_rows"} <= names


def test_it_finds_an_e_that_is_not_kept(monkeypatch):
    def wrong(self, rows, *given):
        right(self, rows, *given)
        if self.kept:
            self.start.tensors[0][: rows[1] - rows[0]] *= 1.05

    def make(self, *given, kept, **options):
        made(self, *given, kept=kept, **options)
        self.kept = kept

    right, made = WeightProbs.__call__, WeightProbs.__init__
    monkeypatch.setattr(WeightProbs, "__call__", wrong)
    monkeypatch.setattr(WeightProbs, "__init__", make)
    found, _ = check(torch.float32, monkeypatch, kept.VARIANT.name)
    assert "dweight is off by" in found.message


@pytest.fixture
def folds(monkeypatch):
    """As where `linear_lse` runs; a quarter of the vocabulary."""
    monkeypatch.setattr(policy, "device_class", lambda device: "cuda sm_80+")
    monkeypatch.setattr(logps, "VOCABULARY", 509)


@DTYPES
def test_it_passes_on_what_is_folded(dtype, folds, monkeypatch):
    found, names = check(dtype, monkeypatch, "frozen head")
    assert found.passed, found
    assert {"softmax_block", "combine_rows"} <= names  # with a gradient, and without


def test_it_finds_sums_that_are_not_combined(folds, monkeypatch):
    def wrong(state, partials, first_row):
        right(state, partials[..., :-1].contiguous(), first_row)

    right = folded.combine_rows
    monkeypatch.setattr(folded, "combine_rows", wrong)
    found, _ = check(torch.float32, monkeypatch, "frozen head")
    assert "log-probs without a gradient is off by" in found.message
