"""Which machine, versions and command: what every figure is printed beside. No host names."""

import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "orpo_kernels", "torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy",
    "unsloth_zoo",
)  # fmt: skip
COMMAND = "ORPO_BENCH_COMMAND"  # what the user typed, when it was not this process's own line


def versions() -> dict[str, str]:
    """Installed versions of ours and of every peer; "missing" where one is not there."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    if name == "orpo_kernels":
        from orpo_kernels import __version__

        return __version__
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def command() -> str:
    """The command line that reproduces this run."""
    if os.environ.get(COMMAND):
        return os.environ[COMMAND]
    program = Path(sys.argv[0])
    name = program.name
    if "pytest" in name:
        name = "python -m pytest"
    elif program.parent.name == Path(__file__).parent.name:
        name = f"python -m {program.parent.name}.{program.stem}"
    return f"{name} {shlex.join(sys.argv[1:])}".rstrip()


def write_results(path: Path, device: str, results: list[dict[str, Any]], **more: Any) -> None:
    """Writes rows as JSON, with the machine, versions and command that made them."""
    about = {"machine": describe(device), "versions": versions(), "command": command()}
    path.write_text(json.dumps({**about, **more, "results": results}, indent=1))


def describe(device: str) -> dict[str, Any]:
    """Name and figures of the machine, for the head of a table."""
    about: dict[str, Any] = {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bf16": _cpu_has("avx512_bf16"),
        "amx": _cpu_has("amx_bf16"),
        "python": platform.python_version(),
        "system": platform.system(),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        about["gpu"] = properties.name
        about["gpu_memory_bytes"] = properties.total_memory
        about["cuda"] = torch.version.cuda or torch.version.hip
    return about


def slug(device: str) -> str:
    """A folder name from the models of CPU or GPU: `amd-epyc-family-25-model-17-2-cores`."""
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{_cpu_model()} {os.cpu_count()} cores"
    )
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# What a run and its report write: with them changed the code is still that of the commit.
_WRITTEN = (":!README.md", ":!docs", ":!benchmarks/results")


def commit(root: Path = Path(__file__).parent.parent) -> str:
    """Short hash of the working tree's commit, "+" when it has changes, "" outside git."""
    try:
        found = _git(root, "rev-parse", "--short=10", "HEAD")
        changes = _git(root, "status", "--porcelain", "--", ".", *_WRITTEN)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found + ("+" if changes else "")


def _git(root: Path, *words: str) -> str:
    ran = subprocess.run(["git", *words], capture_output=True, text=True, check=True, cwd=root)
    return ran.stdout.strip()


def _cpuinfo() -> dict[str, str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return {}
    first = path.read_text().split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _cpu_model() -> str:
    info = _cpuinfo()
    name = info.get("model name", platform.processor() or platform.machine())
    # Cloud machines hide the model; family and model still tell Zen 4 from Zen 5.
    numbers = [f"{key.split()[-1]} {info[key]}" for key in ("cpu family", "model") if key in info]
    return " ".join([name, *numbers])


def _cpu_has(flag: str) -> bool:
    return flag in _cpuinfo().get("flags", "").split()
