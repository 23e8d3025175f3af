"""What an install does with a compiler, and without one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orpo_kernels.engine.tiles import native

ROOT = Path(__file__).parents[2]
REPORT = """
import orpo_kernels.engine.tiles, torch
from orpo_kernels.engine.tiles import native
from orpo_kernels import linear_logps
h = torch.ones(3, 4, requires_grad=True)
linear_logps(h, torch.eye(4), torch.tensor([0, 1, 2])).sum().backward()
print(native.__file__, native.cpu_backend(), native.cpu_backend_reason(), sep="\\n")
"""


def _compiler():
    return shutil.which(os.environ.get("CXX", "c++").split()[0])


def test_built_where_a_compiler_is():
    switches = {native.SWITCH: "torch", "ORPO_KERNELS_EXTENSION": "off"}
    chosen = [name for name, value in switches.items() if os.environ.get(name) == value]
    if chosen:
        pytest.skip(f"turned off by {chosen[0]}")
    if _compiler() is None:
        pytest.skip("no C++ compiler")
    assert native.cpu_backend() == "c++", native.cpu_backend_reason()


@pytest.fixture
def sources(tmp_path):
    """A copy of what a source distribution holds: no build is left in the work tree."""
    copy = tmp_path / "sources"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "*.pyd")
    for name in ("csrc", "orpo_kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    return copy


def _run(*command, cwd, **environment):
    inherited = {k: v for k, v in os.environ.items() if k not in (native.SWITCH, "LD_PRELOAD")}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=inherited | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def _pip(*arguments, cwd, **environment):
    options = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check")
    return _run("-m", "pip", *arguments, *options, cwd=cwd, **environment)


def _backend(target, cwd):
    """What a fresh process finds that sees only the install under `target`, and torch."""
    found = _run("-c", REPORT, cwd=cwd, PYTHONPATH=str(target)).stdout.split("\n")
    where, backend, reason = found[:3]
    assert Path(where).is_relative_to(target)
    return backend, reason


@pytest.mark.slow
def test_installs_without_a_compiler(sources, tmp_path):
    target = tmp_path / "target"
    broken = {"CC": "/bin/false", "CXX": "/bin/false"}
    done = _pip("install", "-v", "--target", str(target), ".", cwd=sources, **broken)
    assert "CPU backend: torch" in done.stdout + done.stderr
    backend, reason = _backend(target, tmp_path)
    assert backend == "torch"
    assert "compiler" in reason


@pytest.mark.slow
@pytest.mark.skipif(_compiler() is None, reason="no C++ compiler")
def test_wheel_loads_in_a_clean_process(sources, tmp_path):
    wheels, target = tmp_path / "wheels", tmp_path / "target"
    required = {"ORPO_KERNELS_EXTENSION": "required", "SAN": "0"}
    _pip("wheel", "--wheel-dir", str(wheels), ".", cwd=sources, **required)
    [wheel] = wheels.glob("*.whl")
    assert "-cp310-abi3-" in wheel.name  # one for every Python from 3.10 on
    shutil.unpack_archive(wheel, target, "zip")
    assert _backend(target, tmp_path) == ("c++", "")
