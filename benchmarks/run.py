"""Run the benchmarks and write `benchmarks/results/<machine>/<date>.json`: `make bench`.

    python -m benchmarks.run                              # this machine, within 15 minutes
    python -m benchmarks.run --device cuda --minutes 9    # make bench-gpu
    python -m benchmarks.run --again ours-sparse          # the peers stay as they were measured
    python -m benchmarks.run --threads 1 --clock cpu      # where others use the processor too
    python -m benchmarks.run --plan cuda --device cpu --tiny --results DIR    # a dry run of it

Every result is written to a record as it comes. A run that is stopped, by its own deadline or by
anything else, goes on where it was when the same command is given again, until the commit or a
version changes; `--groups` runs part of the plan (a pytest -k expression). `--again` starts from
the newest JSON and measures some implementations anew: every other result keeps the commit it was
measured at. The JSON is written in any case and names what is missing.
"""

import argparse
import datetime
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, settings
from benchmarks.cases import label, memory_sweep, planned
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.results import is_full, load_run

ROOT = Path(__file__).parent
# On a CPU the memory sweep takes two minutes of fifteen and comes first, so that it is not what a
# deadline cuts off; on a GPU the times of the main head are what the lease is for.
SUITES = {
    "cpu": ("test_bench_memory.py", "test_bench_loss.py"),
    "cuda": ("test_bench_loss.py", "test_bench_memory.py"),
}
RESERVE_S = 20  # the last test that is started must also end


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0: everything that ran is right; 1: a test failed, the JSON says which."""
    options = _parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device or settings.device()
    folder = Path(options.results).resolve() / machine.slug(device)
    folder.mkdir(parents=True, exist_ok=True)
    header = _header(device, options)
    record = folder / ("tiny.jsonl" if options.tiny else f"{device}.jsonl")
    if options.fresh or options.tiny or not _continues(record, header):
        kept = _others(folder, header, options.again) if options.again else []
        record.write_text("".join(json.dumps(each) + "\n" for each in kept))
        _header_path(record).write_text(json.dumps(header))
    code = _pytest(device, options, record)
    results = [json.loads(line) for line in record.read_text().splitlines() if line]
    path = write_results(folder, header, results)
    missing = _missing(device, results)
    print(f"{len(results)} results in {path}")
    if missing and not options.tiny:
        print(f"{len(missing)} not run yet; give the same command again to go on")
    else:
        record.unlink()
        _header_path(record).unlink()
    return code


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument(
        "--plan", choices=("cpu", "cuda"), help="whose cases; default: the device's"
    )
    parser.add_argument("--minutes", type=float, default=15.0, help="start nothing new after this")
    parser.add_argument("--groups", help="pytest -k expression, e.g. 'llama-3-8b and frozen'")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument(
        "--again", nargs="+", choices=list(IMPLEMENTATIONS), metavar="NAME", default=[],
        help="implementations to measure anew; the others come from the newest JSON",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, help="of a CPU; default: as torch chooses")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="of a CPU; cpu: processor time, which others on a shared machine do not lengthen",
    )  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="forget what a stopped run has done")
    parser.add_argument("--results", default=str(ROOT / "results"), help="where <machine>/ is made")
    return parser.parse_args(arguments)


def _header(device: str, options: argparse.Namespace) -> dict[str, Any]:
    words = [
        "python",
        "-m",
        "benchmarks.run",
        "--device",
        device,
        "--minutes",
        f"{options.minutes:g}",
    ]
    words += ["--tiny"] if options.tiny else []
    words += ["--groups", options.groups] if options.groups else []
    words += ["--threads", str(options.threads)] if options.threads else []
    words += ["--clock", options.clock] if options.clock != "wall" else []
    words += ["--again", *options.again] if options.again else []
    return {
        "schema": 1,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": machine.describe(device),
        "device": device,
        "command": os.environ.get(machine.COMMAND) or shlex.join(words),
        "commit": machine.commit(),
        "versions": machine.versions(),
        "sizes": "tiny" if options.tiny else "full",
        "clock": options.clock,
    }


def _header_path(record: Path) -> Path:
    return record.with_suffix(".header.json")


def _continues(record: Path, header: dict[str, Any]) -> bool:
    """Whether the record is of the same code, versions and machine."""
    if not record.exists() or not _header_path(record).exists():
        return False
    before = json.loads(_header_path(record).read_text())
    same = ("commit", "versions", "machine", "sizes", "clock")
    return all(before.get(key) == header[key] for key in same)


def _others(folder: Path, header: dict[str, Any], again: list[str]) -> list[dict[str, Any]]:
    """Results of the newest JSON of this device but those of `again`, with their commits."""
    runs = [load_run(path) for path in sorted(folder.glob("*.json")) if is_full(path)]
    runs = [run for run in runs if run.device == header["device"]]
    if not runs:
        raise SystemExit(f"--again needs a JSON to start from, and {folder} has none")
    before = runs[-1].header
    before = {"clock": "wall", **before}  # older runs know no other
    same = ("versions", "machine", "sizes", "clock")
    changed = [key for key in same if before[key] != header[key]]
    if changed:
        raise SystemExit(f"--again: {', '.join(changed)} changed since {runs[-1].path.name}")
    return [
        {**each, "commit": each.get("commit", before["commit"])}
        for each in runs[-1].results
        if each["implementation"] not in again
    ]


def _pytest(device: str, options: argparse.Namespace, record: Path) -> int:
    environment = {
        **os.environ,
        settings.DEVICE: device,
        settings.PLAN: options.plan or device,
        settings.RECORD: str(record),
        settings.TINY: "1" if options.tiny else "0",
        settings.CLOCK: options.clock,
        settings.DEADLINE: str(time.time() + 60 * options.minutes - RESERVE_S),
        "HF_HUB_OFFLINE": "1",
    }
    if options.threads:
        environment["OMP_NUM_THREADS"] = str(options.threads)
    words = [sys.executable, "-m", "pytest", *(str(ROOT / suite) for suite in SUITES[device])]
    words += ["--benchmark-only", "--benchmark-columns=median,iqr,rounds", "-q", "-p", "no:xdist"]
    words += ["-k", options.groups] if options.groups else []
    code = subprocess.run(words, env=environment, check=False, cwd=ROOT.parent).returncode
    return 0 if code == 5 else code  # 5: everything was deselected or skipped


def _missing(device: str, results: list[dict[str, Any]]) -> list[str]:
    done = {(each["case"], each["implementation"]) for each in results}
    plan = planned(device) + memory_sweep(device)
    return [f"{label(case)}, {name}" for case, name in plan if (label(case), name) not in done]


def write_results(folder: Path, header: dict[str, Any], results: list[dict[str, Any]]) -> Path:
    """One JSON file, one line per result, so that two dates can be compared as text."""
    suffix = "-tiny" if header["sizes"] == "tiny" else ""
    path = folder / f"{header['date']}{suffix}.json"
    missing = [] if suffix else _missing(header["device"], results)
    fields = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in header.items()]
    fields.append(f' "missing": {json.dumps(missing)}')
    lines = ",\n".join("  " + json.dumps(each) for each in results)
    fields.append(f' "results": [\n{lines}\n ]')
    path.write_text("{\n" + ",\n".join(fields) + "\n}\n")
    return path


if __name__ == "__main__":
    raise SystemExit(main())
