"""200 random calls of the public functions, their bits and their norms: did a change move a number?

    python -m tests.engine.digests --write     writes digests.json from what is installed now
    python -m tests.engine.digests             prints what this process's CPU backend computes

A problem is drawn from its number alone. Its inputs are ratios of integers, so that they are the
same on every machine; what is computed from them is not: the order of sums in a GEMM depends on the
processor and on torch. So the file holds bits (`digest`) for the machines they were written on, and
for all others `norms`, which agree within a tolerance.
"""

import argparse
import hashlib
import json
import math
import os
import random
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import torch

from orpo_kernels import linear_logps, orpo_loss
from orpo_kernels.engine import gemm

FILE = Path(__file__).with_suffix(".json")
COUNT = 200
WIDE, NARROW = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)
# V: one and two entries, what divides nothing, what takes several blocks of 256 columns.
VOCABULARIES = (1, 2, 37, 100, 513, 513, 1003, 1003, 1500, 1500)
IGNORED = (0.0, 0.0, 0.3, 0.3, 0.3, 0.3, 0.9, 1.0)
# Over 1 / V: the default, 2^-12, keeps all of so small a vocabulary and goes the dense way.
EPS = (None, 0.0, 2.0, 8.0, 8.0, 32.0)
OUTPUTS = (
    "loss", "nll_loss", "or_loss", "chosen_logps", "rejected_logps", "log_odds_ratio",
    "skipped_pairs", "clamped_logps", "pair_mask", "num_nll_tokens",
)  # fmt: skip
LEAST_BUDGET = 2**12  # grown by a quarter until no tile is refused
BUDGETS = (None, 4 * 2**20, "least", "least")  # E is kept; recomputed in one tile; in several


@dataclass(frozen=True)
class Problem:
    """One call: `shape` is (N,), (B, T) or packed (N,)."""

    number: int
    loss: bool
    shape: tuple
    H: int
    V: int
    spread: float  # of the logits, about
    dtypes: tuple  # of hidden, weight, bias
    autocast: bool
    bias: bool
    rank: int
    sets: int
    ignored: float
    frozen: frozenset  # inputs without a gradient: "hidden", "weight"
    strided: bool
    packed: bool
    grouped: bool
    retained: bool  # the graph is kept for a second backward
    options: dict

    def __str__(self):
        shown = {k: v for k, v in vars(self).items() if k != "options"} | self.options
        return ", ".join(f"{name}={value}" for name, value in shown.items())


def draw(number, budget=None):
    """The problem of that number; `budget` stands in for "least"."""
    rng = random.Random(number)
    loss = rng.random() < 0.3
    pairs, T = rng.randint(1, 3), rng.choice((1, 5, 23))
    packed = loss and rng.random() < 0.5
    if loss:
        shape = (2 * pairs * T,) if packed else (2 * pairs, T)
    else:
        shape = rng.choice(((1,), (2, 7), (40,), (3, 50), (150,)))
    dtype = rng.choice((*WIDE, *NARROW, torch.float32, torch.bfloat16))
    other = rng.choice((dtype, dtype, dtype, torch.float32, torch.bfloat16))
    dtypes = (dtype, other, rng.choice((other, torch.float32)))
    ignore_index = rng.choice((-100, -100, -100, 0))
    V = rng.choice(VOCABULARIES)
    options = {
        "gradient": rng.choice(("exact", "exact", "sparse", "sparse", "auto")),
        "logit_scale": rng.choice((1.0, 1.0, 0.3, 1.7)),
        "softcap": rng.choice((None, None, 5.0)),
        "ignore_index": ignore_index,
        "eps": 2.0**-12 if (share := rng.choice(EPS)) is None else min(1.0, share / V),
        "compute_dtype": rng.choice((None, None, None, torch.float32, torch.bfloat16)),
        "workspace_bytes": rng.choice(BUDGETS),
    }
    if options["gradient"] == "exact" and rng.random() < 0.1:
        options["logit_scale"] = -0.7
    if options["workspace_bytes"] == "least" and budget is not None:
        options["workspace_bytes"] = budget
    if loss:
        options["beta"] = rng.choice((0.1, 1.0))
        options["nll_reduction"] = rng.choice(("token", "pair"))
        options["num_nll_tokens"] = rng.choice((None, None, 77))
        options["num_pairs"] = rng.choice((None, None, 5))
        options["num_sequences"] = 2 * pairs if packed else None
    return Problem(
        number, loss, shape,
        H=rng.choice((1, 8, 17, 48)), V=V, spread=rng.choice((0.5, 2.0, 3.0)), dtypes=dtypes,
        autocast=rng.random() < 0.1, bias=rng.random() < 0.4,
        rank=rng.choice((0, 0, 0, 3)), sets=rng.choice((1, 1, 2)), ignored=rng.choice(IGNORED),
        frozen=rng.choice(
            (frozenset(), frozenset(), frozenset(), frozenset({"weight"}), frozenset({"weight"}),
             frozenset({"hidden"}), frozenset({"hidden", "weight"}))
        ),
        strided=rng.random() < 0.2, packed=packed, grouped=rng.random() < 0.3,
        retained=rng.random() < 0.2, options=options,
    )  # fmt: skip


