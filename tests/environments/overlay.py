"""Makes an environment of its own for one integration: `python -m tests.environments.overlay NAME`.

`.venv-NAME` sees the packages of `.venv` (torch and this package among them) behind its own, which
are those of `constraints/NAME.txt`, installed without their dependencies: the list is complete.
"""

import argparse
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from pathlib import Path

ROOT = Path(__file__).parents[2]


def make(name: str, timeout: float | None = None) -> float:
    """Makes the environment anew; seconds it took.

    Raises:
        CalledProcessError: pip could not install; `stderr` is what it said.
        TimeoutExpired: not within `timeout` seconds.
    """
    start, folder = time.perf_counter(), ROOT / f".venv-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=False, symlinks=True)
    own = sysconfig.get_path("purelib", vars={"base": str(folder)})
    # A line of code, not a path: the packages that .venv finds by .pth files are found as well.
    Path(own, "base.pth").write_text(
        f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    )
    command = [sys.executable, "-m", "pip", "--python", str(folder / "bin/python"), "install", "-q"]
    command += ["--no-deps", "-r", str(ROOT / "constraints" / f"{name}.txt")]
    subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True, timeout=timeout)
    (folder / ".ready").touch()
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "name", choices=sorted(p.stem for p in (ROOT / "constraints").glob("*.txt"))
    )
    name = parser.parse_args().name
    try:
        sys.stdout.write(f".venv-{name}: {make(name):.0f} s\n")
    except subprocess.CalledProcessError as error:
        sys.stderr.write(error.stderr)
        raise SystemExit(error.returncode) from None
