"""Write docs/benchmarks.md, its pictures and the README's numbers from the newest JSON per machine.

    python -m benchmarks.report             # docs/benchmarks.md and docs/benchmarks/*.png
    python -m benchmarks.report --readme    # and what stands between the markers of README.md

In the README, `<!-- bench:begin NAME -->` ... `<!-- bench:end -->` are filled; NAME is one of
`BLOCKS`.
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.cases import SWEEP
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.results import FOLDER, OURS, Result, Run, behind, is_ours, latest_runs, ratio

ROOT = Path(__file__).parent.parent
DOCUMENT = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
MARKERS = re.compile(r"(<!-- bench:begin (?P<name>[\w-]+) -->\n).*?(<!-- bench:end -->)", re.DOTALL)
MIB = 1 << 20

HOW_TO_READ = """\
Every number here is in a JSON file of `benchmarks/results/`, made by the command beside it; this
page is written by `python -m benchmarks.report`.

- **g** is the bare GEMM `hidden @ weight.T` of the same scored rows, dtype and device. Every timed
  round runs between two g and is divided by their mean; tables give medians, and the IQR after ±.
- **N** scored tokens: chosen prompt and answer, rejected answer. `N / 2PT` is their share of the
  padded batch, with the lengths of real preference pairs. Implementations of a per-token primitive
  get the scored rows; implementations of the whole loss (TRL ORPO, Liger) get the padded batch, as
  their users do, and so does TRL's `add_fused_lm_head`, which on a CPU computes all of it.
- **passes**: matrix products counted while it runs, in units of 2·N·V·H FLOP.
- **peak** is over the inputs and includes the gradients, in a process of its own (CPU: resident
  memory).
- **error**: relative error of dhidden against the float64 reference on the same rounded inputs,
  checked at full size before timing. *over* marks a peer outside the limits we set ourselves.
- Whole steps of models are timed by `python -m benchmarks.model_step` (one pair, by loss: TRL's,
  ours by budget, with the prompt once, with `activation_offload`) and by
  `python -m benchmarks.layout_steps` (pairs of real lengths, by layout), in turns: a time is
  divided by the mean of TRL's turns before and after it. They are in README and docs/layouts.md.
- *trained-like* logits have the sparsity of real text, *flat* ones none
  (`benchmarks/workloads.py`). An implementation whose time cannot depend on the logits is measured
  on trained-like ones only. Sparse rows take the default `eps`: before 2026-11-26 2^-12 for every
  head, since then less for a frozen one of more than 24,576 entries (docs/sparse.md).
"""


def main(arguments: list[str] | None = None) -> int:
    """Returns 0; 1 when there is no JSON to report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument(
        "--readme", action="store_true", help="fill the markers of README.md as well"
    )
    parser.add_argument(
        "--results", default=str(FOLDER), help="folder of the <machine>/<date>.json"
    )
    parser.add_argument("--output", default=str(DOCUMENT), help="the page; pictures go beside it")
    options = parser.parse_args(arguments)
    runs = latest_runs(Path(options.results))
    if not runs:
        print("no results yet: run `make bench` first")
        return 1
    page = Path(options.output)
    page.parent.mkdir(parents=True, exist_ok=True)
    pictures = {run.slug: plots.draw_all(run, page.with_suffix("")) for run in runs}
    page.write_text(render_page(runs, pictures, page.parent))
    if options.readme:
        README.write_text(fill_markers(README.read_text(), runs))
    return 0


