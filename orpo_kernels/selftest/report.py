"""The environment of a self-test, its result, and both as text and JSON."""

import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from json import dumps
from math import isfinite

import torch

from orpo_kernels.engine.gemm import multiplies_bfloat16, operand_dtype
from orpo_kernels.engine.tiles import NATIVE, native
from orpo_kernels.kernels import gpu_backend, has_slots
from orpo_kernels.version import __version__

PACKAGES = (
    "torch", "triton", "triton-windows", "transformers", "peft", "bitsandbytes", "accelerate",
    "datasets", "trl", "liger-kernel", "cut-cross-entropy", "unsloth", "unsloth_zoo", "axolotl",
    "llamafactory", "deepspeed",
)  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Check:
    """Result of one case: its worst figure.

    Attributes:
        op: the op.
        case: its configuration.
        dtype: name of the dtype.
        passed: whether every figure is within its limit.
        what: the result the worst figure belongs to.
        error: relative to the largest true value, unless `what` is a count.
        limit: largest error that passes.
        message: what went wrong; empty when it passed.
    """

    op: str
    case: str
    dtype: str
    passed: bool
    what: str
    error: float
    limit: float
    message: str = ""


@dataclass(frozen=True)
class SelfTestReport:
    """What `self_test` found.

    Attributes:
        environment: platform, versions and device.
        backends: tile operation -> what computes it on this device.
        checks: one per op, configuration and dtype.
        skipped: what could not be checked, and why.
        seconds: wall time of the checks.
    """

    environment: dict[str, str]
    backends: dict[str, str]
    checks: tuple[Check, ...]
    skipped: tuple[str, ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether every check that was made passed, and any was."""
        return len(self.checks) > 0 and not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do about the failures; empty without one."""
        if self.passed:
            return ()
        pairs = dict.fromkeys(f"{each.op} in {each.dtype}" for each in self.failures)
        failed = {each.dtype for each in self.failures}
        good = [each for each in map(dtype_name, DTYPES) if each not in failed]
        workaround = (
            f"until then compute in {good[0]}, whose checks all pass: compute_dtype=torch.{good[0]}"
            if good
            else "until then train on another device: no dtype passes on this one"
        )
        advice = [f"do not trust a training run here: wrong are {', '.join(pairs)}", workaround]
        if any(self.backends.get(each.op) == "c++" for each in self.failures):
            advice.append(f"or set {native.SWITCH}=torch: plain torch instead of the C++ kernels")
        advice.append(
            "update torch and triton, then run this again; if it still fails, report it with the "
            "output of `orpo-kernels selftest --json`: device, versions and figures are in it"
        )
        return tuple(advice)

    def json(self) -> str:
        """Everything as one JSON object; a figure that is not finite is null."""
        content = asdict(self) | {"passed": self.passed, "advice": self.advice}
        for check in content["checks"]:
            for name in ("error", "limit"):
                check[name] = check[name] if isfinite(check[name]) else None
        return dumps(content, indent=2, allow_nan=False)

    def text(self) -> str:
        """All of it: environment, a table of error / limit, and what failed."""
        return headline(self.environment | self.backends) + "\n" + self.findings()

    def findings(self) -> str:
        """A table of error / limit, what was left out, and what failed."""
        lines = [
            "",
            "error / limit, relative to the largest true value; per check, the figure nearest it",
            *self._table(),
        ]
        lines += ["", *(f"skipped: {each}" for each in self.skipped)]
        lines += [
            f"FAILED: {each.op}, {each.case}, {each.dtype}: {each.message}"
            for each in self.failures
        ]
        lines += [f"what to do: {each}" for each in self.advice]
        count = f"{len(self.checks)} checks in {self.seconds:.1f} s"
        passed = "all passed" if self.checks else "nothing was found out"
        lines.append(f"{count}, " + (f"{len(self.failures)} failed" if self.failures else passed))
        return "\n".join(lines)

    def _table(self) -> list[str]:
        columns = [dtype_name(each) for each in DTYPES]
        rows: dict[tuple[str, str], dict[str, str]] = {}
        for check in self.checks:
            cell = f"{check.error:.1e} / {check.limit:.1e}" if check.passed else "FAILED"
            rows.setdefault((check.op, check.case), {})[check.dtype] = cell
        left = max(len(f"{op}: {case}") for op, case in rows) if rows else 0
        lines = [" ".join((f"{'':<{left}}", *(f"{each:>18}" for each in columns)))]
        for (op, case), cells in rows.items():
            name = f"{op}: {case}"
            lines.append(
                " ".join((f"{name:<{left}}", *(f"{cells.get(each, '-'):>18}" for each in columns)))
            )
        return [line.rstrip() for line in lines]


_WIDTH = max(map(len, (*PACKAGES, *NATIVE)))  # of a name


def headline(about: dict[str, str]) -> str:
    """Machine, versions, what computes each operation: a line each, parts of it in one column."""
    return "\n".join(f"{name:<{_WIDTH}}  {value}" for name, value in about.items())


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def environment(device: torch.device) -> dict[str, str]:
    """Platform, versions and device."""
    return versions() | machine_of(device)


def versions() -> dict[str, str]:
    """Platform and packages; nothing is imported for it, no device is used, no user is named."""
    about = {
        "orpo_kernels": __version__,
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    about |= {name: version for name in PACKAGES if (version := _version(name))}
    if torch.version.cuda or torch.version.hip:
        about["cuda" if torch.version.cuda else "hip"] = str(
            torch.version.cuda or torch.version.hip
        )
    return about


def machine_of(device: torch.device) -> dict[str, str]:
    """The device, and how it multiplies."""
    about = {"device": f"{device}: {_device_name(device)}"}
    if device.type == "cpu":
        has = "oneDNN has" if multiplies_bfloat16() else "oneDNN has no kernels for"
        used = dtype_name(operand_dtype(device, torch.bfloat16))
        about["bfloat16 GEMMs"] = f"in {used}: {has} bfloat16 on this CPU"
    return about


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _device_name(device: torch.device) -> str:
    if device.type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability()
        return f"{platform.machine()}, {capability}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        memory = properties.total_memory / 2**30
        return f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.1f} GiB"
    return device.type


def tile_backends(device: torch.device) -> dict[str, str]:
    """What the dispatcher calls for each tile operation on this device."""
    key = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU", "mps": "MPS"}.get(device.type)
    has_kernel: Callable[[str, str], bool] = torch._C._dispatch_has_kernel_for_dispatch_key
    kernel = native.cpu_backend() if device.type == "cpu" else gpu_backend()
    backends = {
        name: kernel if key and has_kernel(f"orpo_kernels::{name}", key) else "plain torch"
        for name in NATIVE
    }
    if has_slots(device, torch.bfloat16):
        backends |= {"slot_gradient": kernel}
    return backends
