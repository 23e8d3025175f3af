"""Reading what `run.py` wrote: the newest full JSON of every machine, and selections from it."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import SWEEP

FOLDER = Path(__file__).parent / "results"
OURS = "ours-exact"  # what a user gets without asking
Result = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One JSON: where it was measured and what came out."""

    slug: str
    path: Path
    header: dict[str, Any]
    results: tuple[Result, ...]

    @property
    def device(self) -> str:
        """ "cpu" or "cuda"."""
        return str(self.header["device"])

    def groups(self) -> list[str]:
        """Names of the tables of times, in the order they were run."""
        return list(dict.fromkeys(each["case"] for each in self.timed()))

    def timed(self) -> list[Result]:
        """Results with a time."""
        return [each for each in self.results if "ratio_to_gemm" in each]

    def table(self, group: str) -> list[Result]:
        """Timed results of a group, fastest first."""
        rows = [each for each in self.timed() if each["case"] == group]
        return sorted(rows, key=lambda each: each["ratio_to_gemm"]["median"])

    def absent(self, group: str) -> list[Result]:
        """Skipped and failed implementations of a group."""
        return [
            each
            for each in self.results
            if each["case"] == group and ("skipped" in each or "failed" in each)
        ]

    def sweep(self) -> list[Result]:
        """Peaks of the memory sweep."""
        return [each for each in self.results if each.get("head") == SWEEP and "peak_bytes" in each]

    def find(self, group: str, implementation: str) -> Result | None:
        """One timed result."""
        for each in self.table(group):
            if each["implementation"] == implementation:
                return each
        return None


def load_run(path: Path) -> Run:
    """The run in one JSON file."""
    content = json.loads(path.read_text())
    results = tuple(content.pop("results"))
    return Run(path.parent.name, path, content, results)


def latest_runs(folder: Path = FOLDER) -> list[Run]:
    """The newest full run of every machine, GPUs first."""
    runs = []
    for machine in sorted(folder.iterdir()) if folder.exists() else []:
        files = sorted(path for path in machine.glob("*.json") if is_full(path))
        if files:
            runs.append(load_run(files[-1]))
    return sorted(runs, key=lambda run: (run.device != "cuda", run.slug))


def is_full(path: Path) -> bool:
    """Whether a JSON is of a whole run, whose name is its date, not of what is kept beside it."""
    return re.fullmatch(r"\d{4}-\d\d-\d\d", path.stem) is not None


def is_ours(result: Result) -> bool:
    """Whether the row is this package's."""
    return str(result["implementation"]).startswith("ours-")


def ratio(result: Result) -> float:
    """Median time in units of the bare GEMM."""
    return float(result["ratio_to_gemm"]["median"])


@dataclass(frozen=True)
class Behind:
    """A place where peers are "faster" or "leaner" (`what`) than our default."""

    what: str
    default: Result
    best: Result  # our best row there, which may be the default
    peers: tuple[Result, ...]


def behind(run: Run) -> Iterator[Behind]:
    """Every such place, table by table, then the points of the memory sweep."""
    for group in run.groups():
        rows = run.table(group)
        yield from _behind("faster", rows, ratio)
        yield from _behind("leaner", rows, peak)
    points = run.sweep()
    for case in dict.fromkeys(each["case"] for each in points):
        yield from _behind("leaner", [each for each in points if each["case"] == case], peak)


def _behind(
    what: str, rows: list[Result], measure: Callable[[Result], float | None]
) -> Iterator[Behind]:
    known = [(value, row) for row in rows if (value := measure(row)) is not None]
    defaults = [(value, row) for value, row in known if row["implementation"] == OURS]
    if not defaults:
        return
    limit, default = defaults[0]
    ahead = [row for value, row in sorted(known, key=_first) if value < limit and not is_ours(row)]
    best = min((each for each in known if is_ours(each[1])), key=_first)[1]
    if ahead:
        yield Behind(what, default, best, tuple(ahead))


def _first(pair: tuple[float, Result]) -> float:
    return pair[0]


def peak(result: Result) -> float | None:
    """Peak bytes over the inputs, where they were measured."""
    return result.get("peak_bytes")