def render_page(runs: list[Run], pictures: dict[str, list[tuple[str, Path]]], folder: Path) -> str:
    """The whole of docs/benchmarks.md."""
    parts = ["# Benchmarks", HOW_TO_READ]
    if all(run.device != "cuda" for run in runs):
        parts.append(
            "This race has not been run on a GPU (`make bench-gpu` writes its tables here); what "
            "was measured on one is in README and `benchmarks/results/nvidia-h200/`."
        )
    for run in runs:
        parts += [_machine(run), "### Where a peer is faster or leaner", peers_ahead(run)]
        for caption, path in pictures.get(run.slug, []):
            parts.append(f"![{caption}]({path.relative_to(folder).as_posix()})\n\n*{caption}.*")
        parts.append("### Tables")
        parts += [_group(run, group) for group in run.groups()]
        if run.sweep():
            parts += ["### Peak memory, one pair, frozen head", _sweep(run)]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _machine(run: Run) -> str:
    about = run.header["machine"]
    name = _name(about)
    versions = ", ".join(f"{key} {value}" for key, value in run.header["versions"].items())
    missing = run.header.get("missing", [])
    lines = [
        f"## {name}",
        f"{run.header['date']}, commit `{run.header['commit'] or 'none'}`, {_source(run)}",
        f"{versions}; Python {about['python']}, {about['capability']}"
        + (", bf16 dot products" if about.get("bf16") else "")
        + (", AMX" if about.get("amx") else "")
        + ".",
    ]
    commits = [each["commit"] for each in run.results if "commit" in each]
    for commit in dict.fromkeys(commits):
        lines.append(f"{commits.count(commit)} rows were measured at commit `{commit}`.")
    if run.header.get("clock") == "cpu":
        lines.append("Times are processor time: others used the machine meanwhile.")
    if missing:
        lines.append(f"Not run, for lack of time: {len(missing)} rows.")
    return "\n\n".join(lines)


def peers_ahead(run: Run) -> str:
    """One line per table and measure in which peers beat our default."""
    lines = []
    for place in behind(run):
        shown = _peak if place.what == "leaner" else _g
        peers = ", ".join(f"**{_title(row)}** {shown(row)}" for row in place.peers)
        line = f"- {_describe(place.default)}, {place.what} than our {shown(place.default)}"
        if place.best is not place.default:
            line += f" ({_title(place.best)}: {shown(place.best)})"
        lines.append(f"{line}: {peers}.")
    return "\n".join(lines) or "Nowhere in the tables below."


def _describe(row: Result) -> str:
    if row["head"] == SWEEP:
        return f"memory sweep, V {row['V']:,}, T {row['T']:,}"
    pairs = f"{row['pairs']} pair{'s' if row['pairs'] > 1 else ''}"
    work = "evaluation" if row["mode"] == "eval" else f"{row['mode']} head"
    return f"`{row['head']}`, {work}, {row['logits']} logits, {pairs}, {row['dtype']}".replace(
        "trained logits", "trained-like logits"
    )


def _group(run: Run, group: str) -> str:
    rows = run.table(group)
    first = rows[0]
    head = (
        f"#### {_describe(first)}\n\nH {first['H']:,}, V {first['V']:,}, N {first['N']:,}, "
        f"T {first['T']:,}, "
        f"N / 2PT {first['scored_share']}, columns kept per 64 rows at 2^-12 "
        f"{100 * first['kept_share_64']:.1f} %, g {first['gemm_ms']['median']:,} ms."
    )
    table = ["| | ms | g | passes | peak MiB | error |", "|---|---|---|---|---|---|"]
    for row in rows:
        title = f"**{_title(row)}**" if is_ours(row) else _title(row)
        table.append(
            f"| {title} | {row['time_ms']['median']:,.4g} "
            f"| {_g(row)} ± {row['ratio_to_gemm']['iqr']:.2f} "
            f"| {_passes(row)} | {_peak(row)} | {_error(row)} |"
        )
    absent = [f"{_title(row)}: {row.get('skipped') or row['failed']}." for row in run.absent(group)]
    return "\n\n".join([head, "\n".join(table), *([" ".join(absent)] if absent else [])])


def _sweep(run: Run) -> str:
    points = run.sweep()
    sizes = sorted({(each["V"], each["T"]) for each in points})
    header = " | ".join(f"V {vocab:,}, T {length:,}" for vocab, length in sizes)
    lines = [f"| MiB over the inputs | {header} |", "|---" * (len(sizes) + 1) + "|"]
    for name in IMPLEMENTATIONS:
        peaks = {
            (each["V"], each["T"]): each["peak_bytes"] / MIB
            for each in points
            if each["implementation"] == name
        }
        if peaks:
            cells = " | ".join(f"{peaks[size]:,.0f}" if size in peaks else "-" for size in sizes)
            title = IMPLEMENTATIONS[name].title
            lines.append(
                f"| {'**' + title + '**' if name.startswith('ours-') else title} | {cells} |"
            )
    lines.append(f"\nFrozen head, flat logits, H {points[0]['H']:,}.")
    return "\n".join(lines)


