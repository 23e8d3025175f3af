"""GPU tests: skipped without a device, or run on the CPU to see that they are sound.

ORPO_KERNELS_DRY_RUN=1 runs all that does not need CUDA itself on the CPU, at small sizes.
"""

import os
from typing import NamedTuple

import pytest
import torch

DRY_RUN = os.environ.get("ORPO_KERNELS_DRY_RUN") == "1"


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
