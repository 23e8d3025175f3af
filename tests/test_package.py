"""What importing the package does, and does not do."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import orpo_kernels

ROOT = Path(__file__).parents[1]

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


def test_one_oldest_python_is_named_everywhere():
    # ruff refuses newer syntax and mypy a newer standard library, as long as both are told of it.
    project = (ROOT / "pyproject.toml").read_text()
    (oldest,) = re.findall(r'^requires-python = ">=(3\.\d+)"$', project, re.MULTILINE)
    supported = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', project)
    tag = oldest.replace(".", "")
    assert re.findall(r'^target-version = "py(\d+)"$', project, re.MULTILINE) == [tag]
    assert re.findall(r'^python_version = "(3\.\d+)"', project, re.MULTILINE) == [oldest]
    assert re.findall(r'"py_limited_api": "cp(\d+)"', (ROOT / "setup.py").read_text()) == [tag]
    assert supported == [f"3.{minor}" for minor in range(10, 10 + len(supported))]
    assert supported[0] == oldest
    readme = (ROOT / "README.md").read_text()
    assert f"Python {oldest} to {supported[-1]}, and torch only" in readme
    # The pinned versions of the development environment may need a later one.
    (pinned,) = re.findall(r"\(Python (3\.\d+)\+\)", (ROOT / "constraints.txt").read_text())
    assert pinned in supported
    assert f"a Python from {pinned} on" in readme