def run(problem):
    """Named results of the call: outputs, the certificate, and a gradient of every input."""
    inputs, labels, extra, upstream = _tensors(problem)
    keywords = {**problem.options, **extra}
    if problem.rank:
        keywords["low_rank"] = (inputs["hidden_r"], inputs["weight_r"])
    arguments = (inputs["hidden"], inputs["weight"])
    amp = torch.autocast("cpu", torch.bfloat16) if problem.autocast else nullcontext()
    # What a CPU would widen, too: the file is of GEMMs in the dtype that was asked for.
    with amp, mock.patch.object(gemm, "multiplies_bfloat16", return_value=True):
        if problem.loss:
            nll = {"nll_labels": labels[1]} if problem.sets == 2 else {}
            output = orpo_loss(*arguments, labels[0], inputs.get("bias"), **nll, **keywords)
            results = {name: getattr(output, name) for name in OUTPUTS}
            results["certificate"] = output.sparse and torch.stack(tuple(output.sparse))
            roots, upstream = [output.loss], [torch.tensor(1.0, dtype=output.loss.dtype)]
        else:
            given = labels if problem.sets == 2 else labels[0]
            roots = linear_logps(*arguments, given, inputs.get("bias"), **keywords)
            roots = list(roots) if problem.sets == 2 else [roots]
            results = {f"logps {i}": each for i, each in enumerate(roots)}
            upstream = [up.to(root.dtype) for up, root in zip(upstream, roots, strict=False)]
    trained = {name: each for name, each in inputs.items() if each.requires_grad}
    if trained:
        for i in range(2 if problem.retained else 1):
            again = problem.retained and i == 0
            found = torch.autograd.grad(
                roots, list(trained.values()), upstream, retain_graph=again, allow_unused=True
            )
            results |= {f"d{name} {i}": each for name, each in zip(trained, found, strict=True)}
    return {name: each.detach() for name, each in results.items() if each is not None}


def _tensors(problem):
    generator = torch.Generator().manual_seed(problem.number)

    def floating(name, *shape, dtype, scale=1.0):
        # The sum of four integers: nearly normal, and no machine rounds it in its own way.
        drawn = torch.randint(-512, 513, (4, *shape), generator=generator).sum(0)
        drawn = (drawn.double() * (2.0**-9 * scale)).to(dtype)
        role = "weight" if name in ("bias", "weight_r") else name.removesuffix("_r")
        return drawn.requires_grad_(role not in problem.frozen)

    of_rows, of_head, of_bias = problem.dtypes
    shape = problem.shape
    if problem.strided and len(shape) == 2:
        shape = (shape[0], shape[1] + 1)  # hidden[:, :-1] of a model: no (N, H) view
    inputs = {
        "hidden": floating(
            "hidden", *shape, problem.H, dtype=of_rows, scale=problem.spread / problem.H**0.5
        ),
        "weight": floating("weight", problem.V, problem.H, dtype=of_head),
    }
    inputs["hidden"] = inputs["hidden"][:, :-1] if shape != problem.shape else inputs["hidden"]
    if problem.bias:
        inputs["bias"] = floating("bias", problem.V, dtype=of_bias)
    if problem.rank:
        inputs["hidden_r"] = floating("hidden_r", *problem.shape, problem.rank, dtype=of_rows)
        inputs["weight_r"] = floating("weight_r", problem.V, problem.rank, dtype=of_head, scale=0.5)
    labels = tuple(_labels(problem, generator) for _ in range(2))
    same = torch.randint(0, 2, problem.shape, generator=generator, dtype=torch.bool)
    labels = (labels[0], torch.where(same, labels[0], labels[1]))
    extra = {}
    if problem.packed:
        sequences = problem.options["num_sequences"]
        extra["sequence_ids"] = torch.arange(problem.shape[0]) * sequences // problem.shape[0]
    if problem.grouped:
        extra["tail_groups"] = torch.randint(0, 2, problem.shape, generator=generator)
    upstream = [
        torch.randint(-512, 513, problem.shape, generator=generator) / 512 for _ in range(2)
    ]
    return inputs, labels, extra, upstream


