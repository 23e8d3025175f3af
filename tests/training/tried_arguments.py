"""Tries the arguments of `TrainingArguments` that change batches, models or metrics, both ways.

    python -m tests.training.tried_arguments     writes docs/training-arguments.md

Two paths, each beside what it stands in for, on a tiny model: `ORPOTrainer` beside TRL's, and a
plain `Trainer` on a fused model beside the same trainer on the unfused one, whose loss is taken
from its logits. What is compared is everything both log: losses, gradient norms, metrics.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import Trainer, TrainingArguments

from orpo_kernels import ORPOLoss, fuse_head
from orpo_kernels.pair_batch import stack_batch
from orpo_kernels.training import PreferenceCollator, prepare_dataset
from tests.tiny_models import build, tiny_tokenizer
from tests.training.runs import CLOCKS, make, pairs, settings

PAGE = Path(__file__).parents[2] / "docs" / "training-arguments.md"
TOLERANCE = 1e-4  # relative where a value is above 1
LOSS = ORPOLoss(beta=0.1)
Logs = list[dict[str, float]]


class Case(NamedTuple):
    """Arguments to try, and how far 16 bits may take two runs apart."""

    name: str  # of the argument, with its value
    changes: dict[str, Any]
    tolerance: float = TOLERANCE
    note: str = ""


def case(tolerance: float = TOLERANCE, note: str = "", **changes: Any) -> Case:
    """The first of `changes` is what is tried; the others go with it."""
    name, value = next(iter(changes.items()))
    return Case(f"{name}={value!r}", changes, tolerance, note)


SAVES = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
ROUGH = 3e-2  # of bfloat16: logits, and all layers below

CASES = {
    "batches": [
        case(per_device_train_batch_size=3),
        case(
            per_device_eval_batch_size=3,
            note="8 pairs: ours are means over pairs, TRL's of batches, the smaller last one too",
        ),
        case(gradient_accumulation_steps=3),
        case(num_train_epochs=1, max_steps=-1),
        case(auto_find_batch_size=True),
        case(dataloader_drop_last=True, per_device_train_batch_size=5),
        case(dataloader_num_workers=1),
        case(dataloader_persistent_workers=True, dataloader_num_workers=1),
        case(dataloader_prefetch_factor=4, dataloader_num_workers=1),
        case(dataloader_in_order=False),
        case(dataloader_pin_memory=False),
        case(accelerator_config={"split_batches": True}),
        case(accelerator_config={"dispatch_batches": True}),
        case(accelerator_config={"even_batches": False}),
        case(accelerator_config={"use_seedable_sampler": False}),
        case(
            remove_unused_columns=True,
            note="`ORPOTrainer` and TRL set it to False; a plain `Trainer` must be given False",
        ),
        case(train_sampling_strategy="sequential"),
        case(train_sampling_strategy="group_by_length"),
        case(length_column_name="length", train_sampling_strategy="group_by_length"),
        case(data_seed=7),
        case(seed=7),
        case(full_determinism=True),
        case(
            average_tokens_across_devices=False,
            gradient_accumulation_steps=2,
            note="with gradient_accumulation_steps=2",
        ),
        case(
            label_smoothing_factor=0.1,
            note="no definition in the ORPO loss; TRL and the unfused loss here ignore it",
        ),
    ],
    "models": [
        case(bf16=True, tolerance=ROUGH),
        case(fp16=True, tolerance=ROUGH),
        case(bf16_full_eval=True, tolerance=ROUGH),
        case(fp16_full_eval=True, tolerance=ROUGH),
        case(gradient_checkpointing=True),
        case(gradient_checkpointing_kwargs={"use_reentrant": True}, gradient_checkpointing=True),
        case(torch_compile=True, torch_compile_backend="aot_eager"),
        case(use_cache=True),
        case(neftune_noise_alpha=5.0),
        case(max_grad_norm=0.1),
        case(weight_decay=0.1),
        case(optim="adafactor"),
        case(optim="sgd"),
        case(lr_scheduler_type="cosine", warmup_steps=2),
        case(torch_empty_cache_steps=1),
        case(debug="underflow_overflow", note="reads the logits, which are never formed"),
    ],
    "metrics": [
        case(eval_on_start=True),
        case(eval_delay=2, eval_strategy="steps", eval_steps=1),
        case(eval_accumulation_steps=1),
        case(eval_do_concat_batches=False),
        case(eval_use_gather_object=True),
        case(prediction_loss_only=False),
        case(
            include_num_input_tokens_seen="all",
            note="TRL's batches have no `input_ids`: it counts 0",
        ),
        case(
            include_for_metrics=["inputs", "loss"],
            note="Trainer joins batches of one length only: `pad_to_multiple_of` of the collator; "
            "TRL: KeyError",
        ),
        case(
            include_for_metrics=["loss"],
            note="what `compute_metrics` gets: test_trainer.py, test_plain_trainer.py",
        ),
        case(logging_first_step=True, logging_steps=3),
        case(logging_strategy="epoch", num_train_epochs=1, max_steps=-1),
        case(logging_nan_inf_filter=False),
        case(skip_memory_metrics=False),
        case(load_best_model_at_end=True, metric_for_best_model="eval_loss", **SAVES),
        case(greater_is_better=True, load_best_model_at_end=True, **SAVES),
        case(save_total_limit=1, **SAVES),
        case(save_only_model=True, **SAVES),
        case(restore_callback_states_from_checkpoint=True, **SAVES),
    ],
}

NOT_TRIED = {
    "of several processes: tests/training/test_distributed.py, test_cut_batches.py": (
        "ddp_backend", "ddp_broadcast_buffers", "ddp_bucket_cap_mb", "ddp_find_unused_parameters",
        "ddp_static_graph", "ddp_timeout", "deepspeed", "fsdp", "fsdp_config", "local_rank",
        "parallelism_config",
    ),
    "of a GPU, or of a library that is not here": (
        "liger_kernel_config", "optim_args", "optim_target_modules", "tf32", "use_liger_kernel",
    ),
    "with another of this page": (
        "eval_steps", "eval_strategy", "max_steps", "metric_for_best_model", "save_steps",
        "save_strategy", "torch_compile_backend", "warmup_steps",
    ),
    "newer names of `gradient_checkpointing` and its keywords": (
        "activation_checkpointing", "activation_checkpointing_kwargs",
    ),
    "of a resumed run: tests/training/test_checkpoints.py": (
        "ignore_data_skip", "resume_from_checkpoint",
    ),
    "changes no batch, model or metric": (
        "adam_beta1", "adam_beta2", "adam_epsilon", "dataloader_multiprocessing_context",
        "disable_tqdm", "do_eval", "do_predict", "do_train", "enable_jit_checkpoint",
        "hub_always_push", "hub_model_id", "hub_private_repo", "hub_revision", "hub_strategy",
        "hub_token", "learning_rate", "log_level", "log_level_replica", "log_on_each_node",
        "logging_steps", "lr_scheduler_kwargs", "output_dir", "project", "push_to_hub",
        "report_to", "run_name", "save_on_each_node", "torch_compile_mode",
        "trackio_bucket_id", "trackio_space_id", "trackio_static_space_id", "use_cpu",
    ),
    "asks for a `compute_metrics` of its own kind: test_batches_of_metrics": (
        "batch_eval_metrics",
    ),
    "a batch of pairs has `labels` and no others": ("label_names",),
}  # fmt: skip


class Unfused(Trainer):
    """Takes the loss of a batch of pairs from the logits of the model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        batch = dict(stack_batch(inputs))
        labels, nll_labels = (batch.pop(name)[:, 1:] for name in ("labels", "nll_labels"))
        output = model(**batch, use_cache=False)
        logps = output.logits[:, :-1].float().log_softmax(2)
        scored = [
            torch.where(each >= 0, logps.gather(2, each.clamp(min=0)[..., None])[..., 0], 0.0)
            for each in (labels, nll_labels)
        ]
        loss = LOSS.from_logps(scored[0], labels, scored[1], nll_labels).loss
        return (loss, {"loss": loss}) if return_outputs else loss


