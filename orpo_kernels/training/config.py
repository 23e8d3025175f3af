"""ORPOConfig: transformers' TrainingArguments, TRL's ORPO arguments, and ours."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from transformers import TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.utils.import_utils import is_torch_bf16_gpu_available

from orpo_kernels.layout import BatchLayout
from orpo_kernels.options import (
    GRADIENTS,
    check_beta,
    check_choice,
    check_eps,
    check_integer,
    check_workspace_bytes,
)
from orpo_kernels.presets import LABEL_NLL_SCOPES, NLL_REDUCTIONS, ODDS_SCOPES, PRESETS
from orpo_kernels.training.offload import set_offload
from orpo_kernels.training.rows import RowOptions

DEFAULT_MAX_LENGTH = 512
"""What `max_length=None` means in TRL, and here."""


@dataclass
class ORPOConfig(TrainingArguments):
    """Arguments of `ORPOTrainer`: those of TRL's class of the same name, and a few more.

    Only what differs from `transformers.TrainingArguments` is listed.

    Args:
        learning_rate: 1e-6.
        logging_steps: 10.
        gradient_checkpointing: on unless it, or its new name `activation_checkpointing`, is given.
        bf16: on unless `fp16` is given or the device cannot do it; off on a CPU unless asked for.
        max_length: tokens of prompt + answer; longer answers are cut, prompts never are.
            None means 512. Where the model has a table of fewer positions (GPT-2, OPT), these
            are used, and a warning says so.
        max_completion_length: refused; TRL uses it for encoder-decoder models only.
        beta: weight of the odds-ratio term; the paper's lambda, other stacks' alpha.
        disable_dropout: set every dropout of the model to 0, adapters included.
        padding_value: token id to pad with; the tokenizer's pad token if None.
        generate_during_eval: refused.
        is_encoder_decoder: None or False; encoder-decoder models are refused.
        model_init_kwargs: keyword arguments of `from_pretrained` when the model is a name.
        trust_remote_code: allow model code from the hub; passed to `from_pretrained`.
        dataset_num_proc: processes that tokenise the datasets.
        prompt_column: column that holds the prompt, if not `prompt`: its name, or a list of several
            that are joined by line breaks. system_column, allow_missing_prompt: see `RowOptions`.
        keep_nulls: keep null entries of dictionaries in messages, tools and
            `chat_template_kwargs`. By default they are dropped, as Arrow fills rows with them.
        on_bad_row: "raise" for a row that cannot be used (the chat template refuses it, it has no
            prompt, ...), or "skip" it and say how many there were.
        preset: whose loss it is: "trl", "llamafactory", "xfactlab" (what its code does) or "paper".
            It sets `nll_scope`, `nll_reduction` and `odds_scope` where these are None.
        nll_scope: tokens of the chosen sequence in the NLL, "prompt+completion" or "completion";
            "prompt+completion-pad" leaves out those that are the pad token.
        odds_scope: tokens of the odds, "completion"; "completion+pad" with the padding position
            that follows. Both "pad" scopes pad with EOS unless `padding_value` is given.
        nll_reduction: mean over "token"s of the batch, or over each pair first ("pair").
        loss_normalization: what a token's share of the loss is when one optimizer step takes
            several micro-batches or ranks. "micro_batch": the mean of their means, as in TRL.
            "global": the mean over all tokens and all pairs of the step, so that the result does
            not depend on how the step was cut up. The two agree when there is one micro-batch,
            and when all have equally many NLL tokens and scored pairs. The logged `loss` and
            `nll_loss` follow it; all other metrics are means over pairs either way.
        batch_layout: how the model computes a batch: "padded"; "packed", its sequences one after
            the other without padding; or "shared_prompt", of each pair what both sequences begin
            with once. Same loss, gradients and metrics, but that `logits/chosen` and
            `logits/rejected` leave padding out. Logs `batch/computed_share`, tokens computed over
            those padded.
        max_tokens_per_row: tokens in a row of these two, more only where one sequence (one pair)
            has more. None: one row with FlexAttention; else as many as cost least. Flash attention
            takes one row whatever this is.
        activation_offload: keep what checkpointed layers begin with in pinned memory of the host
            instead of on the GPU, by torch's `save_on_cpu`. Same numbers; each layer copies its
            input there in the forward and back in the backward. Refused without checkpointing, on a
            CPU, and by a transformers that does not have it.
        workspace_bytes: cap of the memory of vocabulary-sized work; the package's default if None.
        gradient: strategy of the vocabulary-sized work, "exact", "sparse" or "auto", see
            `linear_logps`. What a sparse one leaves out is logged: `sparse/kept_share`,
            `sparse/tail_mass`, `sparse/residual_rms`.
        sparse_eps: probabilities over it enter a sparse gradient one by one; `eps` of
            `linear_logps`.
        compute_dtype: dtype of its matrix products, see `linear_logps`; e.g. "bfloat16".
        narrow_head: keep a frozen float32 head in 16 bits during training where that loses nothing;
            see `fuse_head`.
        log_mean_logits: log `logits/chosen` and `logits/rejected`. Free, but for models with a
            logit softcap, where it costs one more pass over the vocabulary.
        overwrite_output_dir: delete the checkpoints of another run found in `output_dir`.
            Without it such a folder is refused.

    Raises:
        TypeError: a value of another type.
        ValueError: a value out of range.
        NotImplementedError: an argument that asks for what this trainer does not do.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    learning_rate: float = field(
        default=1e-6, metadata={"help": "The initial learning rate of the optimizer."}
    )
    logging_steps: float = field(
        default=10,
        metadata={"help": "Log every X steps; a number below 1 is a share of all steps."},
    )
    gradient_checkpointing: bool | None = field(
        default=None,
        metadata={
            "help": "Recompute activations in the backward pass. On by default.",
            "nargs": "?",
            "const": True,
        },
    )
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "bfloat16 mixed precision. On by default where the device supports it "
            "(never on a CPU unless asked for) and fp16 is not set."
        },
    )
    max_length: int | None = field(
        default=1024,
        metadata={"help": "Tokens of prompt + answer. Longer answers are cut, prompts are not."},
    )
    max_completion_length: int | None = field(
        default=None, metadata={"help": "Refused: only encoder-decoder models have it."}
    )
    beta: float = field(
        default=0.1, metadata={"help": "Weight of the odds-ratio term (lambda in the paper)."}
    )
    disable_dropout: bool = field(
        default=True, metadata={"help": "Set every dropout of the model to 0."}
    )
    padding_value: int | None = field(
        default=None, metadata={"help": "Token id to pad with; the tokenizer's pad token if None."}
    )
    generate_during_eval: bool = field(
        default=False, metadata={"help": "Refused: generate in a callback instead."}
    )
    is_encoder_decoder: bool | None = field(
        default=None, metadata={"help": "None or False: encoder-decoder models are refused."}
    )
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Keyword arguments of from_pretrained when the model is a name."},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Allow model and tokenizer code from the hub to run."}
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Processes that tokenise the datasets."}
    )
    prompt_column: list[str] | None = field(
        default=None,
        metadata={
            "help": "Column that holds the prompt, if not `prompt`. Several are joined by line "
            "breaks: instruction input."
        },
    )
    system_column: str | None = field(
        default=None, metadata={"help": "Column of text that goes in front of the prompt."}
    )
    allow_missing_prompt: bool = field(
        default=False,
        metadata={"help": "Train on the answers alone where a row has no prompt."},
    )
    keep_nulls: bool = field(
        default=False,
        metadata={"help": "Keep null entries of messages and tools, which Arrow fills rows with."},
    )
    on_bad_row: Literal["raise", "skip"] = field(
        default="raise",
        metadata={"help": "What to do about rows that cannot be used; skip says how many."},
    )
    preset: Literal["trl", "llamafactory", "xfactlab", "paper"] = field(
        default="trl",
        metadata={"help": "Whose loss: sets the scopes and nll_reduction if they are not given."},
    )
    nll_scope: Literal["prompt+completion", "completion", "prompt+completion-pad"] | None = field(
        default=None, metadata={"help": "Tokens of the chosen sequence that enter the NLL."}
    )
    odds_scope: Literal["completion", "completion+pad"] | None = field(
        default=None, metadata={"help": "Tokens of an answer that enter the odds."}
    )
    nll_reduction: Literal["token", "pair"] | None = field(
        default=None, metadata={"help": "NLL as a mean over tokens, or over each pair first."}
    )
    loss_normalization: Literal["micro_batch", "global"] = field(
        default="micro_batch",
        metadata={
            "help": "Mean of the micro-batches' means (as TRL), or over all tokens and pairs of "
            "the optimizer step, exact whatever the accumulation and the number of devices."
        },
    )
    batch_layout: Literal["padded", "packed", "shared_prompt"] = field(
        default="padded",
        metadata={
            "help": "Compute batches padded, packed without padding, or packed with the prompt of "
            "a pair once."
        },
    )
    max_tokens_per_row: int | None = field(
        default=None, metadata={"help": "Tokens in a row of packed sequences."}
    )
    activation_offload: bool = field(
        default=False,
        metadata={"help": "Keep the inputs of checkpointed layers in the host's memory."},
    )
    workspace_bytes: int | None = field(
        default=None, metadata={"help": "Cap of the memory of vocabulary-sized work, in bytes."}
    )
    gradient: Literal["exact", "sparse", "auto"] = field(
        default="exact",
        metadata={
            "help": "Vocabulary-sized work: exact, sparse (for the price of the forward), or auto "
            "(sparse where its matrix products are 16-bit)."
        },
    )
    sparse_eps: float | None = field(
        default=None,
        metadata={
            "help": "Probabilities over it enter a sparse gradient one by one. Default: 2^-12, or "
            "6 / V where that is less and the head is frozen."
        },
    )
    compute_dtype: Literal["float32", "bfloat16", "float16"] | None = field(
        default=None, metadata={"help": "dtype of the matrix products with the vocabulary."}
    )
    narrow_head: bool = field(
        default=True,
        metadata={"help": "Keep a frozen head in 16 bits where that loses nothing."},
    )
    log_mean_logits: bool = field(
        default=True, metadata={"help": "Log logits/chosen and logits/rejected."}
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Delete the checkpoints of another run found in output_dir."},
    )

    def __post_init__(self) -> None:
        self._resolve_bf16()
        self._resolve_checkpointing()
        super().__post_init__()  # type: ignore[no-untyped-call]
        if self.activation_offload:
            set_offload(self)
        self._check_values()
        self._check_support()

    @property
    def resolved_nll_scope(self) -> str:
        """`nll_scope`, or the preset's."""
        return self.nll_scope or str(PRESETS[self.preset].nll_scope)

    @property
    def resolved_nll_reduction(self) -> str:
        """`nll_reduction`, or the preset's."""
        return self.nll_reduction or str(PRESETS[self.preset].nll_reduction)

    @property
    def resolved_odds_scope(self) -> str:
        """`odds_scope`, or the preset's."""
        return self.odds_scope or str(PRESETS[self.preset].odds_scope)

    @property
    def resolved_max_length(self) -> int:
        """`max_length`, or TRL's 512."""
        return DEFAULT_MAX_LENGTH if self.max_length is None else self.max_length

    @property
    def layout(self) -> BatchLayout:
        """`batch_layout` and `max_tokens_per_row`."""
        return BatchLayout(self.batch_layout, self.max_tokens_per_row)

    @property
    def row_options(self) -> dict[str, Any]:
        """How the rows are read: the arguments of `RowOptions`."""
        return {each.name: getattr(self, each.name) for each in fields(RowOptions)}

    def _resolve_bf16(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()

    def _resolve_checkpointing(self) -> None:
        """Default on, under whichever of the argument's two names this transformers reads."""
        if not hasattr(self, "activation_checkpointing"):
            if self.gradient_checkpointing is None:
                self.gradient_checkpointing = True
        elif self.activation_checkpointing is None:
            wanted = self.gradient_checkpointing
            self.activation_checkpointing = True if wanted is None else wanted

    def _check_values(self) -> None:
        check_choice("preset", self.preset, tuple(PRESETS))
        check_choice("nll_scope", self.nll_scope, (None, *LABEL_NLL_SCOPES))
        check_choice("odds_scope", self.odds_scope, (None, *ODDS_SCOPES))
        check_choice("nll_reduction", self.nll_reduction, (None, *NLL_REDUCTIONS))
        check_choice("loss_normalization", self.loss_normalization, ("micro_batch", "global"))
        check_choice("gradient", self.gradient, GRADIENTS)
        check_choice("on_bad_row", self.on_bad_row, ("raise", "skip"))
        check_choice("compute_dtype", self.compute_dtype, (None, *_DTYPES))
        for name in _COUNTS:
            check_integer(name, getattr(self, name), least=1)
        check_beta(self.beta)
        check_eps("sparse_eps", self.sparse_eps)
        check_workspace_bytes(self.workspace_bytes)
        BatchLayout(self.batch_layout, self.max_tokens_per_row)
        if self.max_length is not None:
            check_integer("max_length", self.max_length, least=1)
        else:
            warnings.warn(
                f"max_length is None: {DEFAULT_MAX_LENGTH} is used, as TRL does. Set it to the "
                "longest prompt + answer worth the memory.",
                UserWarning,
                stacklevel=4,
            )

    def _check_support(self) -> None:
        if self.is_encoder_decoder or self.max_completion_length is not None:
            raise NotImplementedError(
                "encoder-decoder models are not supported, and max_completion_length "
                f"(got {self.max_completion_length}) and is_encoder_decoder (got "
                f"{self.is_encoder_decoder}) are for them only; use max_length for a causal model"
            )
        if self.generate_during_eval:
            raise NotImplementedError(
                "generate_during_eval=True is not supported; set it to False and call "
                "trainer.model.generate in a TrainerCallback's on_evaluate"
            )
        if self.label_smoothing_factor:
            raise NotImplementedError(
                f"label_smoothing_factor={self.label_smoothing_factor} has no definition in the "
                "ORPO loss; set it to 0"
            )
        if self.neftune_noise_alpha and self.batch_layout != "padded":
            raise NotImplementedError(
                f"neftune_noise_alpha={self.neftune_noise_alpha} adds noise to what a row reads, "
                "less the longer the row, so that it would be another in the rows of "
                f"batch_layout={self.batch_layout!r}; set batch_layout to padded, or leave it out"
            )
        if DebugOption.UNDERFLOW_OVERFLOW in self.debug:
            raise NotImplementedError(
                'debug="underflow_overflow" reads the logits, which are never formed; leave it out'
            )


# Of Trainer, which divides by 0, or ends without a step.
_COUNTS = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps",
)  # fmt: skip
_DTYPES = ("float32", "bfloat16", "float16")
