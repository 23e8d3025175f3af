"""The trained adapter merged into its base model, reloaded without quantisation, in a folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from orpo_kernels.training.options import Options
from orpo_kernels.training.sources import load_base_model

MERGED = "merged"
"""Folder of the merged model, beside the adapter; also the end of its name on the hub."""


def merge_adapter(options: Options, tokenizer: Any, hub_name: str | None) -> Path:
    """Merge the adapter in `output_dir` into its base model, and save that with its tokenizer.

    The base is loaded once more, on the CPU, in `dtype` and without quantisation: what a 4-bit base
    was trained to add is added to the weights that were quantised. A head that is tied to the
    embedding is saved apart from it where the adapter changed one of them.

    Args:
        options: of the run.
        tokenizer: of the run.
        hub_name: of the run's repository; the merged model goes to another beside it. None: nothing
            is pushed.

    Returns:
        The folder, `output_dir/merged`.

    Raises:
        OptionError: the base model cannot be loaded any more.
    """
    from peft import PeftModel

    adapter = Path(str(options.training.output_dir))
    model = replace(options.model, load_in_4bit=False, load_in_8bit=False)
    base: Any = load_base_model(options._replace(model=model), tokenizer)
    # Of a tied head and its embedding the adapter may change one: merged into both, it is another.
    was_tied = _untie(base)
    merged: Any = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    if was_tied and torch.equal(*(each.weight for each in _ends(merged))):
        merged.config.get_text_config().tie_word_embeddings = True
        merged.tie_weights()
    folder = adapter / MERGED
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if hub_name is not None:
        arguments = {
            "private": options.training.hub_private_repo, "token": options.training.hub_token,
        }  # fmt: skip
        for each in (merged, tokenizer):
            each.push_to_hub(f"{hub_name}-{MERGED}", **arguments)
    return folder


def _ends(model: Any) -> tuple[Any, Any]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _untie(model: Any) -> bool:
    """Give a head that is tied to the embedding a weight of its own; whether it was."""
    embedding, head = _ends(model)
    if head.weight is not embedding.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.get_text_config().tie_word_embeddings = False
    return True
