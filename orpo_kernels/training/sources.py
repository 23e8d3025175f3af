"""From the options of `orpo-kernels train` to datasets, a tokenizer, a model and an adapter."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from orpo_kernels.training.files import has_data_ending, load_local
from orpo_kernels.training.options import DataOptions, ModelOptions, OptionError, Options

# No line break after the last turn, unlike some copies of this template: it would come between
# <|im_end|> and the end of the answer, and the model would learn to close every answer twice.
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n'"
    " + message['content'] + '<|im_end|>' }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")

logger = logging.getLogger(__name__)


def load_pairs(options: Options) -> tuple[Dataset, Dataset | None]:
    """The training pairs and those to evaluate on.

    With `eval_fraction` the latter are held out of the training split; else they are the split
    `dataset_test_split`, where it exists.

    Args:
        options: of the run.

    Returns:
        (train, eval or None).

    Raises:
        OptionError: no such dataset, file, format or split; evaluation asked for without pairs.
    """
    data, training = options.data, options.training
    splits = _load_splits(data)
    train = _split(splits, data.dataset_train_split, data)
    if data.max_samples is not None and data.max_samples < len(train):
        train = train.shuffle(seed=training.seed).select(range(data.max_samples))
    evaluation = splits.get(data.dataset_test_split)
    if data.eval_fraction is not None:
        train, evaluation = _hold_out(train, data.eval_fraction, training.seed)
    wanted = training.eval_strategy != "no" or training.eval_on_start
    if evaluation is None and wanted:
        raise OptionError(
            "eval_strategy or eval_on_start ask for an evaluation, but there is no split "
            f"{data.dataset_test_split!r} in {data.dataset_name} (it has {', '.join(splits)}); set "
            "eval_fraction, e.g. 0.05, or dataset_test_split, or turn them off"
        )
    return train, evaluation


def load_tokenizer(options: Options) -> Any:
    """The model's tokenizer, with the chat template and a pad token.

    Args:
        options: of the run.

    Returns:
        The tokenizer; "chatml" gives it `<|im_start|>` and `<|im_end|>` if they are not there,
        and makes them begin and end a text.

    Raises:
        OptionError: no such model or template.
    """
    model, data = options.model, options.data
    name = _model_name(model)
    tokenizer = _or_explain(
        f"the tokenizer of {name}",
        AutoTokenizer.from_pretrained,
        name,
        revision=model.model_revision,
        trust_remote_code=options.training.trust_remote_code,
    )
    if data.chat_template == "chatml":
        _use_chatml(tokenizer)
    elif data.chat_template is not None:
        tokenizer.chat_template = _read_template(data.chat_template)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, never scored
    return tokenizer


def load_base_model(options: Options, tokenizer: Any) -> Any:
    """The causal LM, quantised if asked for, with an embedding for every token.

    Weights are read from safetensors files only.

    Args:
        options: of the run.
        tokenizer: from `load_tokenizer`.

    Returns:
        The model.

    Raises:
        OptionError: no such model, or it cannot be loaded this way.
    """
    model, training = options.model, options.training
    quantization = _quantization(model)
    placed = {} if quantization is None else {"device_map": {"": training.device}}
    base = _or_explain(
        f"the model {_model_name(model)}",
        AutoModelForCausalLM.from_pretrained,
        _model_name(model),
        revision=model.model_revision,
        dtype=model.dtype if model.dtype == "auto" else getattr(torch, model.dtype),
        attn_implementation=model.attn_implementation,
        quantization_config=quantization,
        trust_remote_code=training.trust_remote_code,
        use_safetensors=True,
        **placed,
    )
    rows = base.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        base.resize_token_embeddings(len(tokenizer))
        if model.use_peft and not model.lora_modules_to_save:
            logger.warning(
                "%d tokens were added for the chat template. Their embeddings are the mean of the "
                "others and stay as they are: an adapter does not train them. To train them, set "
                "lora_modules_to_save: [embed_tokens, lm_head]",
                len(tokenizer) - rows,
            )
    return base


def make_peft_config(model: ModelOptions) -> Any:
    """The `LoraConfig` of the options, or None without `use_peft`.

    Raises:
        OptionError: peft is not installed.
    """
    if not model.use_peft:
        unused = [each.name for each in fields(model) if _is_of_adapter(model, each)]
        if unused:
            logger.warning(
                "%s: not used, as use_peft is false: all of the model is trained", ", ".join(unused)
            )
        return None
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise OptionError("use_peft needs peft: pip install 'orpo_kernels[hf]'") from error
    targets: Any = model.lora_target_modules
    # A name would be read as a regular expression of a module's whole path.
    if targets is not None and len(targets) == 1 and not re.fullmatch(r"[\w.]+", targets[0]):
        targets = targets[0]  # "all-linear", or such an expression
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=targets,
        modules_to_save=model.lora_modules_to_save,
        use_rslora=model.use_rslora,
        use_dora=model.use_dora,
    )


def _is_of_adapter(model: ModelOptions, each: Field[Any]) -> bool:
    """Whether a field is about the adapter alone, and was set."""
    named = each.name.startswith("lora_") or each.name in ("use_rslora", "use_dora")
    return named and getattr(model, each.name) != each.default


def _load_splits(data: DataOptions) -> DatasetDict:
    name = data.dataset_name
    if name is None:
        raise OptionError(
            "dataset_name is not set; give a hub name, or a file (.jsonl, .parquet, .csv, ...), a "
            "folder of files, or a pattern"
        )
    loaded = load_local(name, data.dataset_config, data.dataset_train_split, _or_explain)
    if loaded is None and _looks_like_path(name):
        raise OptionError(f"no such file or folder: {name} (in {Path.cwd()})")
    if loaded is None:
        loaded = _or_explain(f"the dataset {name}", load_dataset, name, data.dataset_config)
    return loaded


def _split(splits: DatasetDict, name: str, data: DataOptions) -> Dataset:
    if name not in splits:
        raise OptionError(
            f"{data.dataset_name} has no split {name!r}, it has {', '.join(splits)}; set "
            "dataset_train_split"
        )
    return splits[name]


def _hold_out(train: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    count = round(len(train) * fraction)
    if not 0 < count < len(train):
        raise OptionError(
            f"eval_fraction {fraction} of {len(train)} pairs leaves {len(train) - count} to train "
            f"on and {count} to evaluate on; both need at least 1"
        )
    parts = train.train_test_split(test_size=count, seed=seed)
    return parts["train"], parts["test"]


def _looks_like_path(name: str) -> bool:
    # A hub name is "name" or "owner/name".
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or has_data_ending(name)


def _model_name(model: ModelOptions) -> str:
    name = model.model_name_or_path
    if name is None:
        raise OptionError("model_name_or_path is not set; give a hub name or a folder")
    if not Path(name).exists() and _looks_like_path(name):
        raise OptionError(f"no such model folder: {name} (in {Path.cwd()})")
    return name


def _use_chatml(tokenizer: Any) -> None:
    tokenizer.chat_template = CHATML
    known = tokenizer.get_vocab()
    missing = [token for token in _CHATML_TOKENS if token not in known]
    tokenizer.add_tokens(
        [AddedToken(token, special=True) for token in missing], special_tokens=True
    )
    start, end = _CHATML_TOKENS
    tokenizer.eos_token = end
    # The template begins with <|im_start|>, which then is the BOS that would be put in front.
    if tokenizer.bos_token is not None:
        tokenizer.bos_token = start
    if tokenizer.pad_token is None:
        tokenizer.pad_token = end


def _read_template(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(
            f'chat_template must be "chatml" or a file with a Jinja template, got {name!r} '
            f"({error.strerror})"
        ) from None


def _quantization(model: ModelOptions) -> Any:
    config: Any = BitsAndBytesConfig  # its __init__ is not annotated
    if model.load_in_8bit:
        return config(load_in_8bit=True)
    if not model.load_in_4bit:
        return None
    return config(
        load_in_4bit=True,
        bnb_4bit_quant_type=model.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model.use_bnb_nested_quant,
        bnb_4bit_compute_dtype=getattr(torch, str(model.bnb_4bit_compute_dtype)),
    )


def _or_explain(what: object, load: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a loader of Hugging Face; what it says about the user's input becomes an OptionError."""
    try:
        return load(*args, **kwargs)
    except ImportError as error:
        hint = "; pip install 'orpo_kernels[qlora]'" if "bitsandbytes" in str(error) else ""
        raise OptionError(f"cannot load {what}: {error}{hint}") from error
    except StopIteration as error:  # of a JSON file without a row
        raise OptionError(f"cannot load {what}: there is no row in it") from error
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        hint = "; pip install zstandard" if "zstd" in str(error) else ""
        hint = "; there is no row in it" if "corresponds to no data" in str(error) else hint
        raise OptionError(f"cannot load {what}: {error}{cause}{hint}") from error
