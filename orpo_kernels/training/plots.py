"""The pictures of a run; needs matplotlib (the `plot` extra)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Curves: TypeAlias = tuple[Sequence[Mapping[str, float]], Sequence[Mapping[str, float]]]

_BLUE, _RED, _GREY = "#1f6fb4", "#c8402f", "#555555"
_OF_PARTS = ("#8a8a8a", _BLUE, _RED, "#2f8f4e", "#c9c9c9")
_PANELS: tuple[tuple[str, str, tuple[tuple[str, str, str], ...]], ...] = (
    ("Loss", "nats", (("loss", "NLL + beta x odds-ratio loss", _GREY),)),
    ("NLL of the chosen sequence", "nats per token", (("nll_loss", "NLL", _GREY),)),
    ("Log odds ratio, chosen to rejected", "nats", (("log_odds_chosen", "log odds ratio", _GREY),)),
    (
        "Mean log-probability of the answers",
        "nats per token",
        (("logps/chosen", "chosen", _BLUE), ("logps/rejected", "rejected", _RED)),
    ),
    ("Reward margin", "beta x nats", (("rewards/margins", "chosen - rejected", _GREY),)),
    (
        "Reward accuracy",
        "share of pairs",
        (("rewards/accuracies", "chosen above rejected", _GREY),),
    ),
)


def report(run: Curves, path: Path) -> None:
    """Six panels over the steps of one run: lines while training, markers where evaluated.

    Args:
        run: (train, eval) of `report.curves`.
        path: the PNG to write.
    """
    figure, axes = _figure(3, 2)
    for ax, (title, unit, series) in zip(axes, _PANELS, strict=True):
        for key, label, colour in series:
            _line(ax, run, key, label, colour)
        _finish(ax, title, unit)
        if title == "Reward accuracy":
            ax.set_ylim(-0.03, 1.03)
            ax.axhline(0.5, color="#bbbbbb", linewidth=0.8, zorder=0)
    _save(figure, path)


def comparison(runs: Mapping[str, Curves], path: Path) -> None:
    """Chosen and rejected log-probs of several runs side by side, on one scale; then accuracies.

    Evaluations are drawn where a run has more than one, else its training values: an evaluation is
    always on the same pairs, a training batch never.

    Args:
        runs: name to (train, eval) of `report.curves`.
        path: the PNG to write.
    """
    figure, axes = _figure(len(runs) + 1, 1)
    for ax, (name, run) in zip(axes, runs.items(), strict=False):
        for key, label, colour in _PANELS[3][2]:
            _line(ax, _steadier(run), key, label, colour)
        _finish(ax, name, "mean log-probability, nats per token")
        ax.sharey(axes[0])
    last = axes[-1]
    for (name, run), colour in zip(runs.items(), (_BLUE, _RED, _GREY, "#2f8f4e") * 4, strict=False):
        _line(last, _steadier(run), "rewards/accuracies", name, colour)
    _finish(last, "Reward accuracy", "share of pairs with chosen above rejected")
    _save(figure, path)


def profile(runs: Mapping[str, Any], parts: Sequence[str], path: Path) -> None:
    """Time of a step, its parts one after the other, and the most memory in each of them.

    Args:
        runs: name to `profiling.Profile`.
        parts: its keys, in the order of their colours.
        path: the PNG to write.
    """
    figure, (times, memory) = _figure(2, 1)
    for row, run in enumerate(runs.values()):
        left = 0.0
        for number, (part, colour) in enumerate(zip(parts, _OF_PARTS, strict=True)):
            width = 1e3 * run.seconds[part]
            times.barh(row, width, left=left, color=colour, label=None if row else part)
            left += width
            height, place = 0.8 / len(parts), row - 0.4 + (number + 0.5) * 0.8 / len(parts)
            memory.barh(place, run.peak_bytes[part] / 2**20, height=height, color=colour)
    for ax, title, unit in ((times, "A step", "ms"), (memory, "Most memory in each part", "MiB")):
        ax.set_yticks(range(len(runs)), list(runs))
        ax.invert_yaxis()
        _finish(ax, title, "")
        ax.set_xlabel(unit, fontsize=8)
        ax.set_yticks(range(len(runs)), list(runs))  # which a locator of numbers has replaced
    times.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=3)
    _save(figure, path)


def _steadier(run: Curves) -> Curves:
    train, evaluations = run
    return ((), evaluations) if len(evaluations) > 1 else (train, ())


def _figure(columns: int, rows: int) -> tuple[Figure, list[Any]]:
    # Not pyplot: no global state, no window system.
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _line(ax: Any, run: Curves, key: str, label: str, colour: str) -> None:
    for entries, line, width in zip(run, ("-", "--"), (1.4, 1.0), strict=True):
        points = [(entry["step"], entry[key]) for entry in entries if key in entry]
        if not points:
            continue
        evaluated = entries is run[1]
        ax.plot(
            *zip(*points, strict=True),
            color=colour,
            linestyle="-" if evaluated and not run[0] else line,
            linewidth=width,
            marker="o" if evaluated else None,
            markersize=4,
            label=f"{label}, held out" if evaluated and run[0] else label,
        )


def _finish(ax: Any, title: str, unit: str) -> None:
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("step", fontsize=8)
    ax.set_ylabel(unit, fontsize=8)
    ax.tick_params(labelsize=8)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    ax.grid(color="#e6e6e6", linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize=7, frameon=False)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
