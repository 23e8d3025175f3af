"""Everything a rented GPU is for, in one call: correctness, the table of budgets, then the rest.

    python -m tests.gpu.session --out DIR [--minutes 9]
    python -m tests.gpu.session --out DIR --dry-run         # on a CPU, tiny: shows that it runs

`make gpu-session` is this in the environment that `make setup` makes; where there is no network,
call it with the Python that is there. Each step has its share of the minutes, and what earlier ones
left of theirs, and writes its own file as it goes, so that a session that is cut short keeps what
was done. The first three are what a session must bring, in its first four minutes: the tests, the
table of budgets (`benchmarks/budgets.py`: ours and the peers, launches, the kernels' sum) and that
of eps (`benchmarks/sparse_times.py`: time and error, float32 and 16-bit logits). Then come the
self-test, with nothing compiled and with all, and whole steps. A step whose libraries are missing
is left out, by name; peers that are missing are named in the tables. At the end come both tables
once more, and last the tests that failed. Exits with 1 when a step failed; `session.json` says
which.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
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

WORKERS = "14"  # of a host with sixteen cores


class Step(NamedTuple):
    """A command, the file its output goes to, its share of the time, and what it imports."""

    name: str
    command: list[str]
    share: float
    needs: tuple[str, ...] = ()

    def missing(self) -> list[str]:
        """Libraries it needs that are not installed."""
        return [each for each in self.needs if importlib.util.find_spec(each) is None]


def steps(out: Path, minutes: float, *, dry_run: bool) -> list[Step]:
    """The commands, the most telling first."""
    python = sys.executable
    device = "cpu" if dry_run else "cuda"
    small = ["--device", device, *(["--tiny"] if dry_run else [])]

    def script(name: str, share: float, file: str, *more: str) -> list[str]:
        # What starts nothing new after nine tenths of its time ends by itself.
        seconds = ["--seconds", f"{54 * share * minutes:.0f}"]
        return [python, "-m", name, *small, "--json", str(out / file), *seconds, *more]

    def timed(name: str, file: str) -> list[str]:
        return [python, "-m", f"tests.gpu.{name}", *small, "--json", str(out / file)]

    sparse, whole = "benchmarks.sparse_times", ("peft", "transformers")
    chosen = [
        Step("tests", _tests(dry_run=dry_run), 0.2),
        Step("budgets", script("benchmarks.budgets", 0.18, "budgets.json"), 0.18),
        Step("eps", script(sparse, 0.06, "eps.json", "--only", "eps"), 0.06),
        Step("selftest", timed("self_times", "selftest.json"), 0.07),
        Step("sparse", script(sparse, 0.11, "sparse.json", "--but", "eps"), 0.11),
        Step("models", script("benchmarks.model_step", 0.12, "models.json"), 0.12, whole),
    ]
    rows = Step("rows", timed("row_times", "rows.json"), 0.07)
    if dry_run:  # of the two of one script, one
        return [*(step for step in chosen if step.name != "sparse"), rows]
    layouts = [python, "-m", "benchmarks.layout_steps", "--device", "cuda", "--pairs", "1", "2"]
    layouts += ["--minutes", f"{0.1 * minutes:.2f}", "--json", str(out / "layouts.json")]
    needs = (*whole, "trl", "datasets", "accelerate")
    chosen += [Step("layouts", layouts, 0.11, needs), rows]
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is not None:
        some = [python, "-m", "pytest", "-p", "no:cacheprovider", "tests/gpu", "-k", SANITIZED]
        chosen.append(Step("sanitizer", [sanitizer, "--error-exitcode", "9", *some], 0.08))
    return chosen


def _tests(*, dry_run: bool) -> list[str]:
    """A line for every test as it ends, which a time limit does not take away."""
    tests = [sys.executable, "-m", "pytest", "-m", "gpu", "-vv", "--tb=short", "--durations=5"]
    tests += ["-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
    tests += ["--continue-on-collection-errors"]
    if not dry_run and importlib.util.find_spec("xdist") is not None:
        # Kernels are compiled side by side, the long tests first, the next one where one ends.
        tests += ["-n", WORKERS, "--maxschedchunk", "1"]
    return [*tests, "tests/gpu"]


def failing(log: str) -> list[str]:
    """Names of the tests that failed or ended in an error, and of those that did not end."""
    name, outcome = r"(tests/\S+?\.py(?:::.+?)?)", "(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)"
    begun, ended = dict[str, str](), dict[str, str]()
    for line in log.splitlines():
        if found := re.match(rf"{name} {outcome}\b", line):  # of one process
            ended.setdefault(found[1], found[2])
        elif found := re.search(
            rf"\b{outcome} +{name} *(?: - .*)?$", line
        ):  # of workers; the summary
            ended.setdefault(found[2], found[1])
        elif found := re.fullmatch(rf"{name} *", line):
            begun[found[1]] = "still running"
    wrong = [test for test, how in ended.items() if how in ("FAILED", "ERROR")]
    return wrong + [f"{test} ({how})" for test, how in begun.items() if test not in ended]


def run(step: Step, out: Path, seconds: float, environment: dict[str, str]) -> dict[str, object]:
    """Runs a step for at most so many seconds; its output goes to a file of its name."""
    path, missing = out / f"{step.name}.txt", step.missing()
    if missing:
        path.write_text(f"{step.name}: left out, not installed: {', '.join(missing)}\n")
        sys.stdout.write(path.read_text())
        return {"step": step.name, "exit": 0, "seconds": 0.0, "missing": missing}
    start = time.perf_counter()
    with path.open("w") as log:
        process = subprocess.Popen(
            step.command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = 124
            os.killpg(process.pid, signal.SIGKILL)  # its workers too, which hold the card
            process.wait()
    spent = time.perf_counter() - start
    sys.stdout.write(f"== {step.name}: exit {code} after {spent:.0f} s\n")
    sys.stdout.write(f"{path.read_text()[-1500:]}\n")
    sys.stdout.flush()
    return {"step": step.name, "exit": code, "seconds": round(spent, 1)}


def summary(out: Path, code: object) -> str:
    """The two tables, and last of all the tests that failed, and how all of them ended."""
    eps = (out / "eps.txt").read_text().splitlines()
    wrong = failing((out / "tests.txt").read_text())
    names = "".join(f"\n  {name}" for name in wrong) or " none"
    table = "\n".join(line for line in eps if not line.startswith(" "))
    tests = f"Tests ended with {code}; failed:{names}"
    return f"{(out / 'budgets.txt').read_text()}{table}\n{tests}\n"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    # What a step has printed is in its file, however it ends.
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    environment["ORPO_KERNELS_DRY_RUN"] = "1" if args.dry_run else "0"
    done, begin, until = [], time.perf_counter(), 0.0
    for step in steps(out, args.minutes, dry_run=args.dry_run):
        until += 60 * args.minutes * step.share
        seconds = max(1.0, until - (time.perf_counter() - begin))
        done.append(run(step, out, seconds, environment))
        (out / "session.json").write_text(json.dumps(done, indent=1))
    sys.stdout.write(summary(out, done[0]["exit"]))
    return int(any(each["exit"] != 0 for each in done))


if __name__ == "__main__":
    sys.exit(main())
