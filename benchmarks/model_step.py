"""A whole training step of real architectures with random weights: ours against TRL's own loss.

    python -m benchmarks.model_step [--seconds 110] [--json FILE]
    python -m benchmarks.model_step --device cpu --tiny      # shows that it runs

LoRA on every linear layer, gradient checkpointing, one pair, AdamW; forward, backward and update
timed together. Memory is the peak of a step over the model's weights as they are given. Weights
are random, made from the config: what a step takes does not depend on them.
"""

import argparse
import gc
import importlib.util
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.measure import Stopwatch
from benchmarks.peers import BETA, trl_trainer
from orpo_kernels import ORPOLoss, fuse_head

MIB, GIB = 2**20, 2**30
PROMPT_SHARE = 0.3
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LLAMA_1B = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
    "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN_05B = {
    "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
    "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936,
    "tie_word_embeddings": True,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 2000,
}  # fmt: skip
BUDGETS = {"64 MiB": 64 * MIB, "default": None}


class Loss(NamedTuple):
    """What computes a loss, and what a training run enters around all of its steps."""

    call: Callable[[], Tensor]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


class Model(NamedTuple):
    """An architecture, its config, whether its layers are nf4, and the lengths to run."""

    name: str
    kind: str
    config: dict[str, Any]
    nf4: bool
    lengths: tuple[int, ...]

    @property
    def needs(self) -> tuple[str, ...]:
        """Libraries of a step of it."""
        return ("transformers", "peft", *(("bitsandbytes",) if self.nf4 else ()))


MODELS = (
    Model("Llama-3-8B QLoRA nf4", "llama", LLAMA_8B, True, (1024, 4096)),
    Model("Llama-3.2-1B LoRA bf16", "llama", LLAMA_1B, False, (1024, 4096, 16_384)),
    Model("Qwen2.5-0.5B LoRA bf16", "qwen2", QWEN_05B, False, (1024, 4096)),
)


def build(model: Model, device: str) -> nn.Module:
    """The model with its adapter, in bfloat16, gradients checkpointed."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model.kind, **model.config)
    with torch.device(device):
        made = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    made.config.use_cache = False
    reentrant = {"use_reentrant": False}
    if model.nf4:
        quantise(made, device)
        made = prepare_model_for_kbit_training(made, gradient_checkpointing_kwargs=reentrant)
    else:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs=reentrant)
        made.enable_input_require_grads()
    lora = LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM", target_modules=LAYERS)
    return get_peft_model(made, lora).to(device).train()


def quantise(model: nn.Module, device: str) -> None:
    """Every linear layer but the head to nf4 with double quantisation, one at a time."""
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "lm_head" not in name:
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, quant_type="nf4",
                compute_dtype=torch.bfloat16, compress_statistics=True,
            )  # fmt: skip
            new.weight = bnb.nn.Params4bit(
                layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True,
                module=new,
            )  # fmt: skip
            model.set_submodule(name, new.to(device))
            del layer
    model.is_loaded_in_4bit = True


def batch(T: int, vocabulary: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """One pair that shares its prompt: ids, labels of the answers, labels of the NLL, (2, T)."""
    torch.manual_seed(0)  # everybody the same pair
    ids = torch.randint(5, vocabulary, (2, T), device=device)
    prompt = int(T * PROMPT_SHARE)
    ids[1, :prompt] = ids[0, :prompt]
    labels, nll_labels = ids.clone(), ids.clone()
    labels[:, :prompt] = -100
    nll_labels[1] = -100
    return ids, labels, nll_labels


def trl_loss(model: nn.Module, T: int, vocabulary: int, device: str) -> Loss:
    """The loss of TRL's ORPOTrainer, on the logits."""
    trainer = trl_trainer(device)
    ids, labels, _ = batch(T, vocabulary, device)
    columns = {}
    for row, side in enumerate(("chosen", "rejected")):
        columns[f"{side}_input_ids"] = ids[row : row + 1]
        columns[f"{side}_attention_mask"] = torch.ones_like(ids[row : row + 1])
        columns[f"{side}_labels"] = labels[row : row + 1]
    return Loss(lambda: trainer.get_batch_loss_metrics(model, columns)[0])


