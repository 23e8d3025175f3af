"""Loads the C++ tile operations of `csrc/` where they were built, and says which form the CPU uses.

They register themselves for the CPU dispatch key of the schemas in `engine/tiles.py`. What is not
built is no error: the plain-torch form stands in. What is built and does not load, or lacks an
operation, is a warning.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any, Literal

import torch

REBUILD = (
    "reinstall orpo_kernels from its sources with pip install -v --no-build-isolation "
    "--no-deps --force-reinstall"
)
SWITCH = "ORPO_KERNELS_CPU_BACKEND"

_reason = "not loaded yet"
_stand_in: torch.library.Library | None = None


def cpu_backend() -> Literal["c++", "torch"]:
    """The form of the tile operations that CPU tensors get."""
    return "torch" if cpu_backend_reason() else "c++"


def cpu_backend_reason() -> str:
    """Why it is "torch"; empty when it is "c++"."""
    return _reason or ("use_backend('torch')" if _stand_in else "")


def stand_in(forms: Mapping[str, Callable[..., Any]] | None) -> None:
    """Lets `forms`, by operation, stand in for C++ on CPU tensors; None: no longer."""
    global _stand_in
    if _stand_in is not None:
        _stand_in._destroy()  # type: ignore[no-untyped-call]
        _stand_in = None
    if forms is not None and not _reason:
        _stand_in = torch.library.Library("orpo_kernels", "IMPL")  # type: ignore[no-untyped-call]
        for name, form in forms.items():
            _stand_in.impl(name, form, "CPU", allow_override=True)  # type: ignore[no-untyped-call]


def load(operations: Iterable[str]) -> None:
    """Loads the library, once, and checks that it implements `operations` for the CPU.

    Args:
        operations: qualified names of defined operations, e.g. "orpo_kernels::softmax_stats".

    Warns:
        RuntimeWarning: a library is there but cannot be used, or only in part.
    """
    global _reason
    asked = os.environ.get(SWITCH, "c++")
    if asked == "torch":
        _reason = f"{SWITCH}=torch"
        return
    library = _library()
    if library is None:
        _reason = (
            "the C++ tile operations were not built: they need a C++17 compiler and an installed "
            "torch >= 2.10; then pip install --no-build-isolation"
        )
        return
    try:
        torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    except (OSError, RuntimeError) as error:
        _reason = f"{library} does not load ({error})"
    else:
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        missing = [name for name in operations if not has(name, "CPU")]
        _reason = f"{library} was built from other sources and lacks {missing}" if missing else ""
    if _reason:
        warnings.warn(
            f"orpo_kernels: {_reason}; the CPU uses the slower torch form. {REBUILD}",
            RuntimeWarning,
            stacklevel=2,
        )


def _library() -> Path | None:
    package = Path(__file__).parents[2]
    paths = [package / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES]
    return next((path for path in paths if path.exists()), None)
