"""What a run leaves for its owner: numbers as JSON, a table, and a picture of how it went.

Everything is read from the log history that Trainer writes to `trainer_state.json`, so a report can
be drawn again later (`orpo-kernels report FOLDER`), also of several runs side by side.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

METRICS_FILE = "metrics.json"
STATE_FILE = "trainer_state.json"
PLOT_FILE = "report.png"

TABLE_METRICS = (
    "loss",
    "nll_loss",
    "log_odds_chosen",
    "logps/chosen",
    "logps/rejected",
    "rewards/accuracies",
    "rewards/margins",
)
_BYTES_PER_GIB = 2**30

Log = Mapping[str, float]


def collect(
    state: Any, train_metrics: Mapping[str, float], seconds: float, device: torch.device
) -> dict[str, Any]:
    """The numbers of a finished run.

    Args:
        state: `trainer.state`.
        train_metrics: of `trainer.train()`.
        seconds: wall time from the start of training to the end of the last evaluation.
        device: the run's.

    Returns:
        "steps", "epochs", "wall_seconds", "train_tokens_per_second" (both answers' sequences
        without padding, over the time `trainer.train()` took, evaluations included), "device",
        "peak_gpu_bytes" or "peak_rss_bytes" (of this process, from its start); and "train",
        "eval_first", "eval_last": the last values logged and the first and last evaluation,
        without prefix, with their "step".
    """
    history: Sequence[Log] = state.log_history
    train, evaluations = curves(history)
    return {
        "steps": state.global_step,
        "epochs": state.epoch,
        "wall_seconds": round(seconds, 3),
        "train_tokens": train_metrics.get("train_tokens"),
        "train_tokens_per_second": train_metrics.get("train_tokens_per_second"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        **peak_memory(device),
        "train": dict(train[-1]) if train else None,
        "eval_first": dict(evaluations[0]) if len(evaluations) > 1 else None,
        "eval_last": dict(evaluations[-1]) if evaluations else None,
    }


def curves(history: Sequence[Log]) -> tuple[list[Log], list[Log]]:
    """Logged training values and evaluations, each in the order of their "step".

    Args:
        history: `log_history` of `trainer_state.json`.

    Returns:
        (train, eval): dictionaries with the same keys, the "eval_" prefix taken off.
    """
    train: dict[float, Log] = {}
    evaluations: dict[float, Log] = {}
    for entry in history:  # a repeated step (resumed run) counts once
        if "eval_loss" in entry:
            evaluations[entry["step"]] = {k.removeprefix("eval_"): v for k, v in entry.items()}
        elif "loss" in entry:
            train[entry["step"]] = entry
    return [train[s] for s in sorted(train)], [evaluations[s] for s in sorted(evaluations)]


def peak_memory(device: torch.device) -> dict[str, int]:
    """Peak memory of this process: allocated on its GPU, or resident (RSS) without one.

    Args:
        device: the run's.

    Returns:
        {"peak_gpu_bytes": ...} or {"peak_rss_bytes": ...}.
    """
    if device.type == "cuda":
        return {"peak_gpu_bytes": torch.cuda.max_memory_allocated(device)}
    try:
        import resource
    except ImportError:  # Windows; psutil comes with accelerate
        import psutil  # type: ignore[import-untyped]

        return {"peak_rss_bytes": psutil.Process().memory_info().peak_wset}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_rss_bytes": peak if sys.platform == "darwin" else peak * 1024}


def table(metrics: Mapping[str, Any]) -> str:
    """The end-of-run table as plain text.

    Args:
        metrics: of `collect`, or read from `metrics.json`.

    Returns:
        Several lines.
    """
    kind = "GPU" if "peak_gpu_bytes" in metrics else "RSS"
    peak = metrics.get("peak_gpu_bytes", metrics.get("peak_rss_bytes", 0)) / _BYTES_PER_GIB
    speed = metrics.get("train_tokens_per_second")
    facts = [
        ("steps", f"{metrics['steps']} ({metrics['epochs']:.2f} epochs)"),
        ("wall time", f"{metrics['wall_seconds']:.1f} s"),
        ("tokens/s", "-" if speed is None else f"{speed:,.0f}"),
        (f"peak memory ({kind})", f"{peak:.2f} GiB"),
    ]
    columns = {
        f"{label}, step {values['step']}": values
        for label, key in (("train", "train"), ("eval", "eval_first"), ("eval", "eval_last"))
        if (values := metrics.get(key)) is not None
    }
    lines = [f"{name:<20} {value}" for name, value in facts]
    lines += ["", " ".join([f"{'':<20}", *(f"{name:>16}" for name in columns)])]
    for name in TABLE_METRICS:
        cells = (_number(values.get(name)) for values in columns.values())
        lines.append(" ".join([f"{name:<20}", *(f"{cell:>16}" for cell in cells)]))
    return "\n".join(["", *lines, ""])


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def read_history(folder: Path) -> list[Log]:
    """The log history of a run.

    Args:
        folder: its output folder, or one of its checkpoints.

    Raises:
        FileNotFoundError: no run there.
        ValueError: the file is not a trainer's.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} must be the output folder of a run, but has no {STATE_FILE}; a run that "
            "was interrupted has one in each of its checkpoint folders"
        )
    try:
        history: list[Log] = json.loads(path.read_text(encoding="utf-8"))["log_history"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must be written by Trainer, got {error!r}") from error
    return history


def read_metrics(folder: Path) -> dict[str, Any]:
    """The contents of a run's `metrics.json`.

    Args:
        folder: its output folder.

    Raises:
        OSError: no such file.
        ValueError: not JSON.
    """
    metrics: dict[str, Any] = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    return metrics


def named_histories(folders: Sequence[Path]) -> dict[str, tuple[list[Log], list[Log]]]:
    """The curves of several runs, by the folder's name, or its path where names repeat.

    Args:
        folders: output folders.

    Returns:
        Name to (train, eval) of `curves`.
    """
    names = [folder.name for folder in folders]
    return {
        folder.name if names.count(folder.name) == 1 else str(folder): curves(read_history(folder))
        for folder in folders
    }


def draw(folders: Sequence[Path], path: Path) -> str:
    """Draw the report of one run, or the comparison of several; never fails a run.

    Args:
        folders: output folders.
        path: the PNG to write.

    Returns:
        A sentence that says what became of it, for the user.
    """
    try:
        from orpo_kernels.training import plots
    except ImportError:
        names = " ".join(str(folder) for folder in folders)
        return (
            f"no picture: matplotlib is not installed. pip install 'orpo_kernels[plot]', then "
            f"`orpo-kernels report {names}`"
        )
    histories = named_histories(folders)
    if len(folders) == 1:
        plots.report(next(iter(histories.values())), path)
    else:
        plots.comparison(histories, path)
    return f"picture in {path}"