def _labels(problem, generator):
    labels = torch.randint(0, problem.V, problem.shape, generator=generator)
    drawn = torch.randint(0, 100, problem.shape, generator=generator)
    return torch.where(drawn < 100 * problem.ignored, problem.options["ignore_index"], labels)


def digest(results):
    """16 hex digits of the bytes of all results."""
    sha = hashlib.sha256()
    for name, each in results.items():
        sha.update(f"{name} {each.dtype} {tuple(each.shape)}".encode())
        sha.update(each.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def norms(results):
    """A norm per result, in float64: its elements weighted, so that an exchange of two shows."""
    found = []
    for each in results.values():
        flat = each.reshape(-1).double()
        weights = 1.0 + torch.arange(flat.numel(), dtype=torch.float64) % 13 / 13
        found.append(float(f"{float((flat * weights).norm()):.6e}"))
    return found


def machine():
    """What bits depend on beside the code: processor, what torch uses of it, and torch."""
    about = Path("/proc/cpuinfo")
    text = about.read_text() if about.is_file() else ""
    fields = dict(
        (part.strip() for part in line.split(":", 1))
        for line in text.split("\n\n")[0].splitlines()
        if ":" in line
    )
    flags = fields.get("flags", "").split()
    names = [fields.get(name, "?") for name in ("vendor_id", "cpu family", "model")]
    used = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    capability = torch.backends.cpu.get_cpu_capability()
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    return " ".join((f"torch {torch.__version__}", capability, *names, *used, *limit.split()))


def measured(budgets):
    """Digest and norms of every problem on one thread: `{"digests": [...], "norms": [...]}`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = [run(draw(number, budgets[number])) for number in range(COUNT)]
    finally:
        torch.set_num_threads(threads)
    return {"digests": [digest(each) for each in found], "norms": [norms(each) for each in found]}


def least_budget(problem):
    """Bytes of the smallest workspace that is not refused, up to a quarter; None if not asked."""
    if problem.options["workspace_bytes"] != "least":
        return None
    budget = LEAST_BUDGET
    while True:
        options = {**problem.options, "workspace_bytes": budget}
        try:
            run(replace(problem, options=options))
        except ValueError as error:
            if "workspace_bytes" not in str(error):
                raise
            budget = math.ceil(budget * 1.25)
        else:
            return budget


def elsewhere(backend):
    """`measured` in a process with that CPU backend; its JSON is the last line of the output."""
    environment = {**os.environ, "ORPO_KERNELS_CPU_BACKEND": backend}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.engine.digests"], cwd=FILE.parents[2], env=environment,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def result(process):
    """What `elsewhere` computed."""
    output, _ = process.communicate(timeout=300)
    if process.returncode != 0:
        raise RuntimeError(f"python -m tests.engine.digests ended with {process.returncode}")
    return json.loads(output.splitlines()[-1])


def write():
    """The file anew: budgets and norms, and the bits of this machine beside those of others."""
    budgets = [least_budget(draw(number)) for number in range(COUNT)]
    known = json.loads(FILE.read_text()) if FILE.is_file() else {"machines": {}}
    FILE.write_text(json.dumps({"budgets": budgets}))
    found = {backend: result(elsewhere(backend)) for backend in ("c++", "torch")}
    bits = {backend: each["digests"] for backend, each in found.items()}
    contents = {
        "budgets": budgets,
        "norms": found["c++"]["norms"],
        "machines": {**known["machines"], machine(): bits},
    }
    FILE.write_text(json.dumps(contents, separators=(",", ":")) + "\n")


def recorded():
    """Contents of the file."""
    return json.loads(FILE.read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What 200 random calls compute, to the bit.")
    parser.add_argument("--write", action="store_true")
    if parser.parse_args().write:
        write()
    else:
        sys.stdout.write(json.dumps(measured(recorded()["budgets"])) + "\n")
