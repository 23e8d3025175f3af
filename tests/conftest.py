"""Every test: a seed of its own, fresh memory filled with NaN, nothing fetched; slow ones first."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from orpo_kernels.engine import gemm


def pytest_collection_modifyitems(items):
    """Slow tests first: what is left for the other workers to take in the end is short."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_sessionfinish():
    gc.unfreeze()  # extensions look for what is left of them in the end


@pytest.fixture(autouse=True, scope="module")
def _nothing_old_is_garbage():
    # Every run of a trainer collects garbage: four fifths of its time, with all that was imported.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    # Fills memory from torch.empty with NaN: a row nobody wrote shows. Spelt otherwise,
    # `use_deterministic_algorithms` imports torch's compiler, seconds of every process.
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture
def _bfloat16_gemms(monkeypatch):
    """GEMMs of bfloat16 operands, also on a CPU that would widen them."""
    monkeypatch.setattr(gemm, "multiplies_bfloat16", lambda: True)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device(request.param)
