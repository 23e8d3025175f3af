"""The options of `orpo-kernels train`: dataclasses, a YAML file of defaults, and flags.

Parsed by transformers' `HfArgumentParser`. The names are those of TRL's scripts (`ModelConfig`,
`ScriptArguments`) where TRL has them, so that its recipes carry over. Every value of the file goes
through the parser as the flag of the same name would: one set of types and one set of messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml
from transformers import HfArgumentParser

from orpo_kernels.options import ELSEWHERE, did_you_mean
from orpo_kernels.training.config import ORPOConfig


class OptionError(ValueError):
    """Something the user wrote cannot be used; the message says what and what to do."""


@dataclass
class ModelOptions:
    """The model, how it is loaded, and the adapter."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to train: hub name or folder."}
    )
    model_revision: str = field(
        default="main", metadata={"help": "Branch, tag or commit of the model on the hub."}
    )
    dtype: str = field(
        default="float32",
        metadata={
            "help": "dtype of the weights; auto: as saved.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention, e.g. sdpa or flash_attention_2."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train a LoRA adapter."})
    lora_r: int = field(default=16, metadata={"help": "Rank of the adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of the adapter, times its rank."})
    lora_dropout: float = field(
        default=0.05,
        metadata={"help": "Dropout of the adapter; only with disable_dropout false."},
    )
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Modules to adapt, or all-linear; PEFT's choice for the model if unset."},
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules to train in full, e.g. lm_head embed_tokens."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha / sqrt(r)."})
    use_dora: bool = field(default=False, metadata={"help": "Weight-decomposed LoRA."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise to 8 bits on loading."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise to 4 bits on loading."})
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata={"help": "4-bit data type.", "choices": ["fp4", "nf4"]}
    )
    bnb_4bit_compute_dtype: str | None = field(
        default=None,
        metadata={
            "help": "dtype of the 4-bit layers' products; `dtype` if unset.",
            "choices": ["bfloat16", "float16", "float32"],
        },
    )
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "Quantise the quantisation constants too."}
    )

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("load_in_4bit and load_in_8bit are both set; choose one")
        if (self.load_in_4bit or self.load_in_8bit) and not self.use_peft:
            raise ValueError(
                "a quantised model can only be trained through an adapter; set use_peft: true"
            )
        if self.bnb_4bit_compute_dtype is None:
            self.bnb_4bit_compute_dtype = "bfloat16" if self.dtype == "auto" else self.dtype


