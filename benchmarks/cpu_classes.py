"""A bfloat16 step on two classes of CPU: as this one is, and as if it ended at AVX2.

    python -m benchmarks.cpu_classes

Without kernels of oneDNN's, torch multiplies bfloat16 in loops of its own. Each class runs in a
process of its own (`ONEDNN_MAX_CPU_ISA`), on one thread: ours as it chooses its GEMMs, ours held to
bfloat16 ones, and plain torch on all logits, between bare GEMMs `H W^T` in float32. Writes
`results/<machine>/cpu-classes.json`.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.measure import Stopwatch
from benchmarks.results import FOLDER
from orpo_kernels import linear_logps
from orpo_kernels.engine import gemm

N, H, V = 256, 1024, 8192
TINY = (16, 32, 500)
CLASSES = {"as it is": {}, "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"}}
MODES = {"eval": (False, False), "frozen": (True, False), "trainable": (True, True)}
FILE = "cpu-classes.json"
Row = dict[str, Any]


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Log-probs from all logits, in float32 or wider."""
    logits = hidden @ weight.t()
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.log_softmax(1).gather(1, labels[:, None])[:, 0]


def ours_in_bfloat16(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """Ours, whatever this CPU multiplies faster."""
    with mock.patch.object(gemm, "multiplies_bfloat16", return_value=True):
        return linear_logps(hidden, weight, labels)


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "orpo_kernels": linear_logps,
    "orpo_kernels, bfloat16 GEMMs": ours_in_bfloat16,
    "plain torch, all logits": eager,
}


def measured(sizes: tuple[int, int, int], rounds: int) -> list[Row]:
    """Times of every mode and implementation in this process, and the error of dhidden."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    rows, columns, vocabulary = sizes
    hidden = torch.randn(rows, columns, generator=generator).bfloat16()
    weight = (4 * columns**-0.5 * torch.randn(vocabulary, columns, generator=generator)).bfloat16()
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    wide, head, clock = hidden.float(), weight.float().t(), Stopwatch("cpu")
    true_hidden = hidden.double().requires_grad_()
    truth = eager(true_hidden, weight.double(), labels)
    (true,) = torch.autograd.grad(truth.sum(), true_hidden)
    found: list[Row] = []
    for mode, (of_hidden, of_weight) in MODES.items():
        for name, implementation in IMPLEMENTATIONS.items():
            h = hidden.detach().requires_grad_(of_hidden)
            w = weight.detach().requires_grad_(of_weight)

            step = partial(_step, implementation, h, w, labels)
            step()
            times, bare = [], []
            for _ in range(rounds):
                bare.append(clock(lambda: torch.mm(wide, head)))
                times.append(clock(step))
            row: Row = {"mode": mode, "implementation": name, "seconds": statistics.median(times)}
            row["over_float32_gemm"] = row["seconds"] / statistics.median(bare)
            if h.grad is not None:
                row["dhidden_error"] = float((h.grad.double() - true).norm() / true.norm())
            found.append(row)
    return found


def _step(of: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    hidden.grad = weight.grad = None
    with torch.set_grad_enabled(hidden.requires_grad):
        logps = of(hidden, weight, labels)
    if hidden.requires_grad:
        logps.sum().backward()


def of_class(name: str, *, tiny: bool = False) -> list[Row]:
    """`measured` in a process that takes the CPU for one of that class."""
    words = [sys.executable, "-m", "benchmarks.cpu_classes", "--here", *(["--tiny"] * tiny)]
    environment = {**os.environ, **CLASSES[name], "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    return [{"class": name, **row} for row in json.loads(done.stdout.splitlines()[-1])]


def main(arguments: list[str] | None = None) -> int:
    """Measure both classes, print and write everything."""
    words = sys.argv[1:] if arguments is None else arguments
    tiny = "--tiny" in words
    if "--here" in words:
        print(json.dumps(measured(TINY if tiny else (N, H, V), 1 if tiny else 3)))
        return 0
    results = [row for name in CLASSES for row in of_class(name, tiny=tiny)]
    for row in results:
        print(
            f"{row['class']:9} {row['mode']:10} {row['implementation']:30} {row['seconds']:8.3f} s "
            f"{row['over_float32_gemm']:7.2f} float32 GEMMs  {row.get('dhidden_error', 0):.1e}"
        )
    if tiny:
        return 0
    path = FOLDER / machine.slug("cpu") / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": "python -m benchmarks.cpu_classes", "commit": machine.commit(),
        "machine": machine.describe("cpu"), "versions": machine.versions(),
        "rows": N, "hidden_size": H, "vocab_size": V, "threads": 1, "results": results,
    }  # fmt: skip
    path.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
