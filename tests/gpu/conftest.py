"""GPU tests: skipped without a device, or run on the CPU to see that they are sound.

ORPO_KERNELS_DRY_RUN=1 runs all that does not need CUDA itself on the CPU, at small sizes.

They are few minutes of compiling, which a GPU's host does side by side: with a thread to each
worker, long tests first, modules that are long to import where they are used.
"""

import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

DRY_RUN = os.environ.get("ORPO_KERNELS_DRY_RUN") == "1"
HERE = Path(__file__).parent

if "PYTEST_XDIST_WORKER" in os.environ:
    # Twelve workers with sixteen threads each wait for each other; so do their compilers.
    torch.set_num_threads(1)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


@pytest.hookimpl(trylast=True)  # after the sorting of all tests
def pytest_collection_modifyitems(items):
    """A short test behind each long one: a worker is given two to begin with."""
    if any(HERE not in item.path.parents for item in items):
        return
    long = [item for item in items if item.get_closest_marker("slow")]
    others = [item for item in items if item not in long]
    short, others = others[: len(long)], others[len(long) :]
    first = [each for pair in zip(long, short, strict=False) for each in pair]
    items[:] = first + long[len(short) :] + others


class Gpu(NamedTuple):
    """Where to run, and whether it is the real thing."""

    device: torch.device
    real: bool

    def needs_cuda(self):
        if not self.real:
            pytest.skip("dry run: needs CUDA itself")


@pytest.fixture
def gpu():
    if torch.cuda.is_available() and not DRY_RUN:
        # float32 means float32: TensorFloat-32 has 10 bits.
        torch.backends.cuda.matmul.allow_tf32 = False
        return Gpu(torch.device("cuda"), real=True)
    if not DRY_RUN:
        pytest.skip("no CUDA device")
    return Gpu(torch.device("cpu"), real=False)
