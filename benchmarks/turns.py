"""A race of steps in turns, A B C A B C A: the ratio of each is to A's turns before and after it.

What slows a machine for a while slows neighbours alike, and a step of a large model on a fast GPU
takes as long as the host needs to start its kernels, which varies more than the kernels do.
Garbage is collected between turns, and not within: what Python collects is as large as what was
imported, and it does so in whoever's turn the count is full.
"""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

Seconds = dict[str, list[float]]
Row = dict[str, Any]
Rows = list[Row]


def take_turns(
    turns: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    until: float = float("inf"),
    after_round: Callable[[Seconds], None] = lambda taken: None,
) -> Seconds:
    """What every turn took; the first one, which the others are compared with, has one more.

    Args:
        turns: by name, each takes its turn and says how many seconds are to be counted.
        rounds: at most.
        until: of `time.perf_counter`; after it no round but the first begins.
        after_round: is given what was taken so far.
    """
    first, *others = turns
    taken: Seconds = {name: [] for name in turns}
    with no_garbage_within() as collect:

        def turn(name: str) -> None:
            collect()
            taken[name].append(turns[name]())

        turn(first)
        for _ in range(rounds):
            for name in (*others, first):
                turn(name)
            after_round(taken)
            if time.perf_counter() > until:
                break
    return taken


@contextmanager
def no_garbage_within() -> Iterator[Callable[[], Any]]:
    """Collect when asked only, and then no more than what has come since."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield gc.collect
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def figures_or_reason(run: Callable[[], Row]) -> Row:
    """What it returns; or why there are no figures: "skipped" what cannot be, "failed" the rest."""
    try:
        return run()
    except (ImportError, NotImplementedError, torch.cuda.OutOfMemoryError) as error:
        return {"skipped": _first_line(error)}
    except Exception as error:  # the other rows are worth their time
        return {"failed": _first_line(error)}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def ratios(taken: Seconds, name: str) -> list[float]:
    """Seconds of each turn over the mean of the first one's turns before and after; of itself 1."""
    first = next(iter(taken))
    if name == first:
        return [1.0]
    around = zip(taken[first], taken[first][1:], strict=False)
    return [
        2 * own / (before + after)
        for own, (before, after) in zip(taken[name], around, strict=False)
    ]


def saying(begun: float) -> Callable[[str], None]:
    """Prints a line behind the seconds since `begun`, at once: a run that is ended has said it."""

    def say(what: str) -> None:
        print(f"{time.perf_counter() - begun:6.1f} s  {what}", flush=True)

    return say


def median_iqr(values: list[float]) -> dict[str, float]:
    """Of at least one value."""
    low, _, high = (
        statistics.quantiles(values, method="inclusive") if len(values) > 1 else (0, 0, 0)
    )
    return {"median": _short(statistics.median(values)), "iqr": _short(high - low)}


def _short(value: float) -> float:
    return float(f"{value:.4g}")
