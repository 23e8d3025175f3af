"""Peak memory of one step on one pair of T = 1,024 tokens, V = 128,256, H = 1,024, on a CPU.

    python -m benchmarks.pair_memory

Every implementation in a process of its own, every position scored by the NLL and by the odds
ratio, no padding: the worst case for an implementation that skips what is not scored. Writes
`results/<machine>/pair-memory.json`, whose figures the README quotes.
"""

import json
import multiprocessing
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.lengths import PairLengths
from benchmarks.memory import HighWaterMark
from benchmarks.results import FOLDER
from benchmarks.steps import Step
from benchmarks.workloads import Workload
from orpo_kernels.constants import IGNORE_INDEX

T, H, V = 1024, 1024, 128_256
NAMES = ("ours-exact", "eager", "trl-orpo", "liger")  # those that build the logits, and ours
FILE = "pair-memory.json"
Measured = dict[str, Any]


def workload(dtype: torch.dtype, length: int = T, hidden: int = H, vocab: int = V) -> Workload:
    """One pair of `length` tokens; random values, which memory does not depend on."""
    labels = torch.randint(0, vocab, (2, length))
    labels[:, -1] = IGNORE_INDEX
    nll_labels = labels.clone()
    nll_labels[1] = IGNORE_INDEX
    return Workload(
        hidden=torch.randn(2, length, hidden, dtype=dtype),
        weight=torch.randn(vocab, hidden, dtype=dtype) * 0.02,
        labels=labels,
        nll_labels=nll_labels,
        attention=torch.ones(2, length, dtype=torch.int64),
        softcap=None,
        lengths=[PairLengths(1, length - 1, length - 1)],
    )


def measure(name: str, dtype: str, mode: str, sizes: tuple[int, int, int] = (T, H, V)) -> Measured:
    """Peak bytes over the inputs of one step in a fresh process."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(theirs, name, dtype, mode, sizes))
    child.start()
    theirs.close()
    try:
        return dict(mine.recv())
    except EOFError:
        return {"error": "the process ended without an answer"}
    finally:
        child.join()


def _child(pipe: Connection, name: str, dtype: str, mode: str, sizes: tuple[int, int, int]) -> None:
    found, kind = IMPLEMENTATIONS[name], getattr(torch, dtype)
    Step(found, workload(kind, 8, 64, 512), mode).run()  # imports and the libraries' own buffers
    step = Step(found, workload(kind, *sizes), mode)
    with HighWaterMark() as mark:
        step.run()
    pipe.send({
        "implementation": name, "title": found.title, "dtype": dtype, "mode": mode,
        "peak_bytes": mark.peak_bytes, "gradient_bytes": step.gradient_bytes, "method": mark.method,
    })  # fmt: skip


def main() -> int:
    """Measure, print and write everything."""
    results = []
    for dtype in ("bfloat16", "float32"):
        for mode in ("frozen", "trainable"):
            for name in NAMES:
                found = measure(name, dtype, mode)
                results.append(found)
                print(dtype, mode, name, f"{found.get('peak_bytes', 0) / 2**20:,.0f} MiB")
    path = Path(FOLDER) / machine.slug("cpu") / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"machine": machine.describe("cpu"), "versions": machine.versions()}
    content = {
        "command": "python -m benchmarks.pair_memory", "commit": machine.commit(), **about,
        "pairs": 1, "length": T, "hidden_size": H, "vocab_size": V, "results": results,
    }  # fmt: skip
    path.write_text(json.dumps(content, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
