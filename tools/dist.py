"""`make dist`: what this machine can build for users, each file installed anew and used.

    python -m tools.dist [--out dist] [--python python3.12] [--torch 2.13.0]
    python -m tools.dist --publish                       # build only, the wheel in a container
    python -m tools.dist --try dist/*.whl --python python3.12 --torch 2.11.0

The wheels are built from the source distribution, so that what it lacks shows: one with the C++
tile operations for this platform, one without, for every other. Each file is then installed into
an environment of its own, with no compiler on PATH, and used as `tools/try_install.py` says.
What was tried, with its versions, is written to `tried.json` beside the files.

Linux wheels load on a glibc as old as that of the machine they were built on, so those to publish
are built in the container that `[tool.cibuildwheel]` of pyproject.toml names.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SWITCH = "ORPO_KERNELS_EXTENSION"
TORCH = "2.13.0"
# Loaded by torch before our library: they are torch's, whichever version is installed.
OF_TORCH = ("libtorch*.so", "libc10.so")


def main() -> int:
    """Build, try, report; exit status 1 if a file does not work as installed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument(
        "--try", dest="files", type=Path, nargs="+", help="build nothing, try these"
    )
    parser.add_argument(
        "--python", default=sys.executable, help="what the environments are made of"
    )
    parser.add_argument("--torch", default=TORCH, help="the version installed into them")
    parser.add_argument("--publish", action="store_true", help="build in a container; try nothing")
    options = parser.parse_args()
    files = options.files or build(options.out, publish=options.publish)
    if options.publish:
        return 0
    found = [attempt(file, options.python, options.torch) for file in files]
    report = Path(os.path.commonpath([file.parent.resolve() for file in files])) / "tried.json"
    report.write_text(json.dumps(found, indent=1) + "\n")
    for each in found:
        say(f"{'ok' if each['passed'] else 'FAILED':<7}{each['seconds']:>5.0f} s  {each['file']}")
    return 0 if all(each["passed"] for each in found) else 1


def build(out: Path, *, publish: bool = False) -> list[Path]:
    """The source distribution, and the wheels made from it.

    Args:
        out: folder for the files; earlier ones of this package in it are removed.
        publish: build the wheel for this machine's kind in a container, for old glibcs.

    Returns:
        Their paths.
    """
    out.mkdir(parents=True, exist_ok=True)
    for old in [*out.glob("orpo_kernels-*.whl"), *out.glob("orpo_kernels-*.tar.gz")]:
        old.unlink()
    with tempfile.TemporaryDirectory() as scratch:
        source = build_sdist(Path(scratch), out)
        made = [source, build_wheel(source, out, "off")]
        if publish:
            command = ("-m", "cibuildwheel", "--platform", "linux", "--output-dir", str(out))
            run(sys.executable, *command, str(source), cwd=ROOT)
        elif platform.system() == "Linux":
            for_many_linuxes(build_wheel(source, Path(scratch) / "raw", "required"), out)
    return [*made, *out.glob("*-abi3-*.whl")]


def build_sdist(scratch: Path, out: Path) -> Path:
    """The source distribution of what git would commit; nothing of an earlier build gets in."""
    tree = scratch / "tree"
    listed = run("git", "ls-files", "-co", "--exclude-standard", "-z", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    code = f"from setuptools.build_meta import build_sdist; build_sdist({str(out.resolve())!r})"
    run(sys.executable, "-c", code, cwd=tree, **{SWITCH: "off"})
    (made,) = out.glob("orpo_kernels-*.tar.gz")
    say(f"built {made.name}")
    return made


def build_wheel(source: Path, out: Path, extension: str) -> Path:
    """A wheel from the source distribution, with the C++ tile operations ("required"), or "off"."""
    with tempfile.TemporaryDirectory() as scratch:
        shutil.unpack_archive(source, scratch)
        (tree,) = Path(scratch).iterdir()
        made = Path(scratch) / "made"
        pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps")
        run(*pip, "-w", str(made), str(tree), cwd=scratch, **{SWITCH: extension})
        (wheel,) = made.glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        say(f"built {wheel.name}")
        return Path(shutil.copy(wheel, out))


def for_many_linuxes(wheel: Path, out: Path) -> None:
    """Copy the wheel under the tag of the oldest glibc it loads on."""
    tools = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    exclude = [word for name in OF_TORCH for word in ("--exclude", name)]
    command = ("-m", "auditwheel", "repair", "-w", str(out), *exclude, str(wheel))
    run(sys.executable, *command, cwd=wheel.parent, **tools)
    (made,) = out.glob("*-abi3-*.whl")
    say(f"built {made.name}")


def attempt(file: Path, python: str, torch: str) -> dict[str, Any]:
    """Install a file into a new environment and use it there.

    Args:
        file: a wheel or a source distribution.
        python: the Python of the environment.
        torch: the version of torch in it.

    Returns:
        What was tried: versions, the backend found, `passed`, seconds.
    """
    say(f"trying {file.name} with {Path(python).name} and torch {torch}")
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        run(python, "-m", "venv", str(home / "env"), cwd=home)
        binaries = home / "env" / ("Scripts" if os.name == "nt" else "bin")
        # Nothing but the environment is on PATH: no compiler.
        clean = {"PATH": str(binaries), "CC": "", "CXX": "", "HF_HUB_OFFLINE": "1"}
        pip = (str(binaries / "python"), "-m", "pip", "install", "-q")
        try:
            run(*pip, f"torch=={torch}", str(file.resolve()), cwd=home, **clean)
            shutil.copytree(ROOT / "examples", home / "examples")
            script = (str(binaries / "python"), str(ROOT / "tools" / "try_install.py"))
            backend = "c++" if "-abi3-" in file.name else "torch"
            words = ("--backend", backend, "--version", version())
            run(*script, "core", *words, cwd=home, **clean)
            run(*pip, f"{file.resolve()}[hf]", cwd=home, **clean)
            found = json.loads(run(*script, "train", *words, cwd=home, **clean).splitlines()[-1])
        except subprocess.CalledProcessError as error:
            say(f"{error.stdout}{error.stderr}")
            found = {"passed": False}
    return {"file": file.name, **found, "seconds": round(time.monotonic() - started, 1)}


def version(root: Path = ROOT) -> str:
    """What `orpo_kernels/version.py` says, read without importing the package."""
    names: dict[str, Any] = {}
    exec((root / "orpo_kernels" / "version.py").read_text(), names)
    return str(names["__version__"])


def run(*command: str, cwd: Path | str, **environment: str) -> str:
    """What a command prints; PYTHONPATH does not reach it."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=inherited | environment, check=True, capture_output=True, text=True
    )
    return done.stdout


def say(*words: Sequence[str] | str) -> None:
    """To standard error, at once."""
    print(*words, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
