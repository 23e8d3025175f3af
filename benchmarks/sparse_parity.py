"""Does training with the sparse gradient end where training with the exact one ends? On a CPU.

    python -m benchmarks.sparse_parity PAIRS.jsonl

Three kinds of run, each with both gradients and three seeds; runs of one seed see the same batches:

- demo: `make demo`'s model of V = 1,024, nf4 + LoRA, generated pairs;
- real: PAIRS.jsonl (messages, see docs/data-formats.md), V = 8,192, nf4 + LoRA, T = 512;
- full: the same pairs, every parameter trained, the head tied to the embedding: what rare tokens
  lose in dW is lost for good.

Models this small and this little trained have a softmax so dense that compacting it does not pay:
by itself every tile would go the exact way, and both gradients be the same to the last bit. Here
the limit on the density is lifted and the store is large, so that every tile is compacted. That is
harder on the sparse gradient than a pretrained model is: more of the mass is in the tail.

Writes `results/<machine>/sparse-parity.json` (last held-out metrics of every run; per metric the
difference of the gradients' means over seeds, beside the standard deviation over seeds of the exact
ones; what was kept and what was dropped) and docs/sparse-parity.png. About 15 minutes; stopped and
started again it goes on.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib as mpl
import torch

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks import machine
from benchmarks.results import FOLDER
from examples import tiny_base
from examples.demo import CONFIG, KNOWN
from examples.synthetic import preference_pairs, write_jsonl
from orpo_kernels import cli
from orpo_kernels.engine.sparse import plan
from orpo_kernels.training.report import METRICS_FILE, named_histories, read_metrics

FILE = "sparse-parity.json"
PICTURE = Path(__file__).parents[1] / "docs" / "sparse-parity.png"
GRADIENTS = ("exact", "sparse")
SEEDS = (1, 2, 3)
HELD_OUT = 10  # every tenth of PAIRS
METRICS = (
    "loss", "nll_loss", "log_odds_chosen", "logps/chosen", "logps/rejected", "rewards/accuracies",
)  # fmt: skip
Flags = tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A run: title in the picture, folders of base model and data, options beside the demo's."""

    title: str
    base: str
    flags: Flags


_REAL: Flags = (
    "--max_length=512", "--per_device_train_batch_size=2", "--per_device_eval_batch_size=5",
    "--gradient_accumulation_steps=2", "--max_steps=30", "--eval_steps=10", "--logging_steps=3",
    "--warmup_steps=3",
)  # fmt: skip
KINDS = {
    "demo": Kind("demo: nf4 + LoRA, V = 1,024", "demo", ()),
    "real": Kind(
        "real pairs: nf4 + LoRA, V = 8,192", "real", (*_REAL, "--learning_rate=2e-3")
    ),
    "full": Kind(
        "real pairs: all parameters, tied head", "real",
        (*_REAL, "--learning_rate=5e-4", "--load_in_4bit=false", "--use_peft=false"),
    ),
}  # fmt: skip
TINY: Flags = (
    "--max_steps=2", "--eval_steps=1", "--logging_steps=1", "--warmup_steps=0", "--max_length=256",
)  # fmt: skip


def prepare(out: Path, pairs: Path, *, tiny: bool) -> None:
    """Data and base models of the three kinds, where they are not there yet."""
    known = [pair for pair in preference_pairs(400) if pair["category"] in KNOWN]
    rows = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    held = rows[::HELD_OUT]
    train = [row for i, row in enumerate(rows) if i % HELD_OUT]
    steps = 2 if tiny else None
    for name, (learn, test), texts, size in (
        ("demo", (preference_pairs(400), preference_pairs(120, split="heldout")), known,
         tiny_base.Size(steps=steps or 70)),
        ("real", (train, held), train,
         tiny_base.Size(8192, 192, 3, 512, steps=steps or 60, batch_size=4 if tiny else 8)),
    ):  # fmt: skip
        if (out / name / "config.json").is_file():
            continue
        write_jsonl(out / name / "data" / "train.jsonl", learn)
        write_jsonl(out / name / "data" / "test.jsonl", test)
        tiny_base.build(texts, out / name, size)


def runs(out: Path) -> Iterator[tuple[str, str, int, Path]]:
    """Kind, gradient, seed and folder of every run: the gradients of a seed after one another."""
    for kind in KINDS:
        for seed in SEEDS:
            for gradient in GRADIENTS:
                yield kind, gradient, seed, out / f"{kind}-{gradient}-{seed}"


@contextlib.contextmanager
def every_tile_compacted() -> Iterator[None]:
    """Lifts the limit on the density of a tile, and makes room for what is kept."""
    with (
        mock.patch.object(plan, "live_share", return_value=1.0),
        mock.patch.object(plan, "_LIST_SHARE", 2),
        mock.patch.object(plan, "_LIST_ROW_BYTES", 2**15),
    ):
        yield


def train(kind: Kind, gradient: str, seed: int, folder: Path, more: Flags) -> None:
    """One run, unless it is finished; a failure ends all."""
    if (folder / METRICS_FILE).is_file():
        return
    base = folder.parent / kind.base
    words = [
        "train", CONFIG, f"--model_name_or_path={base}", f"--dataset_name={base / 'data'}",
        f"--output_dir={folder}", f"--gradient={gradient}", f"--seed={seed}", *kind.flags, *more,
    ]  # fmt: skip
    print("$ orpo-kernels", *words, flush=True)
    with every_tile_compacted():
        status = cli.main(words)
    if status:
        sys.exit(status)


