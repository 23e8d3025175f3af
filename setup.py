"""The C++ tile operations of `csrc/`, and nothing else: the metadata is in pyproject.toml.

They are optional. They need a C++17 compiler and the headers of torch >= 2.10; without either the
install succeeds and the CPU uses the plain-torch form. `ORPO_KERNELS_EXTENSION` says otherwise:
`required` (a failure is an error) or `off` (nothing is built). `SAN=1` builds for debugging, with
address and undefined-behaviour sanitizers.
"""

import importlib.util
import os
import platform
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

WANTED = os.environ.get("ORPO_KERNELS_EXTENSION", "auto")
SANITIZE = os.environ.get("SAN", "") not in ("", "0")
MINIMUM_TORCH = (2, 10)


def say(message: str) -> None:
    """Shown by `pip install -v`, and by every build that is not pip's."""
    sys.stderr.write(f"orpo_kernels: {message}\n")


def torch_root() -> Path | None:
    """Where torch is installed; found without importing it.

    An isolated build (`pip install .`) hides torch from `import`; its headers are all that is
    needed, and they are still where this Python installs packages.
    """
    spec = importlib.util.find_spec("torch")
    found = list(spec.submodule_search_locations or ()) if spec else []
    found += [f"{sysconfig.get_path(name)}/torch" for name in ("platlib", "purelib")]
    return next((Path(each) for each in found if (Path(each) / "include").is_dir()), None)


def torch_version(root: Path) -> tuple[int, ...]:
    """Major and minor version of torch's headers; (0, 0) when they predate the stable ABI."""
    header = root / "include/torch/headeronly/version.h"
    if not header.is_file():
        return (0, 0)
    defined = dict(re.findall(r"#define TORCH_VERSION_(M\w+) (\d+)", header.read_text()))
    return int(defined["MAJOR"]), int(defined["MINOR"])


def extension(root: Path) -> Extension:
    """The extension: stable ABI of torch 2.10, so one build serves every later torch."""
    options: dict[str, Any] = {"libraries": ["torch_cpu"], "library_dirs": [str(root / "lib")]}
    if platform.system() == "Windows":
        options["include_dirs"] = [str(root / "include")]
        options["extra_compile_args"] = ["/std:c++17", "/O2"]
    else:
        # No -ffast-math: nan must stay nan, and its link step turns subnormals off process-wide.
        options["extra_compile_args"] = [
            "-std=c++17", "-O3", "-Wall", "-Wextra", "-fvisibility=hidden", "-fopenmp-simd",
            "-fno-math-errno", "-fno-trapping-math", f"-isystem{root / 'include'}",
        ]  # fmt: skip
        options["extra_link_args"] = ["-Wl,-s"] if platform.system() == "Linux" else []
    if SANITIZE:
        flags = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g"]
        options["extra_compile_args"] += [*flags, "-O1"]
        options["extra_link_args"] = flags
    return Extension(
        "orpo_kernels._C",
        sorted(str(path) for path in Path("csrc").glob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        py_limited_api=True,
        optional=WANTED != "required",
        language="c++",
        **options,
    )


def extensions() -> list[Extension]:
    """The extension where it can be built; else a line that says why not, and nothing."""
    if WANTED == "off":
        missing = "ORPO_KERNELS_EXTENSION=off"
    elif (root := torch_root()) is None:
        missing = "torch is not installed where this build runs"
    elif (version := torch_version(root)) < MINIMUM_TORCH:
        missing = f"torch >= 2.10 is needed, {root} is {'.'.join(map(str, version))}"
    else:
        return [extension(root)]
    if WANTED == "required":
        raise SystemExit(f"orpo_kernels: the C++ tile operations cannot be built: {missing}")
    say(f"CPU backend: torch (no C++ tile operations: {missing})")
    return []


class BuildExtension(build_ext):
    """Says how the build ended; a failed one fails the install only where it is required."""

    def build_extension(self, ext: Extension) -> None:
        """Builds `ext`."""
        try:
            super().build_extension(ext)
        except Exception:
            if WANTED == "required":
                raise
            say("CPU backend: torch (the C++ tile operations did not compile, see above)")
        else:
            say("CPU backend: c++")

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None: it is loaded by torch, not imported, and has no PyInit function."""
        return []


modules = extensions()
setup(
    ext_modules=modules,
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {},
)
