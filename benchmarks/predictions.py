"""What the cost model of the GPU loops says of cards that are not here, beside what an H200 took.

    python -m benchmarks.predictions [--head llama-3-8b]

For three cards and the budgets they get, by mode: milliseconds and bare GEMMs g. On the H200 also
the mean of what was measured last (of `results/nvidia-h200/budgets-*.json`, `sparse-times-*.json`)
and how far the model's milliseconds are from it. By `orpo_kernels/engine/gpu/model.py`: kernels,
and what the host takes to start those of a tile; what else a call starts is not in it.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.heads import HEADS, Head
from benchmarks.results import FOLDER
from orpo_kernels.engine.budget import Sizes
from orpo_kernels.engine.gpu.card import Card
from orpo_kernels.engine.gpu.model import (
    Job,
    job_of,
    kept_seconds,
    scan_seconds,
)
from orpo_kernels.engine.gpu.plan import kept_rows, plan_backward, plan_forward
from orpo_kernels.engine.sparse import plan as plans

MIB = 2**20
# Of the columns of 64 rows: what trained-like logits keep at the default eps of a frozen head, and
# at 2^-12, that of one that trains, and that every run so far has measured.
FINE_LIVE, LIVE = 0.031, 0.0134
LABEL_SETS, GROUPS = 2, 2

# Not compared: at 64 MiB dW of those runs was the exact loop's, and is now from slots.
_OTHERWISE = {("trainable", "sparse 2^-12", 64 * MIB)}


class Device(NamedTuple):
    """A card by name, its bytes, and its figures as `card_of` would find them."""

    name: str
    memory: int
    card: Card


DEVICES = (
    Device("H200", 150_109_880_320, Card(132, 7.3e14, 4.0e12, 90)),
    Device("RTX 4090, 24 GB", 24 * 2**30, Card(128, 1.12e14, 8.4e11, 89)),
    Device("RTX 4060, 8 GB", 8 * 2**30, Card(24, 2.1e13, 2.3e11, 89)),
)


Key = tuple[str, str, int | None]  # mode, gradient, budget


class Measured(NamedTuple):
    """Means of the runs: wall time, by itself and in the bare GEMMs of its run."""

    time_ms: float
    g: float


class Prediction(NamedTuple):
    """Of a mode and a gradient, at a budget; None: the default, a hundredth of the memory."""

    mode: str
    gradient: str
    budget: int | None
    seconds: float


def predictions(head: Head, device: Device) -> Iterator[Prediction]:
    """Every line of a card."""
    sizes = Sizes(
        head.tokens, head.vocab_size, head.hidden_size, LABEL_SETS, torch.bfloat16, False,
        torch.device("cuda"), True, True,
    )  # fmt: skip
    job = job_of(sizes, sizes.wide_bytes)
    for budget in (64 * MIB, 256 * MIB, None):
        some = device.memory // 100 if budget is None else budget
        forward = plan_forward(job, some, device.card, with_g=True).seconds
        yield Prediction("frozen", "exact", budget, forward)
        kept = kept_rows(job, some, device.card, with_g=True)
        for name, rows in (("recomputed", 0), ("exact", kept)):
            first = plan_forward(job, some, device.card, with_g=True, kept=rows).seconds
            second = plan_backward(job, some, device.card, rows).seconds
            yield Prediction("trainable", name, budget, first + second)
        folded = plan_forward(job, some, device.card, with_g=False, folds=True).seconds
        yield Prediction("eval", "exact", budget, folded)
        for mode, name, live in (
            ("frozen", "sparse", FINE_LIVE),
            ("frozen", "sparse 2^-12", LIVE),
            ("trainable", "sparse 2^-12", LIVE),
        ):
            trains = mode == "trainable"
            seconds = sparse_seconds(sizes, job, some, device, live, trains=trains)
            yield Prediction(mode, name, budget, seconds)


def sparse_seconds(
    sizes: Sizes, job: Job, budget: int, device: Device, live: float, *, trains: bool
) -> float:
    """Of the sparse gradient; dW from slots where these have room, else by the exact loop."""
    with mock.patch.object(plans, "card_of", return_value=device.card):
        plan = plans.plan_sparse(sizes, GROUPS, budget, trainable=trains, slots=True)
    if plan.scan is None:
        raise TypeError("a plan of slots has the shape of their forward")
    slots = round(live * job.vocabulary * job.rows / 64)
    forward = scan_seconds(job, plan.scan, device.card) + kept_seconds(job, slots, device.card)
    if not trains:
        return forward
    left = budget - plan.store_bytes
    if slots > plan.capacity:
        return forward + plan_backward(job, left, device.card).seconds
    backward = plans.gradient_seconds(
        job, GROUPS, left, slots, plan.capacity, device.card, remakes=plan.remakes
    )
    if math.isinf(backward):
        raise ValueError(f"{slots} slots have no room for products in {budget} bytes")
    return forward + backward


def measured() -> dict[Key, Measured]:
    """Of the last runs on an H200."""
    runs: dict[Key, list[tuple[float, float]]] = {}
    for pattern in ("budgets-*.json", "sparse-times-*.json"):
        path = max((FOLDER / "nvidia-h200").glob(pattern))
        for row in json.loads(path.read_text())["results"]:
            key = _key(row)
            if key is not None and key not in _OTHERWISE:
                runs.setdefault(key, []).append((row["time_ms"], row["g"]))
    return {
        key: Measured(*(statistics.mean(each) for each in zip(*found, strict=True)))
        for key, found in runs.items()
    }


def _key(row: dict[str, Any]) -> Key | None:
    name = row.get("name", row.get("title"))
    names = {"ours-exact": "exact", "ours-sparse": "sparse 2^-12", "sparse": "sparse 2^-12"}
    gradient = names.get(str(name))
    if gradient is None or "g" not in row or row.get("logits", "trained") != "trained":
        return None
    return row["mode"], gradient, row["budget_bytes"]


def text(head: Head, device: Device, known: dict[Key, Measured]) -> str:
    """The table of a card."""
    flop = 2.0 * head.tokens * head.hidden_size * head.vocab_size
    g = flop / device.card.flops
    lines = [f"{device.name}: g = {1e3 * g:.1f} ms, default {device.memory // 100 // MIB} MiB"]
    errors = []
    for mode, gradient, budget, seconds in predictions(head, device):
        name = "default" if budget is None else f"{budget // MIB} MiB"
        line = f"{mode:10}{gradient:13}{name:9}{1e3 * seconds:9.1f} ms {seconds / g:6.2f} g"
        if (mode, gradient, budget) in known:
            found = known[mode, gradient, budget]
            errors.append(1e3 * seconds / found.time_ms - 1)
            line += f"   measured {found.time_ms:5.1f} ms {found.g:5.2f} g, model {errors[-1]:+.0%}"
        lines.append(line)
    if errors:
        mean = statistics.mean(abs(each) for each in errors)
        lines.append(f"mean error {mean:.0%}, largest {max(errors, key=abs):+.0%}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.predictions", description=__doc__)
    parser.add_argument("--head", choices=list(HEADS), default="llama-3-8b")
    options = parser.parse_args(arguments)
    for device in DEVICES:
        known = measured() if (device.name, options.head) == ("H200", "llama-3-8b") else {}
        print(text(HEADS[options.head], device, known), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