@dataclass
class DataOptions:
    """The preference pairs and the chat template."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Hub name, or a local file (JSON, JSONL, Parquet, Arrow, CSV, TSV, also "
            "compressed), a folder of them (train.jsonl, test.jsonl), a pattern (data/*.csv), or a "
            "folder that save_to_disk wrote."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset on the hub."}
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str = field(
        default="test", metadata={"help": "Split to evaluate on, if the dataset has it."}
    )
    eval_fraction: float | None = field(
        default=None,
        metadata={"help": "Hold out this share of the training split and evaluate on it."},
    )
    max_samples: int | None = field(
        default=None, metadata={"help": "Use a random sample of this many pairs (by seed)."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={"help": "chatml, or a file with a Jinja template; the tokenizer's own if unset."},
    )

    def __post_init__(self) -> None:
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise ValueError(
                f"eval_fraction must be between 0 and 1 (0.05 holds out every 20th pair), "
                f"got {self.eval_fraction}"
            )
        if self.max_samples is not None and self.max_samples < 1:
            raise ValueError(f"max_samples must be at least 1, got {self.max_samples}")


@dataclass
class RunOptions:
    """What to do about an earlier run in the output folder, and with the adapter of this one."""

    resume: bool = field(
        default=False,
        metadata={"help": "Continue the run in output_dir from its last complete checkpoint."},
    )
    merge_adapter: bool = field(
        default=False,
        metadata={
            "help": "At the end, merge the adapter into its base model, reloaded in `dtype` "
            "without quantisation, and save that in output_dir/merged."
        },
    )


class Options(NamedTuple):
    """Everything `orpo-kernels train` was told."""

    model: ModelOptions
    data: DataOptions
    training: ORPOConfig
    run: RunOptions


# What other trainers call the same thing, where no spelling distance would find it.
_ELSEWHERE = {
    **ELSEWHERE,
    "base_model": "model_name_or_path",
    "torch_dtype": "dtype",
    "cutoff_len": "max_length",
    "sequence_len": "max_length",
    "max_prompt_length": "max_length",
    "lora_rank": "lora_r",
    "adapter": "use_peft",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "bnb_4bit_use_double_quant": "use_bnb_nested_quant",
}


# What says where and how fast a run is, and not what it takes.
_OF_THE_MACHINE: dict[str, Any] = {
    "use_cpu": True, "bf16": None, "fp16": False, "tf32": None, "bf16_full_eval": False,
    "fp16_full_eval": False, "deepspeed": None, "ddp_backend": None,
}  # fmt: skip


class _Parser(HfArgumentParser):
    fixed: Mapping[str, Any] = {}
    fp16 = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        namespace, rest = super().parse_known_args(args, namespace)
        self.fp16 = bool(namespace.fp16)
        vars(namespace).update(self.fixed)
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        # argparse would print the usage, 190 flags long, and leave.
        raise OptionError(message)


def make_parser() -> Any:
    """The `HfArgumentParser` of all options."""
    kinds: Any = (ModelOptions, DataOptions, RunOptions, ORPOConfig)
    return _Parser(
        kinds,
        prog="orpo-kernels train",
        usage="orpo-kernels train [CONFIG.yaml] [--option value ...]",
        description="ORPO fine-tuning. CONFIG.yaml holds any of the options below as "
        "`name: value`; options on the command line override it.",
        allow_abbrev=False,
    )


def parse_options(argv: Sequence[str], *, elsewhere: bool = False) -> Options:
    """Read `[CONFIG.yaml] [--option value ...]`.

    Args:
        argv: the arguments after `train`.
        elsewhere: the run is for another machine: options that need its GPU, or a library that is
            there, are set aside instead of checked against this one; `fp16` is kept, unchecked.

    Returns:
        The options; `output_dir` is `runs/<name of the file>` where nobody chose one.

    Raises:
        OptionError: no such file, malformed YAML, an unknown option (the message names the
            nearest), a wrong type or value.
    """
    parser = make_parser()
    parser.fixed = _OF_THE_MACHINE if elsewhere else {}
    flags = list(argv)
    path, from_file = Path(), list[str]()
    if flags and not flags[0].startswith("-"):
        path = Path(flags.pop(0))
        parser.set_defaults(output_dir=str(Path("runs") / path.stem))
        from_file = _as_flags(read_config(path), parser, path)
    try:
        model, data, run, training = _parse(parser, [*from_file, *flags])
    except OptionError as error:
        raise OptionError(_where(parser, from_file, path, error) + str(error)) from error
    if elsewhere:
        training.fp16 = parser.fp16
    word = str(training.resume_from_checkpoint).lower()
    if word in ("true", "false"):  # in Python it takes these besides a path
        training.resume_from_checkpoint = None
        run.resume = run.resume or word == "true"
    if run.merge_adapter and not model.use_peft:
        raise OptionError(
            "merge_adapter is for a run that trains an adapter; set use_peft: true, or leave it out"
        )
    return Options(model, data, training, run)


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Args:
        path: of the file.

    Returns:
        Option names to values.

    Raises:
        OptionError: no such file, not readable, not YAML, not a mapping of names.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OptionError(f"no such config file: {path} (in {Path.cwd()})") from None
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read the config file {path}: {error}") from None
    except yaml.YAMLError as error:
        raise OptionError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise OptionError(
            f"{path} must hold `name: value` lines, got {type(config).__name__}; "
            "see the recipes in examples/"
        )
    return config


def _as_flags(config: Mapping[str, Any], parser: Any, path: Path) -> list[str]:
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    flags: list[str] = []
    for key, value in config.items():
        if key not in actions:
            raise OptionError(f"{path}: unknown option {key!r}{_suggestion(key, list(actions))}")
        if value is None or value == []:
            parser.set_defaults(**{key: None})
        elif isinstance(value, list) and key == "report_to":
            parser.set_defaults(report_to=value)  # a list as well, though the flag takes one word
        elif isinstance(value, list):
            flags += _list_flags(key, value, actions[key], path)
        else:
            flags.append(f"--{key}={_as_text(value, actions[key])}")
    return flags


def _list_flags(key: str, value: list[Any], action: Any, path: Path) -> list[str]:
    if action.nargs != "+" or not all(isinstance(item, str | int | float) for item in value):
        wanted = "a list of plain values" if action.nargs == "+" else "one value"
        raise OptionError(f"{path}: {key} takes {wanted}, got {value}")
    return [f"--{key}", *(str(item) for item in value)]


def _as_text(value: Any, action: Any) -> str:
    if isinstance(value, dict):
        return json.dumps(value)
    if isinstance(value, bool):
        # YAML reads `no` as false; `eval_strategy: no` and `report_to: no` mean the word.
        if not value and "no" in (action.choices or ()):
            return "no"
        return str(value).lower()
    return str(value)


def _parse(parser: Any, flags: list[str]) -> tuple[Any, ...]:
    try:
        *options, rest = parser.parse_args_into_dataclasses(
            flags, return_remaining_strings=True, look_for_args_file=False
        )
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        # argparse says "argument --max_length/--max-length: ...".
        raise OptionError(re.sub(r"^argument --(\w+)\S*: ", r"\1: ", str(error))) from error
    if rest:
        raise OptionError(_explain(rest[0], parser))
    return tuple(options)


def _where(parser: Any, from_file: list[str], path: Path, error: OptionError) -> str:
    """The file's name, if the same mistake is there without the flags of the command line."""
    try:
        _parse(parser, from_file)
    except OptionError as alone:
        return f"{path}: " if str(alone) == str(error) else ""
    return ""


def _explain(word: str, parser: Any) -> str:
    if not word.startswith("--"):
        return f"unexpected argument {word!r}; options are written --name value"
    name = word[2:].partition("=")[0].replace("-", "_")
    known = [action.dest for action in parser._actions]
    near = _suggestion(name, known)
    return f"unknown option --{name}{near}"


def _suggestion(name: str, known: Sequence[str]) -> str:
    near = did_you_mean(name, known, _ELSEWHERE)
    return near or "; `orpo-kernels train --help` lists them all"
