"""A training step of a whole model on batches of real lengths, by the layout of the batch.

    python -m benchmarks.layout_steps --pairs 1 2 4            # a CPU: writes results/<machine>/
    python -m benchmarks.layout_steps --device cuda --minutes 4
    python -m benchmarks.layout_steps --shares                 # tokens only, of 300 pairs

A Llama with random weights and LoRA on every linear layer, gradient checkpointing, AdamW; TRL's
ORPO on its logits, and ours padded, packed and with the prompt once. All of them take the same
batches: pairs whose lengths are those of real ones (`lengths.py`), in random order. Tokens per
second are those a user has, both sequences without padding, whatever is computed. Losses are
compared with TRL's before anything is timed; then rounds in turns (`turns.py`), and the speed of
each is the ratio of TRL's turns before and after it to its own. A padded batch is computed with
sdpa always, as its users do; rows with the attention of the shape. The JSON is written whenever it
says more, a case is printed when it ends; half of the time that is left is a case's.
"""

import argparse
import gc
import importlib.util
import json
import random
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import BEGUN, machine, settings
from benchmarks.contention import MOST_WAITING, threads, waiting_share
from benchmarks.lengths import natural_lengths
from benchmarks.measure import Stopwatch
from benchmarks.model_step import LLAMA_1B, TINY, Model, build
from benchmarks.peers import BETA, trl_trainer
from benchmarks.results import FOLDER
from benchmarks.turns import (
    Row,
    Rows,
    Seconds,
    figures_or_reason,
    median_iqr,
    ratios,
    saying,
    take_turns,
)
from orpo_kernels import ORPOLoss, fuse_head
from orpo_kernels.layout import BatchLayout, lay_out

FILE = "layouts.json"
TRL = "TRL ORPO"
LAYOUTS = ("padded", "packed", "shared_prompt")
SMALL = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8192,
}  # fmt: skip


class Shape(NamedTuple):
    """A model, how it attends to rows, and by how much the pairs are longer than real ones."""

    model: Model
    attention: str = "sdpa"
    stretch: int = 1
    layouts: tuple[str, ...] = LAYOUTS


LLAMA = Model("Llama-3.2-1B", "llama", LLAMA_1B, False, ())
# Padded is what sdpa's shape is. What is compiled for the first layout serves the second.
FLEX, IN_ROWS = "flex_attention", ("shared_prompt", "packed")
SHAPES = {
    "tiny": Shape(Model("tiny", "llama", TINY, False, ())),
    "small": Shape(Model("Llama, 4 layers of H 256, V 8,192", "llama", SMALL, False, ())),
    "1b": Shape(LLAMA),
    "1b-flex": Shape(LLAMA, FLEX, 1, IN_ROWS),
    "1b-flex-4k": Shape(LLAMA, FLEX, 4, IN_ROWS),
    "1b-flex-16k": Shape(LLAMA, FLEX, 16, IN_ROWS),
    "1b-flash": Shape(LLAMA, "flash_attention_2", 4, ("packed",)),
}
# The cheapest and most telling first.
PLANS = {"cpu": ("small",), "cuda": ("1b", "1b-flex", "1b-flex-4k", "1b-flash", "1b-flex-16k")}
PAIRS = 4  # of a round, in batches of 1, 2 or 4
ROUNDS = {"cpu": 2, "cuda": 3}
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}  # of a loss; float32, and bfloat16 by autocast
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


class Done(NamedTuple):
    """Of a batch: the loss, and how many tokens the model computed where the batch does not say."""

    loss: Tensor
    computed: Tensor | None = None


def loss_of(model: nn.Module, name: str, device: str) -> Callable[[Batch], Done]:
    """The loss of a batch: TRL's own trainer, or ours in a layout."""
    if name == TRL:
        return _trl_loss(model, device)
    fused = fuse_head(model, loss=ORPOLoss(beta=BETA), layout=name)
    fused.unfuse()

    def ours(batch: Batch) -> Done:
        with fused.active():
            output = model(**batch, use_cache=False)
        return Done(output.loss, (output.get("layout_terms") or {}).get("computed_tokens"))

    return ours