def summarise(out: Path) -> list[dict[str, Any]]:
    """Per kind and metric, of the last evaluation: means, their difference, noise over seeds."""
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for kind, gradient, _, folder in runs(out):
        found.setdefault((kind, gradient), []).append(read_metrics(folder)["eval_last"])
    rows = []
    for kind in KINDS:
        for metric in METRICS:
            exact, sparse = ([run[metric] for run in found[kind, each]] for each in GRADIENTS)
            difference = statistics.mean(sparse) - statistics.mean(exact)
            noise = statistics.stdev(exact)
            rows.append({
                "kind": kind, "metric": metric, "exact": exact, "sparse": sparse,
                "difference": difference, "noise": noise,
                "within_noise": abs(difference) <= noise,
            })  # fmt: skip
    return rows


def left_out(out: Path) -> list[dict[str, Any]]:
    """Per kind, means over the logged steps and seeds of what the sparse gradient kept."""
    rows = []
    for kind in KINDS:
        folders = [
            run for name, gradient, _, run in runs(out) if (name, gradient) == (kind, "sparse")
        ]
        logs = [log for run in folders for log in named_histories([run])[run.name][0]]
        means = {
            name: statistics.mean(log[f"sparse/{name}"] for log in logs)
            for name in ("kept_share", "tail_mass", "residual_rms")
        }
        rows.append({"kind": kind, **means})
    return rows


def draw(out: Path, path: Path) -> None:
    """Curves of both gradients over each other: a column per kind, a row per metric."""
    panels = (
        ("loss", 0, "training loss, nats"),
        ("log_odds_chosen", 1, "held-out log odds ratio, nats"),
        ("nll_loss", 1, "held-out NLL, nats per token"),
    )
    figure, axes = plt.subplots(len(panels), len(KINDS), figsize=(12, 8), squeeze=False)
    styles = {"exact": ("#1f6fb4", "-", 2.2), "sparse": ("#e69138", "--", 1.2)}
    for kind, gradient, seed, folder in runs(out):
        column = list(KINDS).index(kind)
        curves = named_histories([folder])[folder.name]
        color, line, width = styles[gradient]
        for axis, (metric, which, label) in zip(axes[:, column], panels, strict=True):
            points = [(each["step"], each[metric]) for each in curves[which]]
            name = gradient if seed == SEEDS[0] else None
            axis.plot(
                *zip(*points, strict=True), color=color, linestyle=line, linewidth=width, label=name
            )
            axis.set_ylabel(label, fontsize=8)
            axis.tick_params(labelsize=8)
            axis.grid(visible=True, linewidth=0.3)
        axes[0, column].set_title(KINDS[kind].title, fontsize=10)
        axes[-1, column].set_xlabel("step", fontsize=8)
    axes[0, 0].legend(title=f"{len(SEEDS)} seeds each", fontsize=8, title_fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def write(out: Path, path: Path, summary: list[dict[str, Any]], kept: list[dict[str, Any]]) -> None:
    """Machine, versions, final metrics of every run, and the summary."""
    content = {
        "command": "python -m benchmarks.sparse_parity PAIRS.jsonl", "commit": machine.commit(),
        "machine": machine.describe("cpu"), "versions": machine.versions(),
        "summary": summary, "left_out": kept,
        "runs": [
            {"kind": kind, "gradient": gradient, "seed": seed, **read_metrics(folder)}
            for kind, gradient, seed, folder in runs(out)
        ],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Train, draw, write, print the summary; exit status 1 if a difference is over the noise."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", type=Path, help="JSONL of preference pairs, as messages")
    parser.add_argument("--out", type=Path, default=Path("runs/parity"))
    parser.add_argument("--results", type=Path, default=Path(FOLDER) / machine.slug("cpu") / FILE)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--tiny", action="store_true", help="two steps of each, to test this")
    options = parser.parse_args(argv)
    cli.quiet()
    # As in the demo: the matrices are small, more threads would wait for each other.
    torch.set_num_threads(max(1, min(2, (os.cpu_count() or 1) // 2)))
    prepare(options.out, options.pairs, tiny=options.tiny)
    for kind, gradient, seed, folder in runs(options.out):
        train(KINDS[kind], gradient, seed, folder, TINY if options.tiny else ())
    summary = summarise(options.out)
    draw(options.out, options.picture)
    kept = left_out(options.out)
    write(options.out, options.results, summary, kept)
    for row in summary:
        print(
            f"{row['kind']:<5} {row['metric']:<19} exact {statistics.mean(row['exact']):>9.4f} "
            f"sparse {statistics.mean(row['sparse']):>9.4f} difference {row['difference']:>+9.5f} "
            f"std over seeds {row['noise']:>8.5f}"
        )
    for row in kept:
        print(
            f"{row['kind']:<5} kept {row['kept_share']:.4f} of the entries, "
            f"dropped {row['tail_mass']:.4f} of the mass"
        )
    # Where everything is kept nothing is compared.
    compared = all(row["kept_share"] < 1 for row in kept)
    return 0 if compared and all(row["within_noise"] for row in summary) else 1


if __name__ == "__main__":
    sys.exit(main())