def base(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Three steps and an evaluation, of which everything is logged."""
    return settings(folder, max_steps=3, report_to="none") | {
        "eval_strategy": "steps", "eval_steps": 3, "prediction_loss_only": True, **changes,
    }  # fmt: skip


def trained_by_class(folder: Path, changes: dict[str, Any], *, trl: bool) -> Logs:
    """ORPOTrainer's logs, or TRL's."""
    options = base(folder, changes)
    options.pop("output_dir")
    trainer = make(folder, trl=trl, eval_dataset=pairs(8, seed=1), **options)
    trainer.train()
    return list(trainer.state.log_history)


def trained_plainly(folder: Path, changes: dict[str, Any], *, fused: bool) -> Logs:
    """Logs of a stock trainer on a fused model, or of one that takes the loss from logits."""
    options = {"remove_unused_columns": False, **base(folder, changes)}
    max_length, tokenizer = options.pop("max_length"), tiny_tokenizer()
    model = build("llama")
    with contextlib.ExitStack() as stack:
        if fused:
            stack.enter_context(fuse_head(model, loss=LOSS))
        trainer = (Trainer if fused else Unfused)(
            model,
            TrainingArguments(**options),
            data_collator=PreferenceCollator(tokenizer),
            train_dataset=prepare_dataset(pairs(24), tokenizer, max_length=max_length),
            eval_dataset=prepare_dataset(pairs(8, seed=1), tokenizer, max_length=max_length),
        )
        trainer.train()
    return list(trainer.state.log_history)


def difference(ours: Logs, theirs: Logs) -> float:
    """The largest of what both log, relative where it is above 1; infinite for other logs."""
    if len(ours) != len(theirs):
        return math.inf
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        for name in one.keys() & other.keys():
            if name.endswith(CLOCKS) or "memory" in name or "_mem_" in name:
                continue
            if not math.isfinite(one[name]):
                return math.inf
            worst = max(worst, abs(one[name] - other[name]) / max(1.0, abs(other[name])))
        if ("loss" in one) != ("loss" in other) or ("eval_loss" in one) != ("eval_loss" in other):
            return math.inf
    return worst


def outcome(run: Callable[..., Logs], other: str, tried: Case, flag: str, folder: Path) -> str:
    """What came of a path beside what it stands in for."""
    found: list[Any] = []
    for ours in (True, False):
        value = ours if flag == "fused" else not ours
        try:
            found.append(run(folder / f"{flag}-{ours}", tried.changes, **{flag: value}))
        except Exception as error:
            found.append(error)
    mine, theirs = found
    if isinstance(mine, Exception) and next(iter(tried.changes)) in str(mine):
        return "refused by name"
    if isinstance(mine, Exception):
        if type(mine) is type(theirs):
            return f"{type(mine).__name__}, as {other}"
        return f"fails: {type(mine).__name__}"
    if isinstance(theirs, Exception):
        return f"works; {other}: {type(theirs).__name__}"
    return f"as {other}" if difference(mine, theirs) < tried.tolerance else f"differs from {other}"


def try_case(tried: Case, folder: Path) -> tuple[str, str]:
    """The two cells of a case."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return (
            outcome(trained_by_class, "TRL", tried, "trl", folder),
            outcome(trained_plainly, "unfused", tried, "fused", folder),
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What trainers print goes nowhere."""
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def row(tried: Case, cells: tuple[str, str]) -> str:
    """A line of the table."""
    return f"| `{tried.name}` | {cells[0]} | {cells[1]} | {tried.note} |"


def fields() -> set[str]:
    """All arguments of this version of transformers."""
    return {field.name for field in dataclasses.fields(TrainingArguments)}


def page(rows: dict[str, list[str]]) -> str:
    """The whole page."""
    lines = [
        "# `transformers.TrainingArguments`, one by one", "",
        "Written by `python -m tests.training.tried_arguments`, which tries each on a tiny",
        "Llama; `tests/training/test_tried_arguments.py` tries them again and compares. Every",
        "argument runs twice: `ORPOTrainer` beside TRL 1.16's, and a plain `Trainer` with",
        f"`fuse_head` beside the same trainer (transformers {transformers.__version__}) on the",
        "unfused model, with the ORPO loss of its logits. *as TRL*, *as unfused*: everything that",
        "both log (losses, gradient norms, metrics, evaluation) agrees",
        f"to {TOLERANCE:g}, in 16 bits to {ROUGH:g}. What TRL's",
        "class and ours have besides: [arguments.md](arguments.md).",
    ]  # fmt: skip
    for section, found in rows.items():
        lines += ["", f"## {section.capitalize()}", ""]
        lines += ["| argument | `ORPOTrainer` | `Trainer` + `fuse_head` | |", "|---|---|---|---|"]
        lines += found
    lines += ["", "## Not tried here", "", "| why | arguments |", "|---|---|"]
    lines += [
        f"| {why} | {', '.join(f'`{name}`' for name in names)} |"
        for why, names in NOT_TRIED.items()
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Try everything and write the page."""
    logging.disable(logging.WARNING)
    rows: dict[str, list[str]] = {}
    for section, cases in CASES.items():
        for tried in cases:
            with tempfile.TemporaryDirectory() as folder, quiet():
                cells = try_case(tried, Path(folder))
            rows.setdefault(section, []).append(row(tried, cells))
            sys.stdout.write(rows[section][-1] + "\n")
    PAGE.write_text(page(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
