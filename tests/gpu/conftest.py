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
    """A short test behind each long one, of its file where it can: a worker begins with two."""
    if any(HERE not in item.path.parents for item in items):
        return
    first, others = [], [item for item in items if not item.get_closest_marker("slow")]
    for long in items:
        if long.get_closest_marker("slow"):
            own = [item for item in others if item.path == long.path] + others
            first += [long, *own[:1]]
            others = [item for item in others if item not in own[:1]]
    items[:] = first + others


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
