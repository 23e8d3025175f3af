"""A small base model made on the spot: tokenizer, a Llama of a million parameters, a short warm-up.

    python -m examples.tiny_base PAIRS.jsonl OUT_FOLDER [--steps 300 ...]

It stands in for the pretrained model of a real run, so that the demo downloads nothing. The warm-up
is plain language modelling on chosen and rejected answers alike: the base learns the domain, and
nothing about which answers are preferred.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from orpo_kernels.training.sources import CHATML

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True)
class Size:
    """Shape of the model and length of its warm-up."""

    vocab_size: int = 1024
    hidden_size: int = 128
    layers: int = 4
    max_length: int = 256
    steps: int = 100
    batch_size: int = 16
    learning_rate: float = 2e-3


def conversations(pairs: Sequence[Mapping[str, Any]]) -> list[list[dict[str, str]]]:
    """Every chosen and every rejected conversation, as lists of messages."""
    return [pair["prompt"] + pair[side] for pair in pairs for side in ("chosen", "rejected")]


def train_tokenizer(chats: Sequence[list[dict[str, str]]], size: Size) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the ChatML template; digits are tokens of their own."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((turn["content"] for chat in chats for turn in chat), trainer)
    fast: Any = PreTrainedTokenizerFast  # its __init__ is not annotated
    tokenizer: PreTrainedTokenizerFast = fast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        model_max_length=size.max_length,
        chat_template=CHATML,
    )
    return tokenizer


def make_model(tokenizer: PreTrainedTokenizerFast, size: Size) -> LlamaForCausalLM:
    """A Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden_size,
        intermediate_size=3 * size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=size.max_length,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def warm_up(
    model: torch.nn.Module, rows: Sequence[list[int]], size: Size, device: torch.device
) -> float:
    """Train in full on token rows, each prompt and answer; return the last loss in nats."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, size.learning_rate, total_steps=size.steps, pct_start=0.2
    )
    loss = torch.zeros(())
    started = time.monotonic()
    for step, batch in enumerate(_batches(rows, size), start=1):
        ids, labels = (tensor.to(device) for tensor in batch)
        loss = model(input_ids=ids, attention_mask=(labels != -100).long(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % max(1, size.steps // 4) == 0:
            seconds = time.monotonic() - started
            print(f"  step {step:>4}: loss {loss.item():.3f} nats per token, {seconds:.0f} s")
    return loss.item()


def _batches(rows: Sequence[list[int]], size: Size) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    rng = random.Random(0)
    order: list[list[int]] = []
    for _ in range(size.steps):
        if len(order) < size.batch_size:
            order = rng.sample(list(rows), len(rows)) + order
        batch = [order.pop() for _ in range(min(size.batch_size, len(order)))]
        longest = max(map(len, batch))
        labels = torch.tensor([row + [-100] * (longest - len(row)) for row in batch])
        yield labels.clamp(min=0), labels


def build(pairs: Sequence[Mapping[str, Any]], folder: Path, size: Size) -> None:
    """Make tokenizer and model from preference pairs, warm the model up, save both in a folder."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chats = conversations(pairs)
    tokenizer = train_tokenizer(chats, size)
    model = make_model(tokenizer, size)
    rows = [
        tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), verbose=False)["input_ids"]
        for chat in chats
    ]
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"  {parameters / 1e6:.1f} M parameters, {len(tokenizer)} tokens, on {device}; "
        f"{size.steps} steps on {len(rows)} texts"
    )
    warm_up(model, [row[: size.max_length] for row in rows], size, device)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", type=Path, help="JSONL with prompt, chosen, rejected (messages)")
    parser.add_argument("folder", type=Path, help="where the base model goes")
    for name, default in vars(Size()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    options = vars(parser.parse_args())
    source, folder = options.pop("pairs"), options.pop("folder")
    pairs = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    build(pairs, folder, Size(**options))


if __name__ == "__main__":
    main()