def our_loss(model: nn.Module, T: int, vocabulary: int, device: str, budget: int | None) -> Loss:
    """Ours, with a workspace of so many bytes; fused for its own calls only."""
    ids, labels, nll_labels = batch(T, vocabulary, device)
    fused = fuse_head(model, loss=ORPOLoss(beta=BETA), workspace_bytes=budget)
    fused.unfuse()
    mask = torch.ones_like(ids)

    def loss() -> Tensor:
        with fused.active():
            output = model(input_ids=ids, attention_mask=mask, labels=labels, nll_labels=nll_labels)
        return output.loss

    return Loss(loss, fused.narrowed)


def measured(
    model: nn.Module, losses: dict[str, Loss], device: str, rounds: int
) -> dict[str, dict[str, float]]:
    """Of each loss the median time of a step, peak memory over the weights, the first loss.

    Round by round every loss takes its turn: what else happens on the host happens to all.
    """
    cuda = device == "cuda"
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-7)  # the weights stay: everybody the same loss
    clock, before = Stopwatch(device), torch.cuda.memory_allocated() if cuda else 0

    def step(loss_of: Callable[[], Tensor]) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, torch.bfloat16):
            loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss

    found: dict[str, dict[str, float]] = {}
    times: dict[str, list[float]] = {name: [] for name in losses}
    for name, loss in losses.items():
        with loss.around():
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            try:
                found[name] = {"first_loss": step(loss.call).item()}
            except torch.cuda.OutOfMemoryError:
                continue
            over = torch.cuda.max_memory_allocated() - before if cuda else 0
            found[name]["over_weights_bytes"] = over
    for _ in range(rounds):
        for name in found:
            with losses[name].around():
                times[name].append(clock(lambda name=name: step(losses[name].call)))
    for name, row in found.items():
        row["time_ms"] = 1e3 * statistics.median(times[name])
    optimizer.zero_grad(set_to_none=True)
    return found


def rows_of(spec: Model, device: str, until: float) -> Iterator[dict[str, Any]]:
    """Every length, TRL's loss first."""
    model = build(spec, device)
    for T in spec.lengths:
        if time.perf_counter() > until:
            print(f"out of time before {spec.name}, T {T}")
            return
        sizes = (model, T, spec.config["vocab_size"], device)
        losses = {f"ours, {name}": our_loss(*sizes, budget) for name, budget in BUDGETS.items()}
        try:
            losses = {"TRL ORPO": trl_loss(*sizes), **losses}
        except ImportError as error:
            yield {"model": spec.name, "T": T, "loss": "TRL ORPO", "skipped": str(error)}
        found = measured(model, losses, device, rounds=3 if T > 9000 else 5)
        reference = found.get("TRL ORPO")
        for name in losses:
            row: dict[str, Any] = {"model": spec.name, "T": T, "loss": name}
            if name not in found:
                yield row | {"skipped": "out of memory"}
                continue
            row |= found[name]
            row["tokens_per_s"] = 2e3 * T / row["time_ms"]
            if reference is not None:
                row["of_trl"] = row["time_ms"] / reference["time_ms"]
            yield row
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def text(row: dict[str, Any]) -> str:
    """One line of the table."""
    start = f"{row['model']:24} T {row['T']:6} {row['loss']:14}"
    if "skipped" in row:
        return f"{start} {row['skipped']}"
    return (
        f"{start} {row['time_ms']:9.1f} ms {row.get('of_trl', float('nan')):6.3f} of TRL's "
        f"{row['tokens_per_s']:9.0f} tokens/s {row['over_weights_bytes'] / GIB:6.2f} GiB over the "
        f"weights, loss {row['first_loss']:.4f}"
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_step", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=110.0, help="start nothing new after this")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    until, rows = time.perf_counter() + options.seconds, []
    models = (Model("tiny", "llama", TINY, False, (64,)),) if options.tiny else MODELS
    for model in models:
        missing = [each for each in model.needs if importlib.util.find_spec(each) is None]
        if missing:
            print(f"{model.name}: left out, not installed: {', '.join(missing)}")
        elif time.perf_counter() < until:
            for row in rows_of(model, options.device, until):
                rows.append(row)
                print(text(row), flush=True)
            gc.collect()
    if options.json:
        machine.write_results(options.json, options.device, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
