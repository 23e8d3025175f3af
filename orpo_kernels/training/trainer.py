"""ORPOTrainer: `transformers.Trainer` on the fused ORPO loss, with TRL's arguments and metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from datasets import IterableDataset
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, TrainOutput, has_length

from orpo_kernels.constants import IGNORE_INDEX
from orpo_kernels.integrations.transformers import FusedHead
from orpo_kernels.loss import ORPOLoss, count_terms
from orpo_kernels.pair_batch import stack_batch
from orpo_kernels.training.arguments import (
    adapt_arguments,
    check_arguments,
    check_batch,
    explained,
    named_datasets,
    refuse_split_sequences,
    say_what_is_scaled,
)
from orpo_kernels.training.checkpoints import (
    check_complete,
    check_fits,
    check_output_dir,
    last_complete_checkpoint,
    load_renamed,
    saving,
)
from orpo_kernels.training.collator import PADDING, PreferenceCollator
from orpo_kernels.training.config import ORPOConfig
from orpo_kernels.training.data import check_dataset, prepare_dataset
from orpo_kernels.training.evaluation import EvaluationSums, EvenStream
from orpo_kernels.training.guard_state import guard_callbacks
from orpo_kernels.training.limits import bounded_length, vocabulary_size
from orpo_kernels.training.metrics import MetricSums, pair_table
from orpo_kernels.training.model_setup import (
    head_fusing,
    load_model,
    load_processing_class,
    refuse_frozen,
    set_up_model,
)
from orpo_kernels.training.sampling import by_length_again


class ORPOTrainer(Trainer):
    """Train a causal LM on preference pairs with the ORPO loss, without logits.

    Drop-in for TRL's class of this name: same arguments, data formats, metric names, numbers.
    The output head of `model` is fused (`fuse_head`) for the trainer's own calls and no others: in
    callbacks and afterwards the model is the one that was given. For a call of one's own that
    returns the loss, `with trainer.fused_head.active():`.

    Args:
        model: causal LM, `PeftModel`, or a hub name or folder to load (`model_init_kwargs`).
        args: the run's arguments; `ORPOConfig()` if None.
        data_collator: makes batches as `PreferenceCollator`, which is the default.
        train_dataset: see `prepare_dataset`; a prepared one is taken as it is.
        eval_dataset: the same, or a dictionary of several.
        processing_class: tokenizer, or processor with one; loaded by the model's name if None.
        model_init: returns a fresh model for every `train()`, instead of `model`.
        callbacks: further callbacks.
        optimizers: optimizer and scheduler to use.
        preprocess_logits_for_metrics: refused, there are no logits.
        peft_config: adapters to add; a quantised model is prepared for training first.
        compute_metrics: called after an evaluation, on all its N pairs, with `predictions` (N, 2)
            float32, the mean log-probs (nats) of chosen and rejected answer, and `label_ids` (N,),
            the column of the preferred answer: 0, or -100 where an answer has no scored token.

    Raises:
        TypeError: arguments of a wrong type.
        ValueError: no model, no tokenizer, unusable data, contradicting arguments.
        NotImplementedError: an encoder-decoder model, a head that cannot be fused, logits asked
            for, context or sequence parallelism.
    """

    args: ORPOConfig
    fused_head: FusedHead
    # Read by transformers >= 5.19; see `say_what_is_scaled` for older ones.
    loss_is_scaled_for_ga: bool | None = False

    def __init__(  # noqa: PLR0913 - TRL's signature
        self,
        model: nn.Module | str | None = None,
        args: ORPOConfig | None = None,
        data_collator: Callable[[Any], dict[str, Any]] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        peft_config: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, Any]] | None = None,
    ) -> None:
        args = ORPOConfig() if args is None else args
        check_arguments(model, args, model_init, preprocess_logits_for_metrics)
        for name, dataset in named_datasets(train_dataset, eval_dataset):
            check_dataset(dataset, name, **args.row_options)
        adapt_arguments(args)
        self.args = args
        self._peft_config = peft_config
        self._train_sums = MetricSums(args.beta)
        self._eval_sums = EvaluationSums(MetricSums(args.beta))
        self._tokens: Tensor | None = None
        self._owns_output_dir = False

        set_seed(args.seed)  # the adapters' weights are drawn here
        if isinstance(model, str):
            model = load_model(model, args)
        if processing_class is None:
            processing_class = load_processing_class(model, args)
        if data_collator is None:
            data_collator = PreferenceCollator(
                processing_class,
                pad_token_id=args.padding_value,
                nll_scope=args.resolved_nll_scope,
                odds_scope=args.resolved_odds_scope,
                max_length=args.resolved_max_length,
            )
        if model is not None:
            model = set_up_model(model, args, peft_config)
            self.fused_head = head_fusing(model, self.args, self._loss)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            model_init=model_init,  # type: ignore[arg-type]
            compute_metrics=None if compute_metrics is None else explained(compute_metrics),
            callbacks=[
                *(callbacks or ()),
                *guard_callbacks(args.gradient, lambda: self.fused_head.guard),
            ],
            optimizers=optimizers,
        )
        refuse_split_sequences(self.get_cp_size(), self.get_sp_size())
        say_what_is_scaled(self, args.loss_normalization == "global")
        if isinstance(self.data_collator, PreferenceCollator):
            scopes = (args.resolved_nll_scope, args.resolved_odds_scope)
            self.data_collator.bind(vocabulary_size(self.model), *scopes)
        self._max_length = bounded_length(args.resolved_max_length, cast(nn.Module, self.model))
        self.train_dataset = self._prepared(train_dataset, "train_dataset")
        if isinstance(eval_dataset, Mapping):
            self.eval_dataset = {
                name: self._prepared(dataset, f"eval_dataset[{name!r}]")
                for name, dataset in eval_dataset.items()
            }
        else:
            self.eval_dataset = self._prepared(eval_dataset, "eval_dataset")

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A fresh model from `model_init`, set up as a given one is."""
        model = set_up_model(super().call_model_init(trial), self.args, self._peft_config)
        self.fused_head = head_fusing(model, self.args, self._loss)
        return model

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> TrainOutput:
        """Train; see `transformers.Trainer.train`.

        Args:
            resume_from_checkpoint: path of a checkpoint, or True for the last complete one in
                `output_dir`.
            *args: passed on.
            **kwargs: passed on.

        Returns:
            Step count, mean loss and metrics, `train_tokens` and `train_tokens_per_second`
            (tokens of both answers' sequences without padding) among them.

        Raises:
            FileExistsError: `output_dir` holds another run; see `overwrite_output_dir`.
            FileNotFoundError: no complete checkpoint to resume from.
            ValueError: an incomplete checkpoint, or another model's; nothing is trainable.
        """
        folder = Path(self.args.output_dir or ".")
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_complete_checkpoint(folder))
        elif resume_from_checkpoint:
            check_complete(Path(resume_from_checkpoint))
        elif not self._owns_output_dir and self.args.should_save:
            check_output_dir(folder, self.args.overwrite_output_dir)
        if resume_from_checkpoint and not self._is_sharded:
            check_fits(cast(nn.Module, self.model), Path(resume_from_checkpoint))
        self._owns_output_dir = True
        self._train_sums, self._tokens = MetricSums(self.args.beta), None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> TrainOutput:
        with self.fused_head.narrowed():
            return super()._inner_training_loop(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As Trainer's, for a model of which something is trained.

        Raises:
            ValueError: nothing is.
        """
        refuse_frozen(cast(nn.Module, self.model))
        return super().create_optimizer(*args, **kwargs)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | int | None]:
        """The micro-batches of an optimizer step, and what its loss divides by.

        Returns:
            The batches and, with loss_normalization="global", (2,) int64: NLL tokens and scored
            pairs of all of them, and of all ranks if `average_tokens_across_devices`.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.loss_normalization != "global" or not batches:
            return batches, None
        counts = torch.stack([self._count(batch) for batch in batches]).sum(0).to(device)
        if self.args.average_tokens_across_devices:
            # Ranks of one tensor-parallel group count the same pairs.
            counts = self._summed_over_ranks(counts) // self.get_tp_size()
        return batches, counts

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a training batch; its metrics are added to the next log.

        Args:
            model: the model as Trainer has wrapped it.
            inputs: batch of `PreferenceCollator`.
            return_outputs: also return the model's output, whose `logits` are empty.
            num_items_in_batch: from `get_batch_samples`.

        Returns:
            0-dim float32 loss, or (loss, output).
        """
        counts: dict[str, Tensor] = {}
        # An epoch's last step may take fewer micro-batches.
        weight: Tensor | float = 1.0 / getattr(self, "current_gradient_accumulation_steps", 1)
        if isinstance(num_items_in_batch, Tensor):
            num_nll_tokens, num_pairs = num_items_in_batch.unbind()
            counts = {"num_nll_tokens": num_nll_tokens, "num_pairs": num_pairs}
        output = self._forward(model, inputs, **counts)
        loss = output.loss
        if counts:
            weight = output.orpo.pair_mask.sum() / num_pairs.clamp(min=1)
            if self.args.average_tokens_across_devices:  # gradients will be averaged over ranks
                loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        self._train_sums.add(self._table(output, weight, is_share=bool(counts)))
        self._count_tokens(inputs)
        loss = loss.to(self.args.device)
        return (loss, output) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of an evaluation batch, within the memory of a training batch.

        Returns:
            Loss, and unless `prediction_loss_only` the `predictions` and `label_ids` described at
            `compute_metrics`, for the batch's P pairs.
        """
        inputs = dict(self._prepare_inputs(inputs))
        padding = inputs.pop(PADDING, None)
        with torch.no_grad(), self.compute_loss_context_manager():
            output = self._forward(model, inputs)
        loss = output.loss.detach().to(self.args.device)
        table = self._table(output, None)
        self._eval_sums.add(table, loss, padding, self.accelerator.gather_for_metrics)
        if prediction_loss_only:
            return loss, None, None
        orpo = output.orpo
        logps = torch.stack((orpo.chosen_logps, orpo.rejected_logps), dim=1)
        preferred = torch.where(orpo.pair_mask, 0, IGNORE_INDEX)
        return loss, logps, preferred

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """Trainer's loop; the metrics get the loop's own prefix ("eval", "eval_<name>", "test")."""
        self._eval_sums = EvaluationSums(MetricSums(self.args.beta))
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        return self._eval_sums.finish(output, prefix, streamed=not has_length(dataloader))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """As Trainer's; a dataset passed to `evaluate` is prepared like those of the trainer."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepared(eval_dataset, "eval_dataset")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """As Trainer's; the dataset passed to `predict` is prepared."""
        return super().get_test_dataloader(self._prepared(test_dataset, "test_dataset"))

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return by_length_again(sampler, seed, lambda: int(self.state.epoch or 0))

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        evaluates = isinstance(dataset, IterableDataset) and not kwargs.get("is_training", False)
        if evaluates and self.args.world_size > 1:
            dataset = EvenStream(dataset, self.args.eval_batch_size * self.args.world_size)
        return super()._get_dataloader(dataset, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the metrics since the last log; see `transformers.Trainer.log`."""
        if "loss" in logs:
            logs.update(self._train_sums.pop(self._summed_over_ranks))
        elif "train_runtime" in logs and self._tokens is not None:
            tokens = float(self._summed_over_ranks(self._tokens).item())
            logs["train_tokens"] = tokens
            logs["train_tokens_per_second"] = round(tokens / max(logs["train_runtime"], 1e-9), 1)
        super().log(logs, start_time)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with saving(Path(self.args.output_dir or ".")):
            super()._save_checkpoint(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        whole = cast(nn.Module, self.model)
        if self._is_sharded or not load_renamed(whole, Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best, whole = self.state.best_model_checkpoint, cast(nn.Module, self.model)
        if self._is_sharded or best is None or not load_renamed(whole, Path(best)):
            super()._load_best_model()

    @property
    def _is_sharded(self) -> bool:
        return bool(self.is_fsdp_enabled or self.is_deepspeed_enabled)

    @property
    def _loss(self) -> ORPOLoss:
        scope = self.args.resolved_nll_scope.removesuffix("-pad")  # a matter of the labels
        return ORPOLoss(self.args.beta, self.args.resolved_nll_reduction, scope)

    def _count(self, batch: Mapping[str, Tensor]) -> Tensor:
        batch = stack_batch(batch)
        nll_labels = self._loss.nll_labels_of(batch.get("nll_labels"))
        nll_labels = None if nll_labels is None else nll_labels[:, 1:]
        return torch.stack(count_terms(batch["labels"][:, 1:], nll_labels))

    def _forward(self, model: nn.Module, inputs: Mapping[str, Any], **counts: Tensor) -> Any:
        check_batch(inputs)
        # The fused head puts the loss on the output: all of it runs inside `model`'s wrappers.
        with self.fused_head.active():
            return model(**inputs, **counts, use_cache=False)

    def _table(self, output: Any, weight: Tensor | float | None, is_share: bool = False) -> Tensor:
        return pair_table(
            output.orpo,
            mean_logits=output.mean_logits if self.args.log_mean_logits else None,
            aux_loss=getattr(output, "aux_loss", None),
            weight=weight,
            is_share=is_share,
            layout=output.layout_terms,
        )

    def _count_tokens(self, inputs: Mapping[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        tokens = torch.ones_like(inputs["input_ids"]).sum() if mask is None else mask.sum()
        self._tokens = tokens if self._tokens is None else self._tokens + tokens

    def _summed_over_ranks(self, tensor: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(tensor, reduction="sum")
        return total

    def _prepared(self, dataset: Any, name: str) -> Any:
        if dataset is None:
            return None
        args = self.args
        with args.main_process_first(local=False, desc=f"tokenizing {name}"):
            return prepare_dataset(
                dataset,
                self.processing_class,
                max_length=self._max_length,
                num_proc=args.dataset_num_proc,
                vocab_size=vocabulary_size(self.model),
                name=name,
                **args.row_options,
            )
