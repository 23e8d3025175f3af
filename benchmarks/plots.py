"""The pictures of docs/benchmarks.md, drawn from a run's JSON; each well under 200 KB."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.results import Result, Run, is_ours, ratio

DPI = 110
OURS_COLORS = ("#0b5394", "#3d85c6", "#9fc5e8", "#45b0c5")
PEER_COLORS = (
    "#b45f06",
    "#e69138",
    "#6aa84f",
    "#38761d",
    "#a64d79",
    "#741b47",
    "#7f6000",
    "#bf9000",
    "#999999",
)
MIB = 1 << 20


def colors() -> dict[str, str]:
    """One color per implementation, blue for ours, the same in every picture."""
    ours = [name for name in IMPLEMENTATIONS if name.startswith("ours-")]
    peers = [name for name in IMPLEMENTATIONS if name not in ours]
    return {
        **dict(zip(ours, OURS_COLORS, strict=True)),
        **dict(zip(peers, PEER_COLORS, strict=True)),
    }


def draw_all(run: Run, folder: Path) -> list[tuple[str, Path]]:
    """Writes every picture of a run that it has data for; returns (caption, file)."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures: list[tuple[str, Path]] = []
    main = main_head(run)
    modes = {each["mode"]: each["case"] for each in reversed(main_cases(run))}
    if modes:
        path = folder / f"{run.slug}-time.png"
        draw_times(
            run, [modes[mode] for mode in ("frozen", "trainable", "eval") if mode in modes], path
        )
        pictures.append(
            (f"Time over the bare GEMM, head `{main}`, one pair, trained-like logits", path)
        )
    heads = [group for group in run.groups() if " frozen trained P1 bfloat16" in group]
    if len(heads) > 1:
        path = folder / f"{run.slug}-heads.png"
        draw_heads(run, heads, path)
        pictures.append(("Time over the bare GEMM, frozen head, by model", path))
    for key, fixed, what in (("T", "V", "sequence length T"), ("V", "T", "vocabulary V")):
        points = sweep_along(run, key, fixed)
        if len({each[key] for each in points}) > 1:
            path = folder / f"{run.slug}-memory-{key.lower()}.png"
            draw_memory(points, key, what, path)
            caption = f"Peak memory over the inputs against {what}, {fixed} = {points[0][fixed]:,}"
            pictures.append((caption, path))
    return pictures


def main_head(run: Run) -> str:
    """The head of a machine's first table."""
    timed = run.timed()
    return str(timed[0]["head"]) if timed else ""


def main_cases(run: Run) -> list[Result]:
    """Timed results of the main head: one pair, trained-like logits, bf16."""
    head = main_head(run)
    wanted = {"head": head, "logits": "trained", "pairs": 1, "dtype": "bfloat16"}
    return [each for each in run.timed() if all(each[key] == wanted[key] for key in wanted)]


def sweep_along(run: Run, key: str, fixed: str) -> list[Result]:
    """Points of the memory sweep in which only `key` varies."""
    points = run.sweep()
    if not points:
        return []
    base = min(each[fixed] for each in points)
    return [each for each in points if each[fixed] == base]


def draw_times(run: Run, groups: list[str], path: Path) -> None:
    """One panel per group: a bar per implementation, its IQR, its number."""
    figure, axes = plt.subplots(1, len(groups), figsize=(4.2 * len(groups), 3.6), squeeze=False)
    palette = colors()
    for axis, group in zip(axes[0], groups, strict=True):
        rows = run.table(group)[::-1]
        values = [ratio(row) for row in rows]
        spread = [row["ratio_to_gemm"]["iqr"] / 2 for row in rows]
        names = [IMPLEMENTATIONS[row["implementation"]].title for row in rows]
        fill = [palette[row["implementation"]] for row in rows]
        bars = axis.barh(names, values, xerr=spread, color=fill, error_kw={"linewidth": 0.8})
        axis.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=8)
        axis.set_xlim(0, 1.18 * max(map(sum, zip(values, spread, strict=True))))
        axis.set_title(rows[0]["mode"], fontsize=10)
        axis.set_xlabel("time / bare GEMM", fontsize=8)
        axis.tick_params(labelsize=8)
    _save(figure, path)


def draw_heads(run: Run, groups: list[str], path: Path) -> None:
    """Grouped bars: heads along x, implementations side by side."""
    figure, axis = plt.subplots(figsize=(1.3 * len(groups) + 3, 3.6))
    palette = colors()
    present = {row["implementation"] for group in groups for row in run.table(group)}
    names = [name for name in IMPLEMENTATIONS if name in present]
    width = 0.85 / len(names)
    for offset, name in enumerate(names):
        found = [run.find(group, name) for group in groups]
        pairs = [(i + offset * width, ratio(row)) for i, row in enumerate(found) if row is not None]
        places, values = zip(*pairs, strict=True)
        axis.bar(places, values, width, color=palette[name], label=IMPLEMENTATIONS[name].title)
    axis.set_xticks([i + 0.4 for i in range(len(groups))])
    axis.set_xticklabels([group.split()[0] for group in groups], fontsize=8, rotation=20)
    axis.set_ylabel("time / bare GEMM", fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, path)


def draw_memory(points: list[Result], key: str, what: str, path: Path) -> None:
    """A line per implementation, both axes logarithmic: a flat line is a bounded workspace."""
    figure, axis = plt.subplots(figsize=(8, 3.8))
    palette = colors()
    for name in IMPLEMENTATIONS:
        mine = [each for each in points if each["implementation"] == name]
        line = sorted((each[key], max(each["peak_bytes"], 1) / MIB) for each in mine)
        if line:
            xs, ys = zip(*line, strict=True)
            style = "-o" if is_ours({"implementation": name}) else "--s"
            axis.plot(
                xs, ys, style, color=palette[name], label=IMPLEMENTATIONS[name].title, markersize=4
            )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    ticks = sorted({each[key] for each in points})
    axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_xlabel(what, fontsize=8)
    axis.set_ylabel("peak MiB over the inputs", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(visible=True, linewidth=0.3)
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    # No date, no version: the same JSON gives the same file.
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    plt.close(figure)