def _trl_loss(model: nn.Module, device: str) -> Callable[[Batch], Done]:
    trainer = trl_trainer(device)

    def loss(batch: Batch) -> Done:
        columns = {}
        for side, half in (("chosen", 0), ("rejected", 1)):
            for name in ("input_ids", "attention_mask", "labels"):
                columns[f"{side}_{name}"] = batch[name].chunk(2)[half]
        return Done(trainer.get_batch_loss_metrics(model, columns)[0])

    return loss


class Record:
    """The rows so far, and the JSON they are written to."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.rows = Rows()
        self.path = options.json or FOLDER / machine.slug(options.device) / FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        command = f"python -m benchmarks.layout_steps --device {options.device} --pairs"
        self.about = {
            "command": " ".join([command, *(str(pairs) for pairs in options.pairs)]),
            "commit": machine.commit(), "machine": machine.describe(options.device),
            "versions": machine.versions(),
        }  # fmt: skip

    def save(self) -> None:
        """Write what there is."""
        self.path.write_text(json.dumps({**self.about, "results": self.rows}, indent=1) + "\n")


class Steps:
    """A model and its batches; `run(name)` takes one step on each batch."""

    def __init__(self, model: nn.Module, shape: Shape, pairs: int, device: str) -> None:
        self.model, self.device = model, device
        self.attention, self.layouts = shape.attention, shape.layouts
        self.batches = batches(shape, pairs, PAIRS // pairs, device)
        self.clock = Stopwatch(device)
        trained = [each for each in model.parameters() if each.requires_grad]
        # With steps of nothing the weights stay: everybody computes the same losses.
        self.optimizer = torch.optim.AdamW(trained, lr=0.0)
        self.weights_bytes = torch.cuda.memory_allocated() if device == "cuda" else 0
        self.losses: dict[str, Callable[[Batch], Done]] = {}

    def attend(self, name: str) -> str:
        """How batches are computed from here on: by the shape's attention where in rows."""
        attention = "sdpa" if name in (TRL, "padded") else self.attention
        self.model.get_base_model().set_attn_implementation(attention)
        return attention

    def run(self, name: str) -> list[Done]:
        """A step on each batch."""
        found = []
        for batch in self.batches:
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                done = self.losses[name](batch)
            done.loss.backward()
            self.optimizer.step()
            found.append(Done(done.loss.detach(), done.computed))
        return found

    def first(self, name: str) -> Row:
        """Losses, tokens computed and peak memory of the first steps."""
        cuda = self.device == "cuda"
        attention = self.attend(name)
        self.losses[name] = loss_of(self.model, name, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        found = self.run(name)
        return {
            "attention": attention,
            "losses": [float(done.loss) for done in found],
            "computed_tokens": sum(
                batch["input_ids"].numel() if done.computed is None else int(done.computed)
                for batch, done in zip(self.batches, found, strict=True)
            ),
            "peak_bytes": torch.cuda.max_memory_allocated() - self.weights_bytes if cuda else None,
        }

    def turn(self, name: str) -> float:
        """Seconds of a step on each batch."""
        self.attend(name)
        return self.clock(lambda: self.run(name))


def refuse_other_losses(rows: dict[str, Row], device: str) -> None:
    """A row whose losses are not TRL's has failed, and is not timed."""
    expected = rows[TRL].get("losses")
    for row in rows.values():
        for mine, theirs in zip(row.get("losses", ()), expected or (), strict=False):
            if not abs(mine - theirs) <= TOLERANCE[device] * abs(theirs):
                row["failed"] = f"its loss is {mine:.5f}, TRL's {theirs:.5f}"


def first_steps(
    steps: Steps, case: Row, until: float, say: Callable[[str], None]
) -> dict[str, Row]:
    """A row of TRL's and of each layout; one of ours is tried however late it is."""
    rows: dict[str, Row] = {}
    for name in (TRL, *steps.layouts):
        rows[name] = {**case, "implementation": name}
        if len(rows) > 2 and time.perf_counter() > until:
            rows[name]["skipped"] = "no time left in this run"
            continue
        rows[name] |= figures_or_reason(partial(steps.first, name))
        say(f"{case['case']}, {name}: first steps")
    return rows


def run_case(
    steps: Steps, case: Row, until: float, say: Callable[[str], None], record: Record
) -> None:
    """Adds the rows of a case to the record, which is written whenever they say more."""
    device, tokens = steps.device, user_tokens(steps.batches)
    rows = first_steps(steps, case | {"tokens": tokens}, until, say)
    record.rows += rows.values()
    refuse_other_losses(rows, device)
    for row in rows.values():
        row.pop("losses", None)
    record.save()

    def add(taken: Seconds) -> None:
        for name, seconds in taken.items():
            rows[name]["time_ms"] = median_iqr([1e3 * each for each in seconds])
            rows[name]["tokens_per_s"] = median_iqr([tokens / each for each in seconds])
            if TRL in taken:
                rows[name]["speed_of_trl"] = median_iqr([1 / each for each in ratios(taken, name)])
        record.save()

    right = [name for name, row in rows.items() if not {"skipped", "failed"} & row.keys()]
    turns = {name: partial(steps.turn, name) for name in right}
    start = threads()
    if turns:
        take_turns(turns, rounds=ROUNDS[device], until=until, after_round=add)
    waiting = waiting_share(start, threads())
    for name in right:
        rows[name]["waiting_share"] = waiting
        if device == "cpu" and (waiting or 0) > MOST_WAITING and case["model"] != "tiny":
            reason = f"other processes ran: threads waited {waiting:.0%} of the time for a core"
            rows[name]["skipped"] = reason
    for row in rows.values():
        print(text(row), flush=True)


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


def text(row: Row) -> str:
    """One line of the table."""
    start = f"{row['case']:14} {row['implementation']:13}"
    if "skipped" in row or "failed" in row:
        return f"{start} {row.get('failed') or row['skipped']}"
    speed, rate = row.get("speed_of_trl"), row["tokens_per_s"]
    of_trl = f", {speed['median']:.3f} ({speed['iqr']:.3f}) of TRL's speed" if speed else ""
    peak = f", {row['peak_bytes'] / 2**30:.2f} GiB" if row["peak_bytes"] is not None else ""
    return (
        f"{start} {row['attention']:15} {rate['median']:7.0f} ({rate['iqr']:.0f}) tokens/s{of_trl}"
        f"{peak}, computes {row['computed_tokens'] / row['tokens']:.2f}"
    )


def run(options: argparse.Namespace, begun: float) -> int:
    """Every case; 1 when a loss was not TRL's."""
    record, say, device = Record(options), saying(begun), options.device
    shapes = ["tiny"] if options.tiny else PLANS[device]
    cases = [(shape, pairs) for shape in shapes for pairs in options.pairs]
    models: dict[str, nn.Module] = {}  # one at a time
    deadline = begun + 60 * options.minutes
    for shape, pairs in cases:
        spec, left = SHAPES[shape], deadline - time.perf_counter()
        case = {"case": f"{shape} P{pairs}", "model": spec.model.name, "pairs": pairs}
        case |= {"attention": spec.attention, "stretch": spec.stretch}
        if left < 0:
            say(f"out of time before {case['case']}")
            break
        if spec.attention.startswith("flash") and importlib.util.find_spec("flash_attn") is None:
            record.rows.append({**case, "implementation": "packed", "skipped": "no flash_attn"})
            continue
        if spec.model.name not in models:
            models.clear()
            models[spec.model.name] = _built(spec.model, device)
            say(f"{spec.model.name} is built")
        steps = Steps(models[spec.model.name], spec, pairs, device)
        run_case(steps, case, time.perf_counter() + left / 2, say, record)
        del steps
        gc.collect()
    record.save()
    skipped = sum("skipped" in row for row in record.rows)
    say(f"{len(record.rows)} results in {record.path}, {skipped} of them no figures")
    return int(any("failed" in row for row in record.rows))


def _built(model: Model, device: str) -> nn.Module:
    made = build(model, device)
    return made.float() if device == "cpu" else made


def main(arguments: list[str] | None = None, begun: float | None = None) -> int:
    """The command line; `begun`: since when its minutes count, default now."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layout_steps", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=settings.device())
    parser.add_argument("--pairs", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument(
        "--minutes", type=float, default=15.0, help="start nothing new after this, imports counted"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that it runs")
    parser.add_argument("--shares", action="store_true", help="of tokens: computes no model")
    parser.add_argument("--json", type=Path, help="instead of results/<machine>/")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    if not options.shares:
        return run(options, time.perf_counter() if begun is None else begun)
    for pairs in options.pairs:
        line = ", ".join(f"{name} {share:.2f}" for name, share in shares(pairs).items())
        print(f"{pairs} pairs: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main(begun=BEGUN))
