"""`orpo-kernels train`: options to a trained, saved and evaluated model and its report."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from orpo_kernels.training import report
from orpo_kernels.training.checkpoints import last_complete_checkpoint, saving
from orpo_kernels.training.merging import merge_adapter
from orpo_kernels.training.options import OptionError, Options
from orpo_kernels.training.sources import (
    load_base_model,
    load_pairs,
    load_tokenizer,
    make_peft_config,
)
from orpo_kernels.training.trainer import ORPOTrainer


def run(options: Options) -> dict[str, Any]:
    """Train, save, evaluate, report.

    `output_dir` then holds the model (or adapter) and tokenizer, `metrics.json`,
    `trainer_state.json` with every logged value, and `report.png`; with `merge_adapter`, the merged
    model in `merged`. With `push_to_hub` transformers' own call pushes it.

    Args:
        options: of the run.

    Returns:
        The contents of `metrics.json`, see `report.collect`.

    Raises:
        OptionError: the options do not fit each other, the files or the data.
    """
    folder = Path(str(options.training.output_dir))
    check_output_folder(folder, options)
    trainer = make_trainer(options)
    _say(trainer, _opening(trainer, folder))
    started = time.monotonic()
    result = _train(trainer, options)
    _save(trainer, folder)
    _evaluate_at_end(trainer)
    if options.run.merge_adapter and trainer.is_world_process_zero():
        hub_name = trainer.hub_model_id if options.training.push_to_hub else None
        merged = merge_adapter(options, trainer.processing_class, hub_name)
        _say(trainer, f"adapter and base model are merged in {merged}")
    seconds = time.monotonic() - started
    metrics = report.collect(trainer.state, result.metrics, seconds, trainer.args.device)
    if trainer.is_world_process_zero():
        (folder / report.METRICS_FILE).write_text(json.dumps(metrics, indent=2) + "\n")
        trainer.state.save_to_json(str(folder / report.STATE_FILE))
        _say(trainer, report.table(metrics))
        _say(trainer, f"saved to {folder}; {report.draw([folder], folder / report.PLOT_FILE)}")
    return metrics


def check_output_folder(folder: Path, options: Options) -> None:
    """Before anything is loaded: is the output folder free, or has it what is to be continued?

    Args:
        folder: `output_dir`.
        options: of the run.

    Raises:
        OptionError: naming the options that resolve it.
    """
    if folder.exists() and not folder.is_dir():
        raise OptionError(f"output_dir must be a folder, but {folder} is a file")
    if options.run.resume:
        try:
            last_complete_checkpoint(folder)
        except FileNotFoundError:
            raise OptionError(
                f"--resume needs a complete {PREFIX_CHECKPOINT_DIR}-<step> folder in {folder}, "
                "there is none; start without --resume"
            ) from None
    elif (
        options.training.resume_from_checkpoint
        or options.training.overwrite_output_dir  # done when training starts, not before
        or not options.training.should_save
    ):
        return
    elif folder.is_dir() and any(folder.iterdir()):
        raise OptionError(
            f"output_dir {folder} is not empty; continue the run in it with --resume, replace it "
            "with --overwrite_output_dir, or choose another --output_dir"
        )


def make_trainer(options: Options) -> ORPOTrainer:
    """Load what the options name and put it into an `ORPOTrainer`.

    Raises:
        OptionError: something cannot be loaded, or the trainer refuses it.
    """
    train, evaluation = load_pairs(options)
    tokenizer = load_tokenizer(options)
    peft_config = make_peft_config(options.model)
    model = load_base_model(options, tokenizer)
    try:
        return ORPOTrainer(
            model,
            options.training,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    # OSError and RuntimeError: `report_to` a library that is not there, a hub out of reach.
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        raise OptionError(str(error)) from error


def _train(trainer: ORPOTrainer, options: Options) -> Any:
    args = options.training
    try:
        result = trainer.train(
            resume_from_checkpoint=options.run.resume or args.resume_from_checkpoint
        )
    except (OSError, ValueError) as error:
        raise OptionError(str(error)) from error
    if trainer.state.global_step == 0 and args.max_steps != 0 and args.num_train_epochs != 0:
        pairs = len(cast(Any, trainer.train_dataset))
        raise OptionError(
            f"no step was taken, and nothing is saved: {pairs} pairs in batches of "
            f"{args.train_batch_size}, dataloader_drop_last={args.dataloader_drop_last}, "
            f"num_train_epochs={args.num_train_epochs}, max_steps={args.max_steps}; a batch must "
            "be full where others are dropped, and epochs or steps more than 0"
        )
    return result


def _save(trainer: ORPOTrainer, folder: Path) -> None:
    try:
        with saving(folder):
            trainer.save_model()
            trainer.save_state()
    except OSError as error:
        raise OptionError(str(error)) from error


def _evaluate_at_end(trainer: ORPOTrainer) -> None:
    """Evaluate what is saved, unless the last step of the training did."""
    if trainer.eval_dataset is None:
        return
    step = trainer.state.global_step
    done = any(e["step"] == step and "eval_loss" in e for e in trainer.state.log_history)
    if not done or trainer.args.load_best_model_at_end:
        trainer.evaluate()


def _opening(trainer: ORPOTrainer, folder: Path) -> str:
    model: Any = trainer.model
    total = sum(_count(p) for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    train, evaluation = (cast(Any, d) for d in (trainer.train_dataset, trainer.eval_dataset))
    held_out = "" if evaluation is None else f", {len(evaluation)} held out"
    return (
        f"{type(model).__name__}: {trained:,} of {total:,} parameters are trained, on "
        f"{trainer.args.device}; {len(train)} pairs{held_out}; "
        f"beta {trainer.args.beta}; output in {folder}"
    )


def _count(parameter: torch.nn.Parameter) -> int:
    # bitsandbytes packs two 4-bit weights into a byte.
    packed = parameter.dtype == torch.uint8 and type(parameter).__name__ == "Params4bit"
    return parameter.numel() * (2 if packed else 1)


def _say(trainer: ORPOTrainer, text: str) -> None:
    if trainer.is_world_process_zero():
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
