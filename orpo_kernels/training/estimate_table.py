"""`orpo-kernels estimate`: the table of `estimate_memory` for the options of a run."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from orpo_kernels.estimate import Setup, Shape, estimate, longest_that_fits
from orpo_kernels.integrations.attention import DENSE
from orpo_kernels.training.options import Options, parse_options

GIB = 2**30
CARDS_GIB = (8, 12, 16, 24)
_KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "vocab_size", "head_dim", "tie_word_embeddings",
)  # fmt: skip
_KNOWN: dict[str, tuple[str, tuple[int | bool, ...]]] = {
    "SmolLM2-135M": ("llama", (576, 1536, 30, 9, 3, 49152, 64, True)),
    "Qwen2.5-0.5B": ("qwen2", (896, 4864, 24, 14, 2, 151936, 64, True)),
    "Qwen2.5-1.5B": ("qwen2", (1536, 8960, 28, 12, 2, 151936, 128, True)),
    "Qwen2.5-3B": ("qwen2", (2048, 11008, 36, 16, 2, 151936, 128, True)),
    "Qwen2.5-7B": ("qwen2", (3584, 18944, 28, 28, 4, 152064, 128, False)),
    "Llama-3.2-1B": ("llama", (2048, 8192, 16, 32, 8, 128256, 64, True)),
    "Llama-3.2-3B": ("llama", (3072, 8192, 28, 24, 8, 128256, 128, True)),
    "Llama-3-8B": ("llama", (4096, 14336, 32, 32, 8, 128256, 128, False)),
    "Mistral-7B": ("mistral", (4096, 14336, 32, 32, 8, 32768, 128, False)),
    "Gemma-3-1B": ("gemma3_text", (1152, 6912, 26, 4, 1, 262144, 256, True)),
}
"""Shapes that can be asked for by name without a download or a licence to click."""


def load_config(name: str, *, revision: str = "main", trust_remote_code: bool = False) -> Any:
    """A model's configuration.

    Args:
        name: folder, `config.json`, hub name, or one of the shapes known by name ("Llama-3-8B").
        revision: on the hub.
        trust_remote_code: allow configuration code from the hub to run.

    Raises:
        ValueError: none of these.
    """
    if name in _KNOWN:
        kind, values = _KNOWN[name]
        return AutoConfig.for_model(kind, **dict(zip(_KEYS, values, strict=True)))
    path = Path(name)
    try:
        return AutoConfig.from_pretrained(
            path.parent if path.suffix == ".json" and path.is_file() else name,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no model configuration at {name!r}; give a folder, a config.json, a hub name, or "
            f"one of {', '.join(_KNOWN)} ({error})"
        ) from error


def is_shape(name: str) -> bool:
    """Whether a name stands for a configuration alone: known here, or a `config.json`."""
    return name in _KNOWN or (Path(name).suffix == ".json" and Path(name).is_file())


def setup_of(options: Options) -> Setup:
    """The setup that the options of `orpo-kernels train` describe.

    Args:
        options: parsed.

    Returns:
        The setup; 8-bit weights are taken for 16-bit ones.
    """
    model, training = options.model, options.training
    return Setup(
        weight_bytes=4 if model.dtype == "float32" else 2,
        load_in_4bit=model.load_in_4bit,
        double_quant=model.use_bnb_nested_quant,
        lora_r=model.lora_r if model.use_peft else 0,
        lora_targets=tuple(model.lora_target_modules or ("q_proj", "v_proj")),
        modules_to_save=tuple(model.lora_modules_to_save or ()),
        optim=str(getattr(training.optim, "value", training.optim)),
        checkpointing=bool(training.gradient_checkpointing),
        offload=training.activation_offload,
        float32_rest=model.load_in_4bit and bool(training.fp16),
        layout=training.batch_layout,
        dense_mask=model.attn_implementation in (None, *DENSE),
    )


def render(name: str, shape: Shape, options: Options, prompt_length: int = 0) -> str:
    """The table `orpo-kernels estimate` prints."""
    setup, training = setup_of(options), options.training
    pairs, length = training.per_device_train_batch_size, training.resolved_max_length
    found = estimate(shape, length, pairs, setup, training.workspace_bytes, prompt_length)
    title = (
        f"{name}: {shape.parameters / 1e9:.2f} B parameters, V = {shape.V}\n"
        f"P = {pairs} {'pair' if pairs == 1 else 'pairs'} of 2 sequences of T = {length} tokens; "
        f"{_describe(setup)}"
    )
    if setup.layout != "padded":
        title += f"\nfused loss: {setup.layout}, {prompt_length} tokens of a pair's prompt shared"
    lines = [title, "", f"{'GiB':<34}{'fused loss':>12}{'with logits':>13}"]
    ours = asdict(found)
    theirs = asdict(found.unfused or found)
    theirs["loss_bytes"] = theirs["materialised_loss_bytes"]
    for key, label in _LABELS.items():
        if key not in _WHERE_THERE_IS or ours[key]:
            lines.append(f"{label:<34}{ours[key] / GIB:>12.2f}{theirs[key] / GIB:>13.2f}")
    totals = (found.total_bytes / GIB, found.materialised_total_bytes / GIB)
    lines.append(f"{'peak':<34}{totals[0]:>12.2f}{totals[1]:>13.2f}")
    lines += ["", f"{'longest T on a card with':<34}{'fused loss':>12}{'with logits':>13}"]
    for card in CARDS_GIB:
        longest = longest_that_fits(shape, card * GIB, pairs, setup, prompt_length)
        cells = (f"{length:,}" if length else "none" for length in longest)
        lines.append(f"{f'{card} GiB':<34}" + "{:>12}{:>13}".format(*cells))
    return "\n".join(
        [
            *lines,
            "",
            "Of the loss and the backward of a layer (*) the larger counts. See docs/memory.md.",
        ]
    )


_LABELS = {
    "loading_bytes": "weights, while loading",
    "weights_bytes": "weights, in training",
    "adapter_bytes": "adapter",
    "gradients_bytes": "gradients",
    "optimizer_bytes": "optimizer states",
    "activations_bytes": "activations kept",
    "host_bytes": "activations kept, on the host",
    "rows_bytes": "rows: put back, and their mask",
    "head_bytes": "loss *: hidden states",
    "loss_bytes": "loss *: vocabulary-sized work",
    "backward_bytes": "backward of one layer *",
}
_WHERE_THERE_IS = ("host_bytes", "rows_bytes")  # elsewhere no line of zeros


def _describe(setup: Setup) -> str:
    weights = "nf4 weights" if setup.load_in_4bit else f"{8 * setup.weight_bytes}-bit weights"
    weights += ", the others float32" if setup.float32_rest else ""
    trained = f"LoRA r = {setup.lora_r}" if setup.lora_r else "all parameters trained"
    checkpointing = "" if setup.checkpointing else "no "
    return f"{weights}, {trained}, {setup.optim}, {checkpointing}checkpointing"


def main(words: Sequence[str]) -> int:
    """`orpo-kernels estimate`: the options of `train`, and two shorter names.

    Args:
        words: arguments after `estimate`.

    Returns:
        0.

    Raises:
        ValueError: unusable options, or no such model.
    """
    if not words or any(word in ("-h", "--help") for word in words):
        sys.stdout.write(_USAGE)
        return 0
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--prompt_length", "--prompt-length", type=int, default=0)
    own, rest = parser.parse_known_args(list(words))
    options = parse_options([long_name(word) for word in rest], elsewhere=True)
    layout, longest = options.training.batch_layout, options.training.resolved_max_length
    if own.prompt_length and layout != "shared_prompt":
        raise ValueError(
            f"prompt_length is what batch_layout shared_prompt computes once, and this is {layout}"
        )
    if not 0 <= own.prompt_length <= longest:
        raise ValueError(
            f"prompt_length must be 0 to max_length {longest}, got {own.prompt_length}"
        )
    name = options.model.model_name_or_path
    if name is None:
        raise ValueError("which model? Give --model NAME, FOLDER or config.json, or a recipe")
    config = load_config(
        name,
        revision=options.model.model_revision,
        trust_remote_code=options.training.trust_remote_code,
    )
    sys.stdout.write(render(name, Shape.of(config), options, own.prompt_length) + "\n")
    return 0


def long_name(word: str) -> str:
    """A word of the command line, `--model` and `--pairs` by the names that `train` has."""
    name, equals, value = word.partition("=")
    return _SHORT.get(name, name) + equals + value


_SHORT = {"--model": "--model_name_or_path", "--pairs": "--per_device_train_batch_size"}
_USAGE = f"""usage: orpo-kernels estimate [CONFIG.yaml] [--model MODEL] [--max_length T] [--pairs P]
                             [--prompt_length N] [any other option of `orpo-kernels train`]

Memory of a step, item by item, and the longest T that fits usual cards. N: tokens that both
sequences of each pair begin with, which batch_layout shared_prompt computes once (default: 0).
MODEL is a folder, a config.json, a hub name, or one of
  {", ".join(_KNOWN)}
"""
