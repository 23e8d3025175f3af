"""Everything a rented GPU is for, in one call: correctness, the table of budgets, then the rest.

    python -m tests.gpu.session --out DIR [--minutes 9]
    python -m tests.gpu.session --out DIR --dry-run         # on a CPU, tiny: shows that it runs

Each step has its share of the minutes and writes its own file as it ends, so that a session that is
cut short keeps what was done: the first two are what a session must bring. The table of budgets
(`benchmarks/budgets.py`: ours and the peers, launches, the kernels' sum) is printed once more at
the end. Exits with 1 when a step failed; `session.json` says which.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[2]
# A small case or two of each kernel, rows that are split and rows of any start among them.
SANITIZED = (
    "float32 and (logit or vector or column_sums) or sequence_mean or odds_ratio or pair_loss "
    "or without_room"
)


class Step(NamedTuple):
    """A command, the file its output goes to, and its share of the time."""

    name: str
    command: list[str]
    share: float


def steps(out: Path, minutes: float, *, dry_run: bool) -> list[Step]:
    """The commands, the most telling first."""
    python = sys.executable
    device = "cpu" if dry_run else "cuda"
    tests = [python, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "--durations=5"]
    tests.append(str(REPOSITORY / "tests" / "gpu") if dry_run else str(REPOSITORY / "tests"))
    rows = [python, "-m", "tests.gpu.row_times", "--device", device]
    rows += ["--json", str(out / "rows.json"), *(["--tiny"] if dry_run else [])]
    small = ["--device", device, *(["--tiny"] if dry_run else [])]
    budgets = [python, "-m", "benchmarks.budgets", *small, "--json", str(out / "budgets.json")]
    models = [python, "-m", "benchmarks.model_step", *small, "--json", str(out / "models.json")]
    budgets += ["--seconds", f"{60 * 0.2 * minutes:.0f}"]
    models += ["--seconds", f"{60 * 0.15 * minutes:.0f}"]
    chosen = [Step("tests", tests, 0.22), Step("budgets", budgets, 0.22)]
    chosen += [Step("models", models, 0.18), Step("rows", rows, 0.1)]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is not None and not dry_run:
        some = [python, "-m", "pytest", "-p", "no:cacheprovider", "tests/gpu", "-k", SANITIZED]
        chosen.append(Step("sanitizer", [sanitizer, "--error-exitcode", "9", *some], 0.1))
    if not dry_run:
        benchmarks = [python, "-m", "benchmarks.run", "--device", "cuda"]
        benchmarks += ["--minutes", f"{0.16 * minutes:.1f}", "--results", str(out)]
        chosen.append(Step("benchmarks", benchmarks, 0.18))
    return chosen


def run(step: Step, out: Path, seconds: float, environment: dict[str, str]) -> dict[str, object]:
    """Runs a step for at most so many seconds; its output goes to a file of its name."""
    start = time.perf_counter()
    with (out / f"{step.name}.txt").open("w") as log:
        try:
            code = subprocess.run(
                step.command, cwd=REPOSITORY, env=environment, stdout=log,
                stderr=subprocess.STDOUT, timeout=seconds,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            code = 124
    spent = time.perf_counter() - start
    tail = (out / f"{step.name}.txt").read_text()[-1500:]
    sys.stdout.write(f"== {step.name}: exit {code} after {spent:.0f} s\n{tail}\n")
    sys.stdout.flush()
    return {"step": step.name, "exit": code, "seconds": round(spent, 1)}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "ORPO_KERNELS_DRY_RUN": "1" if args.dry_run else "0"}
    done = []
    for step in steps(out, args.minutes, dry_run=args.dry_run):
        done.append(run(step, out, 60 * args.minutes * step.share, environment))
        (out / "session.json").write_text(json.dumps(done, indent=1))
    sys.stdout.write((out / "budgets.txt").read_text())
    return int(any(each["exit"] != 0 for each in done))


if __name__ == "__main__":
    sys.exit(main())
