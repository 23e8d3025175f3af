"""`orpo-kernels profile`: some steps of a run on this machine, part by part.

The options are those of `train`, and the run is the one they describe: model, adapter, layout,
optimizer, accumulation. Only its pairs are made up, of given lengths, and nothing is saved.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from orpo_kernels.constants import IGNORE_INDEX
from orpo_kernels.training.estimate_table import is_shape, load_config, long_name
from orpo_kernels.training.limits import learned_positions, vocabulary_size
from orpo_kernels.training.options import OptionError, Options, parse_options
from orpo_kernels.training.profiling import (
    PARTS,
    LogitsTrainer,
    Plan,
    Profile,
    ProfilingTrainer,
)
from orpo_kernels.training.sources import load_base_model, make_peft_config

FUSED, LOGITS = "fused head", "logits built"
PICTURE = "profile.png"
MIB = 2**20
_FEWEST = "--lengths takes the tokens of prompt, chosen and rejected answer, one triple or more"


class Lengths(NamedTuple):
    """Tokens of a pair."""

    prompt: int
    chosen: int
    rejected: int


def make_pairs(lengths: Sequence[Lengths], count: int, vocab_size: int) -> Dataset:
    """`count` prepared rows of random tokens, whose lengths take turns.

    Args:
        lengths: of the pairs; the first answer tokens differ.
        count: of rows.
        vocab_size: token ids are below it.

    Returns:
        A dataset with the columns `COLUMNS`.
    """
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(count):
        prompt, *answers = lengths[index % len(lengths)]
        shared = torch.randint(vocab_size, (prompt,), generator=generator).tolist()
        row: dict[str, Any] = {}
        for number, (side, tokens) in enumerate(zip(("chosen", "rejected"), answers, strict=True)):
            answer = torch.randint(vocab_size, (tokens,), generator=generator)
            answer[0] = number
            row[f"{side}_input_ids"] = [*shared, *answer.tolist()]
            row[f"{side}_labels"] = [IGNORE_INDEX] * prompt + answer.tolist()
        rows.append(row)
    return Dataset.from_list(rows)


def run(
    options: Options, lengths: Sequence[Lengths], plan: Plan, *, logits: bool = True
) -> dict[str, Profile | None]:
    """Profile the run with the fused head, then on logits.

    Args:
        options: of the run; `max_steps` is `plan.total`.
        lengths: of its pairs.
        plan: what to measure; the trace is of the fused head.
        logits: measure the second as well.

    Returns:
        By name of the column; None where it ran out of the GPU's memory.

    Raises:
        OptionError: a run that cannot be profiled.
    """
    _refuse(options)
    tokenizer = _tokenizer()
    model: Any = _model(options, tokenizer)
    positions = learned_positions(model)
    if positions is not None and positions < max(sum(each[:2]) for each in lengths):
        raise OptionError(f"the model has {positions} positions; give shorter --lengths")
    peft_config = make_peft_config(options.model)
    training = options.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * plan.total
    found: dict[str, Profile | None] = {}
    kinds = {FUSED: ProfilingTrainer, **({LOGITS: LogitsTrainer} if logits else {})}
    for name, kind in kinds.items():
        try:
            trainer = kind(
                model, training, peft_config=peft_config, processing_class=tokenizer,
                train_dataset=make_pairs(lengths, rows, vocabulary_size(model)),
            )  # fmt: skip
        except (ValueError, TypeError, NotImplementedError, ImportError) as error:
            raise OptionError(str(error)) from error
        model, peft_config = trainer.model, None  # with its adapter from now on
        try:
            found[name] = trainer.profile(plan if name == FUSED else Plan(plan.steps))
        except torch.OutOfMemoryError:
            found[name] = None
        del trainer
        model.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return found


def table(found: dict[str, Profile | None], tokens: float) -> str:
    """What `orpo-kernels profile` prints.

    Args:
        found: of `run`.
        tokens: of both sequences of a step's pairs, without padding.

    Returns:
        Several lines.
    """
    lines = [" " * 24 + "".join(f"{name:>28}" for name in found)]
    lines.append(" " * 24 + f"{'ms':>11}{'share':>8}{'MiB':>9}" * len(found))
    for part in PARTS:
        lines.append(f"{part:<24}" + "".join(_cells(each, part) for each in found.values()))
    steps = [each for each in found.values() if each is not None]
    whole = "".join(_whole(each) for each in found.values())
    lines.append(f"{'a step':<24}{whole}")
    rates = [
        f"{'out of memory' if each is None else f'{tokens / each.step_seconds:,.0f}':>28}"
        for each in found.values()
    ]
    lines.append(f"{'tokens/s':<24}{''.join(rates)}")
    if len(steps) == 2:
        speed = steps[1].step_seconds / steps[0].step_seconds
        lines += ["", f"A step with the fused head has {speed:.2f} times the speed."]
    return "\n".join(lines)


def main(words: Sequence[str]) -> int:
    """`orpo-kernels profile`: the options of `train`, and its own.

    Args:
        words: arguments after `profile`.

    Returns:
        0.

    Raises:
        OptionError: unusable options, or a run that cannot be profiled.
    """
    parser = _own_parser()
    if not words or any(word in ("-h", "--help") for word in words):
        parser.print_help()
        return 0
    own, rest = parser.parse_known_args(list(words))
    plan = Plan(own.steps, own.trace)
    with tempfile.TemporaryDirectory() as folder:
        always = [
            f"--output_dir={folder}", f"--max_steps={plan.total}", "--save_strategy=no",
            "--eval_strategy=no", "--logging_strategy=no", "--report_to=none",
            "--load_best_model_at_end=false", "--push_to_hub=false", "--disable_tqdm=true",
        ]  # fmt: skip
        options = parse_options([*(long_name(word) for word in rest), *always])
        lengths = _lengths(own.lengths, options.training.resolved_max_length)
        found = run(options, lengths, plan, logits=own.logits)
    training = options.training
    pairs = training.per_device_train_batch_size * training.gradient_accumulation_steps
    # Lengths take turns over all pairs of the run: a mean step has their mean.
    tokens = pairs * sum(2 * a + b + c for a, b, c in lengths) / len(lengths)
    sys.stdout.write(_title(options, lengths, plan) + "\n\n" + table(found, tokens) + "\n\n")
    sys.stdout.write(_draw(found, own.picture) + "\n")
    if own.trace is not None:
        sys.stdout.write(f"trace of one more step in {own.trace}\n")
    return 0


def _own_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="orpo-kernels profile",
        usage="%(prog)s [CONFIG.yaml] [--model MODEL] [--lengths PROMPT CHOSEN REJECTED] "
        "[--pairs P]\n                            [any other option of `orpo-kernels train`]",
        description="Where the time and the memory of a step go on this machine, on pairs of random"
        " tokens. MODEL is a folder, a hub name, or, with random weights, a config.json or one of "
        "the shapes that `orpo-kernels estimate` knows.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[],
        help="tokens of prompt, chosen and rejected answer; several triples take turns "
        "(default: T/2, T/2 and T/4 of max_length T)",
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=3, help="steps to measure (default: 3)")
    parser.add_argument(
        "--logits", action=argparse.BooleanOptionalAction, default=True,
        help="measure the same steps on the model's logits as well",
    )  # fmt: skip
    parser.add_argument("--trace", type=Path, help="write a Chrome trace of one more step")
    parser.add_argument(
        "--picture", type=Path, default=Path(PICTURE), help=f"PNG to write (default: {PICTURE})"
    )
    return parser


def _lengths(numbers: Sequence[int], max_length: int) -> list[Lengths]:
    if not numbers:
        half = max(1, max_length // 2)
        return [Lengths(half, max(1, max_length - half), max(1, max_length // 4))]
    if len(numbers) % 3 or min(numbers) < 1:
        raise OptionError(f"{_FEWEST}, each at least 1; got {' '.join(map(str, numbers))}")
    return [Lengths(*numbers[start : start + 3]) for start in range(0, len(numbers), 3)]


def _refuse(options: Options) -> None:
    if options.training.world_size > 1:
        raise OptionError("profile is for one device: start it without torchrun or accelerate")
    device = options.training.device
    if device.type not in ("cpu", "cuda"):
        raise OptionError(
            f"profile reads the clocks of a CPU and of CUDA or ROCm devices, and not those of "
            f"{device.type}: --use_cpu"
        )
    if options.training.torch_compile:
        raise OptionError("profile looks between the modules of a step: leave torch_compile out")


def _model(options: Options, tokenizer: Any) -> Any:
    model = options.model
    name = model.model_name_or_path
    if name is None:
        raise OptionError("which model? Give --model NAME, FOLDER or config.json, or a recipe")
    if not is_shape(name):
        return load_base_model(options, tokenizer)
    if model.load_in_4bit or model.load_in_8bit:
        raise OptionError(
            f"{name} is a shape without weights, and quantised ones are made of weights that are "
            "loaded: give a model folder or a hub name, or --load_in_4bit false"
        )
    auto: Any = AutoModelForCausalLM
    dtype = torch.float32 if model.dtype == "auto" else getattr(torch, model.dtype)
    return auto.from_config(
        load_config(name), dtype=dtype, attn_implementation=model.attn_implementation
    )


def _tokenizer() -> Any:
    """One that knows a pad token: the pairs are tokens already."""
    model = WordLevel({"<pad>": 0}, unk_token="<pad>")
    tokenizer: Any = PreTrainedTokenizerFast
    return tokenizer(tokenizer_object=Tokenizer(model), pad_token="<pad>")


def _cells(profile: Profile | None, part: str) -> str:
    if profile is None:
        return f"{'-':>11}{'-':>8}{'-':>9}"
    seconds = profile.seconds[part]
    share = seconds / profile.step_seconds
    return f"{1e3 * seconds:>11.1f}{share:>8.1%}{profile.peak_bytes[part] / MIB:>9,.0f}"


def _whole(profile: Profile | None) -> str:
    if profile is None:
        return f"{'-':>11}{'-':>8}{'-':>9}"
    peak = max(profile.peak_bytes.values()) / MIB
    return f"{1e3 * profile.step_seconds:>11.1f}{1:>8.1%}{peak:>9,.0f}"


def _title(options: Options, lengths: Sequence[Lengths], plan: Plan) -> str:
    training = options.training
    device = training.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    pairs, batches = training.per_device_train_batch_size, training.gradient_accumulation_steps
    each = ", ".join(f"{a} + {b} | {c}" for a, b, c in lengths)
    kind = "allocated" if device.type == "cuda" else "resident"
    return (
        f"{options.model.model_name_or_path} on {where}: {batches} x {pairs} pairs a step of "
        f"{each} tokens (prompt + chosen | rejected),\nbatch_layout {training.batch_layout}; mean "
        f"of {plan.steps} steps; MiB: {kind} at most, over what is held before the first step"
    )


def _draw(found: dict[str, Profile | None], path: Path) -> str:
    try:
        from orpo_kernels.training import plots
    except ImportError:
        return "no picture: matplotlib is not installed. pip install 'orpo_kernels[plot]'"
    plots.profile({name: each for name, each in found.items() if each is not None}, PARTS, path)
    return f"picture in {path}"
