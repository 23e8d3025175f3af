"""The trainer's arguments: which go together, and which of Trainer's settings must change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from transformers import EvalPrediction, Trainer

from orpo_kernels.training.config import ORPOConfig
from orpo_kernels.training.offload import refuse_offload_on_cpu

logger = logging.getLogger(__name__)


def named_datasets(train_dataset: Any, eval_dataset: Any) -> list[tuple[str, Any]]:
    """The datasets that were given, with the names messages call them by.

    Args:
        train_dataset: dataset or None.
        eval_dataset: dataset, dictionary of several, or None.

    Returns:
        (name, dataset) of each.
    """
    several = isinstance(eval_dataset, Mapping)
    named = [(f"eval_dataset[{name!r}]", d) for name, d in eval_dataset.items()] if several else []
    if not several:
        named.append(("eval_dataset", eval_dataset))
    named.append(("train_dataset", train_dataset))
    return [(name, dataset) for name, dataset in named if dataset is not None]


def check_arguments(model: Any, args: Any, model_init: Any, preprocess_logits: Any) -> None:
    """Refuse arguments of the trainer that contradict each other, before anything is loaded.

    Args:
        model: as passed to the trainer, like all others.
        args: arguments of the run.
        model_init: function that makes models.
        preprocess_logits: function on logits.

    Raises:
        TypeError: `args` is not an `ORPOConfig`.
        ValueError: both or none of `model` and `model_init`; `model_init_kwargs` without a name.
        NotImplementedError: logits are asked for.
    """
    if not isinstance(args, ORPOConfig):
        raise TypeError(
            f"args must be an ORPOConfig, got {type(args).__name__}; it takes the same arguments "
            "as transformers.TrainingArguments and TRL's ORPOConfig"
        )
    if (model is None) == (model_init is None):
        raise ValueError(
            f"exactly one of model and model_init is needed, got model={type(model).__name__} and "
            f"model_init={type(model_init).__name__}"
        )
    if not isinstance(model, str) and args.model_init_kwargs:
        raise ValueError(
            "model_init_kwargs are for a model given by name, but it is loaded already; pass them "
            "to from_pretrained"
        )
    if preprocess_logits is not None:
        raise NotImplementedError(
            "preprocess_logits_for_metrics needs logits, which are never formed; compute_metrics "
            "gets the mean log-probs of the pairs instead: predictions (N, 2), chosen and rejected"
        )


def adapt_arguments(args: ORPOConfig) -> None:
    """Change settings of Trainer that do not go with batches of pairs.

    Args:
        args: arguments of the run; changed.

    Raises:
        ValueError: `activation_offload` on a CPU.
    """
    refuse_offload_on_cpu(args)
    args.remove_unused_columns = False  # it goes by the model's signature
    if args.n_gpu > 1:
        logger.warning(
            "torch.nn.DataParallel copies a model without its fused head: of the %d devices one is "
            "used. Start with `torchrun --nproc-per-node` or `accelerate launch` for all.",
            args.n_gpu,
        )
        args._n_gpu = 1
    if args.use_liger_kernel:
        # Its loss would be put in the place of the model's forward, whose head is fused here.
        args.liger_kernel_config = {
            **(args.liger_kernel_config or {}),
            "fused_linear_cross_entropy": False,
            "cross_entropy": False,
        }
        logger.warning(
            "use_liger_kernel: Liger's layers are used, and not its cross-entropy losses; the loss "
            "is ORPO's, from the fused head"
        )
    accelerator: Any = args.accelerator_config
    if accelerator.dispatch_batches is None:
        # One rank would read a stream for all and join batches, which are not of one length.
        accelerator.dispatch_batches = False


def check_batch(batch: Mapping[str, Any]) -> None:
    """Refuse a batch that is not one of pairs, as another collator's would be.

    Args:
        batch: what the data collator made.

    Raises:
        ValueError: no labels, or labels that are not (P, 2, T).
    """
    if "labels" not in batch:
        raise ValueError(
            f"a batch must have input_ids, attention_mask and labels, got {list(batch)}; use "
            "PreferenceCollator as data_collator"
        )
    if batch["labels"].ndim != 3:
        raise ValueError(
            "labels of a batch must be (P, 2, T), chosen and rejected of each pair, got "
            f"{tuple(batch['labels'].shape)}; use PreferenceCollator as data_collator"
        )


def refuse_split_sequences(context_size: int, sequence_size: int) -> None:
    """Refuse layouts that cut a sequence across ranks.

    Args:
        context_size: ranks of context parallelism.
        sequence_size: ranks of sequence parallelism.

    Raises:
        NotImplementedError: more than one of either.
    """
    if context_size * sequence_size > 1:
        raise NotImplementedError(
            "context and sequence parallelism cut a sequence across ranks, which the means over "
            f"its tokens do not allow (got sizes {context_size} and {sequence_size}); use data "
            "parallelism, FSDP or ZeRO"
        )


def say_what_is_scaled(trainer: Any, is_scaled: bool) -> None:
    """Whether the loss is already divided for gradient accumulation, in old and new ways.

    Args:
        trainer: a `transformers.Trainer`; changed.
        is_scaled: it is.
    """
    trainer.loss_is_scaled_for_ga = is_scaled
    trainer.model_accepts_loss_kwargs = False
    if is_scaled and not hasattr(Trainer, "loss_is_scaled_for_ga"):
        # transformers < 5.19 divides unless there is a loss function; ours is never called.
        trainer.compute_loss_func = _never_called


def _never_called(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("ORPOTrainer.compute_loss computes the loss; do not call this")


def explained(compute_metrics: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Let a user's metric that fails say what it was given.

    Args:
        compute_metrics: the user's function.

    Returns:
        The same function, whose errors become a ValueError that describes its input.
    """

    @wraps(compute_metrics)
    def compute(prediction: EvalPrediction, **kwargs: Any) -> dict[str, Any]:
        try:
            return compute_metrics(prediction, **kwargs)
        except Exception as error:
            raise ValueError(
                f"compute_metrics failed ({type(error).__name__}: {error}). It must work without "
                "logits, which are never formed: it gets predictions (N, 2), the mean log-probs "
                "of chosen and rejected answer, and label_ids (N,), 0 or -100 for skipped pairs"
            ) from error

    return compute
