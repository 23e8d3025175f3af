"""A training step of a whole model on batches of real lengths, by the layout of the batch.

    python -m benchmarks.layout_steps --pairs 1 2 4            # a CPU: writes results/<machine>/
    python -m benchmarks.layout_steps --device cuda --minutes 4
    python -m benchmarks.layout_steps --shares                 # tokens only, of 300 pairs

A Llama with random weights and LoRA on every linear layer, gradient checkpointing, AdamW; TRL's
ORPO on its logits, and ours padded, packed and with the prompt once. All of them take the same
batches: pairs whose lengths are those of real ones (`lengths.py`), in random order. Tokens per
second are those a user has, both sequences without padding, whatever is computed. Each round of
ours runs between two of TRL's, and its speed is the ratio of the two times.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import machine, settings
from benchmarks.lengths import natural_lengths
from benchmarks.model_step import LLAMA_1B, TINY, Model, build
from benchmarks.peers import BETA, trl_trainer
from benchmarks.results import FOLDER
from orpo_kernels import ORPOLoss, fuse_head
from orpo_kernels.layout import BatchLayout, lay_out

FILE = "layouts.json"
TRL = "TRL ORPO"
LAYOUTS = ("padded", "packed", "shared_prompt")
IMPLEMENTATIONS = (TRL, *LAYOUTS)
SMALL = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8192,
}  # fmt: skip


class Shape(NamedTuple):
    """A model, how it attends, and by how much the pairs are longer than real ones."""

    model: Model
    attention: str = "sdpa"
    stretch: int = 1


SHAPES = {
    "tiny": Shape(Model("tiny", "llama", TINY, False, ())),
    "small": Shape(Model("Llama, 4 layers of H 256, V 8,192", "llama", SMALL, False, ())),
    "1b": Shape(Model("Llama-3.2-1B", "llama", LLAMA_1B, False, ())),
    "1b-flex": Shape(Model("Llama-3.2-1B", "llama", LLAMA_1B, False, ()), "flex_attention"),
    "1b-flex-4k": Shape(Model("Llama-3.2-1B", "llama", LLAMA_1B, False, ()), "flex_attention", 4),
    "1b-flex-16k": Shape(Model("Llama-3.2-1B", "llama", LLAMA_1B, False, ()), "flex_attention", 16),
    "1b-flash": Shape(Model("Llama-3.2-1B", "llama", LLAMA_1B, False, ()), "flash_attention_2", 4),
}
PLANS = {"cpu": ("small",), "cuda": ("1b", "1b-flex", "1b-flex-4k", "1b-flash", "1b-flex-16k")}
Batch = dict[str, Tensor]


def batches(shape: Shape, pairs: int, count: int, device: str) -> list[Batch]:
    """`count` stacked batches (2P, T) of random tokens, in real lengths."""
    drawn = natural_lengths(pairs * count)
    random.Random(0).shuffle(drawn)
    generator = torch.Generator().manual_seed(0)
    vocabulary = shape.model.config["vocab_size"]
    # The tiny model's pairs are a sixteenth as long.
    scale = shape.stretch / 16 if shape.model.name == "tiny" else shape.stretch
    made = []
    for start in range(0, len(drawn), pairs):
        rows = []
        for pair in drawn[start : start + pairs]:
            sizes = (pair.prompt, pair.chosen, pair.rejected)
            prompt, *answers = (max(2, round(size * scale)) for size in sizes)
            shared = torch.randint(5, vocabulary, (prompt,), generator=generator)
            sides = [torch.randint(5, vocabulary, (n,), generator=generator) for n in answers]
            rows.append((prompt, [torch.cat((shared, side)) for side in sides]))
        made.append({name: each.to(device) for name, each in _padded(rows).items()})
    return made


def _padded(rows: list[tuple[int, list[Tensor]]]) -> Batch:
    sequences = [(prompt, sides[side]) for side in (0, 1) for prompt, sides in rows]
    width = max(len(ids) for _, ids in sequences)
    batch = {"input_ids": torch.zeros(len(sequences), width, dtype=torch.int64)}
    batch |= {"attention_mask": torch.zeros_like(batch["input_ids"])}
    batch |= {name: torch.full_like(batch["input_ids"], -100) for name in ("labels", "nll_labels")}
    for row, (prompt, ids) in enumerate(sequences):
        batch["input_ids"][row, : len(ids)] = ids
        batch["attention_mask"][row, : len(ids)] = 1
        batch["labels"][row, prompt : len(ids)] = ids[prompt:]
        if row < len(rows):
            batch["nll_labels"][row, : len(ids)] = ids
    return batch


def user_tokens(made: list[Batch]) -> int:
    """Tokens of both sequences of every pair, without padding."""
    return sum(int(batch["attention_mask"].sum()) for batch in made)


def loss_of(model: nn.Module, name: str, device: str) -> Callable[[Batch], Tensor]:
    """The loss of a batch: TRL's own trainer, or ours in a layout."""
    if name == TRL:
        return _trl_loss(model, device)
    fused = fuse_head(model, loss=ORPOLoss(beta=BETA), layout=name)
    fused.unfuse()

    def ours(batch: Batch) -> Tensor:
        with fused.active():
            return model(**batch, use_cache=False).loss  # type: ignore[no-any-return]

    return ours


