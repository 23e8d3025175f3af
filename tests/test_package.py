"""What importing the package does, and does not do."""

import subprocess
import sys

import pytest

import orpo_kernels

OPTIONAL = ["transformers", "peft", "trl", "bitsandbytes", "triton", "datasets", "matplotlib"]


def test_import_needs_torch_only():
    # The optional libraries are made unimportable: the core must not notice.
    code = (
        "import sys\n"
        f"for name in {OPTIONAL}: sys.modules[name] = None\n"
        "import torch, orpo_kernels\n"
        "w = torch.randn(5, 4); h = torch.randn(2, 3, 4, requires_grad=True)\n"
        "orpo_kernels.orpo_loss(h, w, torch.zeros(2, 3, dtype=torch.long)).loss.backward()\n"
        "assert h.grad.abs().sum() > 0\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_public_names():
    for name in orpo_kernels.__all__:
        assert getattr(orpo_kernels, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = orpo_kernels.nonsense


def test_star_import_needs_torch_only():
    code = (
        f"import sys\nfor name in {OPTIONAL}: sys.modules[name] = None\nfrom orpo_kernels import *"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_lazy_names():
    for name in ("ORPOConfig", "ORPOTrainer", "fuse_head", "unfuse_head"):
        assert getattr(orpo_kernels, name).__name__ == name