def _title(row: Result) -> str:
    return IMPLEMENTATIONS[row["implementation"]].title


def _g(row: Result) -> str:
    return f"{ratio(row):.2f} g"


def _passes(row: Result) -> str:
    return "-" if row.get("gemm_passes") is None else f"{row['gemm_passes']:.2f}"


def _peak(row: Result) -> str:
    return f"{row['peak_bytes'] / MIB:,.0f} MiB" if "peak_bytes" in row else "-"


def _error(row: Result) -> str:
    name = "dhidden" if "dhidden" in row["errors"] else "loss"
    over = "" if row["accurate"] else ", *over*"
    return f"{row['errors'][name]:.1e}{' (loss)' if name == 'loss' else ''}{over}"


def _overview(run: Run) -> str:
    """Implementations × modes on the machine's main head: time and peak."""
    cases = plots.main_cases(run)
    modes = [
        mode for mode in ("frozen", "trainable", "eval") if any(c["mode"] == mode for c in cases)
    ]
    columns = " | ".join(f"{mode}, time | peak" for mode in modes)
    lines = [f"| | {columns} |", "|---" * (2 * len(modes) + 1) + "|"]
    for name, implementation in IMPLEMENTATIONS.items():
        found = {each["mode"]: each for each in cases if each["implementation"] == name}
        if not found:
            continue
        cells = []
        for mode in modes:
            row = found.get(mode)
            cells += [_g(row), _peak(row)] if row else ["-", "-"]
        title = implementation.title
        shown = f"**{title}**" if name.startswith("ours-") else title
        lines.append(f"| {shown} | {' | '.join(cells)} |")
    first = cases[0]
    lines.append(
        f"\nHead `{first['head']}`: H {first['H']:,}, V {first['V']:,}, one pair, "
        f"N {first['N']:,} scored tokens, bf16, trained-like logits. {_where(run)}"
    )
    return "\n".join(lines)


def _where(run: Run) -> str:
    clock = ", processor time" if run.header.get("clock") == "cpu" else ""
    return f"{_name(run.header['machine'])}{clock}; {_source(run)}"


def _name(about: dict[str, Any]) -> str:
    threads = f"{about['threads']} thread{'s' if about['threads'] > 1 else ''}"
    return about.get("gpu") or f"{about['cpu']}, {threads}"


def _source(run: Run) -> str:
    return f"`{run.header['command']}`, `benchmarks/results/{run.slug}/{run.path.name}`."


def _memory_block(run: Run) -> str:
    return f"{_sweep(run)} One pair. {_where(run)}"


def _headline(run: Run) -> str:
    """One sentence: our default against the best peer, per mode, on the main head."""
    parts = []
    for group in dict.fromkeys(each["case"] for each in plots.main_cases(run)):
        ours = run.find(group, OURS)
        peers = [row for row in run.table(group) if not is_ours(row)]
        if ours is not None and peers:
            parts.append(
                f"{ours['mode']}: {_g(ours)}, the best peer ({_title(peers[0])}) {_g(peers[0])}"
            )
    return "; ".join(parts) + "."


BLOCKS: dict[str, tuple[str, Callable[[Run], str]]] = {
    "cpu-loss": ("cpu", _overview),
    "cpu-memory": ("cpu", _memory_block),
    "cpu-headline": ("cpu", _headline),
    "gpu-loss": ("cuda", _overview),
    "gpu-memory": ("cuda", _memory_block),
    "gpu-headline": ("cuda", _headline),
}


def render_block(name: str, runs: list[Run]) -> str:
    """What stands between the markers `name`.

    Raises:
        ValueError: there is no such block.
    """
    if name not in BLOCKS:
        raise ValueError(f"bench block must be one of {sorted(BLOCKS)}, got {name!r}")
    device, render = BLOCKS[name]
    found = [run for run in runs if run.device == device and run.timed()]
    if found:
        return render(max(found, key=lambda run: str(run.header["date"])))
    return f"Not measured on a {'GPU' if device == 'cuda' else 'CPU'} yet."


def fill_markers(text: str, runs: list[Run]) -> str:
    """`text` with every marked part written anew."""
    return MARKERS.sub(
        lambda found: f"{found[1]}{render_block(found['name'], runs)}\n{found[3]}", text
    )


if __name__ == "__main__":
    raise SystemExit(main())