def _trl_loss(model: nn.Module, device: str) -> Callable[[Batch], Tensor]:
    trainer = trl_trainer(device)

    def loss(batch: Batch) -> Tensor:
        columns = {}
        for side, half in (("chosen", 0), ("rejected", 1)):
            for name in ("input_ids", "attention_mask", "labels"):
                columns[f"{side}_{name}"] = batch[name].chunk(2)[half]
        return trainer.get_batch_loss_metrics(model, columns)[0]

    return loss


class Steps:
    """A model and its batches; `run(name)` takes one step on each batch."""

    def __init__(self, shape: Shape, pairs: int, count: int, device: str) -> None:
        self.device, self.batches = device, batches(shape, pairs, count, device)
        self.model = build(shape.model, device)
        self.model.get_base_model().set_attn_implementation(shape.attention)
        if device == "cpu":
            self.model.float()
        trained = [each for each in self.model.parameters() if each.requires_grad]
        # So slow that the weights stay: everybody computes the same losses.
        self.optimizer = torch.optim.AdamW(trained, lr=1e-9)
        self.losses = {name: loss_of(self.model, name, device) for name in IMPLEMENTATIONS}

    def run(self, name: str) -> list[float]:
        """The loss of each batch."""
        found = []
        for batch in self.batches:
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                loss = self.losses[name](batch)
            loss.backward()
            self.optimizer.step()
            found.append(loss.detach())
        return [float(each) for each in found]

    def computed(self, name: str) -> int:
        """Tokens the model computes for all batches."""
        if name in (TRL, "padded"):
            return sum(batch["input_ids"].numel() for batch in self.batches)
        total = 0
        with torch.no_grad(), fuse_head(self.model, layout=name, check=False):
            for batch in self.batches:
                arguments = {k: v for k, v in batch.items() if k != "nll_labels"}
                total += int(self.model(**arguments).layout_terms["computed_tokens"])
        return total


def shares(pairs: int, draws: int = 300) -> dict[str, float]:
    """Of batches of real lengths: what each layout computes, over the padded batch.

    "row": one row, as an attention computes it that passes over what is masked.
    """
    model = Shape(Model("", "", {"vocab_size": 32_000}, False, ()))
    made = batches(model, pairs, draws // pairs, "cpu")
    padded = sum(batch["input_ids"].numel() for batch in made)
    found = {"padded / real": padded / user_tokens(made)}
    for name in LAYOUTS[1:]:
        for kind, scale in (("row", None), ("sdpa, H 4096", 2 * 4096.0)):
            computed = sum(
                lay_out(
                    BatchLayout(name),
                    [batch["input_ids"]],
                    batch["attention_mask"],
                    attention_scale=scale,
                ).computed
                for batch in made
            )
            found[f"{name}, {kind}"] = computed / padded
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run `test_bench_step.py` and write what it records, or print the shares."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layout_steps", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=settings.device())
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--minutes", type=float, default=15.0, help="start nothing new after this")
    parser.add_argument("--shares", action="store_true")
    parser.add_argument("--json", type=Path, help="instead of results/<machine>/")
    options = parser.parse_args(arguments)
    if options.shares:
        for pairs in options.pairs:
            line = ", ".join(f"{name} {share:.2f}" for name, share in shares(pairs).items())
            print(f"{pairs} pairs: {line}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.jsonl"
        record.touch()
        environment = {
            **os.environ, settings.DEVICE: options.device, settings.RECORD: str(record),
            settings.DEADLINE: str(time.time() + 60 * options.minutes),
        }  # fmt: skip
        words = [
            sys.executable,
            "-m",
            "pytest",
            str(Path(__file__).with_name("test_bench_step.py")),
        ]
        words += ["--benchmark-only", "--benchmark-columns=median,iqr,rounds", "-p", "no:xdist"]
        words += ["-k", " or ".join(f"P{pairs}" for pairs in options.pairs)]
        code = subprocess.run(words, env=environment, check=False).returncode
        results = [json.loads(line) for line in record.read_text().splitlines()]
    path = options.json or Path(FOLDER) / machine.slug(options.device) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    command = f"python -m benchmarks.layout_steps --device {options.device} --pairs"
    content = {
        "command": " ".join([command, *(str(pairs) for pairs in options.pairs)]),
        "commit": machine.commit(), "machine": machine.describe(options.device),
        "versions": machine.versions(), "results": results,
    }  # fmt: skip
    path.write_text(json.dumps(content, indent=1) + "\n")
    skipped = sum("skipped" in result for result in results)
    print(f"{len(results)} results in {path}, {skipped} of them no figures")
    return code


def median_iqr(values: list[float]) -> dict[str, float]:
    """Of at least one value."""
    low, _, high = (
        statistics.quantiles(values, method="inclusive") if len(values) > 1 else (0, 0, 0)
    )
    return {"median": float(f"{statistics.median(values):.4g}"), "iqr": float(f"{high - low:.3g}")}


if __name__ == "__main__":
    sys.exit(main())
