"""Tests of other trainers, each in an environment of its own, made where it is not there yet.

    python -m tests.environments.check trl19 axolotl

ends with a table: versions, seconds, results. An environment that cannot be made within `--minutes`
is not tested; the last lines say so, and why. That is a failure as well, unless `--allow-unmade`
asks to tell only. A skipped test is a failure: here everything that it needs is installed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from tests.environments import overlay

ROOT = Path(__file__).parents[2]
HEAD = "| environment | versions | made in | tested in | processor time | result |"


class Trainer(NamedTuple):
    """What is tested in `.venv-NAME`, and whose versions say what it was tested with."""

    packages: tuple[str, ...]
    tests: tuple[str, ...]


TRAINERS = {
    "trl19": Trainer(
        ("trl", "transformers"),
        ("tests/integrations/test_trl.py", "tests/integrations/test_documented.py"),
    ),
    "trackers": Trainer(
        ("wandb", "tensorboard", "transformers"), ("tests/environments/test_trackers.py",)
    ),
    "llamafactory": Trainer(
        ("llamafactory", "trl", "transformers"), ("tests/environments/test_llamafactory.py",)
    ),
    "axolotl": Trainer(("axolotl", "trl", "transformers"), ("tests/environments/test_axolotl.py",)),
    "unsloth": Trainer(("unsloth", "trl", "transformers"), ("tests/environments/test_unsloth.py",)),
}


class Row(NamedTuple):
    """One environment's line of the table."""

    name: str
    versions: str
    made_s: float | None  # None: it was there
    tested_s: float
    processor_s: float
    passed: int
    failed: int  # or skipped

    def __str__(self) -> str:
        made = "there" if self.made_s is None else f"{self.made_s:.0f} s"
        result = f"{self.passed} passed" + (f", {self.failed} FAILED" if self.failed else "")
        tested = f"{self.tested_s:.0f} s | {self.processor_s:.0f} s"
        return f"| {self.name} | {self.versions} | {made} | {tested} | {result} |"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0, or 1 when a test failed or an environment that must be there could not be."""
    parser = argparse.ArgumentParser(prog="python -m tests.environments.check", description=__doc__)
    parser.add_argument("names", nargs="+", choices=list(TRAINERS), metavar="NAME")
    parser.add_argument("--minutes", type=float, default=5.0, help="to make one of them")
    parser.add_argument("--allow-unmade", action="store_true", help="tell, and do not fail")
    options = parser.parse_args(argv)
    rows, unmade = [], {}
    for name in options.names:
        try:
            made_s = None if is_made(name) else overlay.make(name, 60 * options.minutes)
        except (OSError, subprocess.SubprocessError) as error:
            unmade[name] = reason(error)
        else:
            rows.append(run_tests(name, made_s))
    lines = [HEAD, "|---" * HEAD.count(" | ") + "|---|", *rows]
    lines += [f"{name}: NOT MADE, NOT TESTED: {why}" for name, why in unmade.items()]
    sys.stdout.write("\n".join(map(str, lines)) + "\n")
    failed = any(row.failed or not row.passed for row in rows)
    return int(failed or bool(unmade and not options.allow_unmade))


def is_made(name: str) -> bool:
    """Whether the environment is there, and made of the list as it is now."""
    ready, wanted = ROOT / f".venv-{name}/.ready", ROOT / f"constraints/{name}.txt"
    return ready.exists() and ready.stat().st_mtime >= wanted.stat().st_mtime


def reason(error: Exception) -> str:
    """One line: what pip says last, or how long it was given."""
    said = str(getattr(error, "stderr", None) or "").strip().splitlines()
    errors = [line for line in said if line.startswith("ERROR")]
    if isinstance(error, subprocess.TimeoutExpired):
        return f"not within {error.timeout:.0f} s"
    return (errors or said or [str(error)])[-1]


def run_tests(name: str, made_s: float | None) -> Row:
    """Runs the tests of an environment that is made."""
    python, trainer = str(ROOT / f".venv-{name}/bin/python"), TRAINERS[name]
    start, before = time.perf_counter(), os.times()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        words = ["-n", "2", "--dist", "worksteal", "--durations=5", f"--junitxml={report}"]
        subprocess.run(
            [python, "-m", "pytest", *trainer.tests, *words],
            cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False,
        )  # fmt: skip
        passed, failed = count(report)
    seconds, after = time.perf_counter() - start, os.times()
    used = after.children_user + after.children_system
    used -= before.children_user + before.children_system
    found = versions(python, trainer.packages)
    return Row(name, found, made_s, seconds, used, passed, failed)


def count(report: Path) -> tuple[int, int]:
    """Tests that passed, and others; none passed where pytest wrote no report."""
    if not report.exists():
        return 0, 1
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    total, bad = int(suite.get("tests", 0)), 0
    for kind in ("errors", "failures", "skipped"):
        bad += int(suite.get(kind, 0))
    return total - bad, bad


def versions(python: str, packages: Sequence[str]) -> str:
    """What an environment has installed: `trl 1.9.0, transformers 5.23.0`."""
    code = (
        "import sys, importlib.metadata as known\n"
        "print(', '.join(f'{name} {known.version(name)}' for name in sys.argv[1:]))"
    )
    done = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True)
    return done.stdout.strip() or "none"


if __name__ == "__main__":
    raise SystemExit(main())
