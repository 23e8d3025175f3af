"""What stands behind the CUDA and XPU dispatch keys, and what importing it costs."""

import subprocess
import sys
import types

import pytest
import torch

from orpo_kernels import kernels
from orpo_kernels.engine import linear_lse, tiles  # noqa: F401 - registers

OPERATIONS = [
    "softmax_stats", "softmax_grad_", "column_sums", "linear_lse", "sequence_mean", "odds_ratio",
    "odds_ratio_backward", "sequence_mean_backward", "pair_loss",
]  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
def test_registered_without_importing_triton(name):
    for key in ("CUDA", "XPU"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"orpo_kernels::{name}", key)


def test_triton_is_imported_by_the_first_gpu_tensor_only():
    code = (
        "import sys, torch, orpo_kernels\n"
        "h = torch.randn(2, 3, 4, requires_grad=True)\n"
        "labels = torch.zeros(2, 3, dtype=torch.long)\n"
        "orpo_kernels.orpo_loss(h, torch.randn(5, 4), labels).loss.backward()\n"
        "assert 'orpo_kernels.kernels.softmax_stats' not in sys.modules\n"
        "assert 'orpo_kernels.kernels.tuning' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.fixture
def chooser(monkeypatch):
    """A chooser whose launcher and plain form say which of them was called."""
    module = types.ModuleType("orpo_kernels.kernels.softmax_stats")
    module.softmax_stats = lambda *args: "kernel"
    monkeypatch.setitem(sys.modules, "orpo_kernels.kernels.softmax_stats", module)
    for remembered in (kernels._installed_backend, kernels.launcher):
        remembered.cache_clear()
    yield kernels._chooser("softmax_stats", lambda *args: "plain")
    for remembered in (kernels._installed_backend, kernels.launcher):
        remembered.cache_clear()


def test_the_kernel_when_there_is_one(chooser, monkeypatch):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: object())
    tile, labels = torch.randn(2, 9), torch.full((1, 2), -1)
    assert chooser(tile, None, labels, 0, 1.0, None) == "kernel"
    # No kernel: float64, columns apart, no rows, three label sets.
    assert chooser(tile.double(), None, labels, 0, 1.0, None) == "plain"
    assert chooser(torch.randn(9, 2).t(), None, labels, 0, 1.0, None) == "plain"
    assert chooser(tile[:0], None, labels[:, :0], 0, 1.0, None) == "plain"
    assert chooser(tile, None, torch.full((3, 2), -1), 0, 1.0, None) == "plain"


@pytest.fixture
def no_memory(monkeypatch):
    """Every card is asked anew, whatever was known of another one."""
    for name in ("has_tensor_cores", "_multiplies_slots"):
        monkeypatch.setattr(kernels, name, getattr(kernels, name).__wrapped__)


def test_a_gemm_needs_tensor_cores_and_one_dtype(no_memory, monkeypatch):
    hidden, weight, labels = torch.randn(2, 8), torch.randn(9, 8), torch.full((1, 2), -1)
    assert kernels._has_gemm(hidden, weight, None, labels)
    assert not kernels._has_gemm(hidden, weight.bfloat16(), None, labels)
    assert not kernels._has_gemm(hidden, weight[:0], None, labels)
    assert not kernels._has_gemm(hidden, torch.randn(8, 9).t(), None, labels)
    for capability, expected in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        assert kernels.has_tensor_cores(torch.device("cuda")) == expected
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert kernels.has_tensor_cores(torch.device("cuda"))


@pytest.fixture
def card(no_memory, monkeypatch):
    """A card that is not here, of a compute capability."""

    def pretend(major, minor):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (major, minor))

    monkeypatch.setattr(kernels, "gpu_backend", lambda: "triton")
    return pretend


def test_slots_need_tensor_cores_and_a_dtype_with_kernels(card, monkeypatch):
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert kernels.has_slots(cuda, torch.bfloat16)  # a plan, without a card
    for capability, expected in (((7, 5), False), ((8, 0), True), ((12, 0), True)):
        card(*capability)
        for dtype in kernels.DTYPES:
            assert kernels.has_slots(cuda, dtype) == expected
    assert not kernels.has_slots(cuda, torch.float64)
    assert not kernels.has_slots(cpu, torch.bfloat16)
    monkeypatch.setattr(kernels, "gpu_backend", lambda: "torch")
    assert not kernels.has_slots(cuda, torch.bfloat16)


def test_without_triton_one_warning_and_the_plain_form(chooser, monkeypatch):
    monkeypatch.setattr(kernels.importlib.util, "find_spec", lambda name: None)
    arguments = (torch.randn(2, 9), None, torch.full((1, 2), -1), 0, 1.0, None)
    with pytest.warns(RuntimeWarning, match="triton is not installed") as caught:
        assert [chooser(*arguments), chooser(*arguments)] == ["plain", "plain"]
    assert len(caught) == 1


def test_the_switch(chooser, monkeypatch):
    monkeypatch.setenv(kernels.SWITCH, "torch")
    arguments = (torch.randn(2, 9), None, torch.full((1, 2), -1), 0, 1.0, None)
    assert chooser(*arguments) == "plain"
