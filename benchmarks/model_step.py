"""A whole training step of real architectures with random weights: ours against TRL's own loss.

    python -m benchmarks.model_step [--models 8B] [--lengths 1024] [--seconds 110] [--json FILE]
    python -m benchmarks.model_step --device cpu --tiny      # shows that it runs

LoRA on every linear layer, gradient checkpointing, one pair, AdamW; forward, backward and update
timed together, in turns (`turns.py`): of each loss the time of a step over that of TRL's turns
before and after it, median and IQR. Beside the wall time what the kernels of one step take in sum:
where that is far less, the host is what the step waits for. Memory is the peak of a step over the
model's weights as they are given. Weights are random, made from the config: what a step takes does
not depend on them. Tokens per second are those a user has, both sequences, whatever is computed.
"""

import argparse
import gc
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import BEGUN, machine
from benchmarks.measure import Stopwatch, counted
from benchmarks.peers import BETA, trl_trainer
from benchmarks.turns import (
    Row,
    Rows,
    Seconds,
    figures_or_reason,
    median_iqr,
    ratios,
    saying,
    take_turns,
)
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
TRL, DEFAULT = "TRL ORPO", "ours, default"
BUDGETS = {"ours, 64 MiB": 64 * MIB, DEFAULT: None}
OFFLOAD_FROM = 4096  # tokens of a sequence: inputs of layers are 0.5 GiB of a 1B model
TOLERANCE = 2e-2  # of a loss in bfloat16, against TRL's
REENTRANT = {"use_reentrant": False}


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
    if model.nf4:
        quantise(made, device)
        made = prepare_model_for_kbit_training(made, gradient_checkpointing_kwargs=REENTRANT)
    else:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs=REENTRANT)
        made.enable_input_require_grads()
    lora = LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM", target_modules=LAYERS)
    return get_peft_model(made, lora).to(device).train()


def quantise(model: nn.Module, device: str) -> None:
    """Every linear layer but the head to nf4 with double quantisation, one at a time."""
    import bitsandbytes as bnb

    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "lm_head" not in name:
            # Elsewhere the weights that it begins with, and loses here, are drawn on the CPU.
            new = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, quant_type="nf4",
                compute_dtype=torch.bfloat16, compress_statistics=True, device="meta",
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


def our_loss(model: nn.Module, T: int, vocabulary: int, device: str, **options: Any) -> Loss:
    """Ours, with options of `fuse_head`; fused for its own calls only."""
    ids, labels, nll_labels = batch(T, vocabulary, device)
    fused = fuse_head(model, loss=ORPOLoss(beta=BETA), **options)
    fused.unfuse()
    mask = torch.ones_like(ids)

    def loss() -> Tensor:
        with fused.active():
            output = model(input_ids=ids, attention_mask=mask, labels=labels, nll_labels=nll_labels)
        return output.loss

    return Loss(loss, fused.narrowed)


def offloaded(model: nn.Module, loss: Loss) -> Loss:
    """A loss with the inputs of checkpointed layers in the host's memory."""
    base: Any = model.get_base_model()

    @contextmanager
    def around() -> Iterator[None]:
        with loss.around():
            base.gradient_checkpointing_enable(REENTRANT, offload=True)
            try:
                yield
            finally:
                base.gradient_checkpointing_enable(REENTRANT)

    return Loss(loss.call, around)


def losses_of(model: nn.Module, T: int, vocabulary: int, device: str) -> dict[str, Loss]:
    """Every loss of a length, TRL's first where TRL is installed."""
    sizes, losses = (model, T, vocabulary, device), dict[str, Loss]()
    if importlib.util.find_spec("trl") is not None:
        losses[TRL] = trl_loss(*sizes)
    losses |= {name: our_loss(*sizes, workspace_bytes=each) for name, each in BUDGETS.items()}
    losses["ours, shared prompt"] = our_loss(*sizes, layout="shared_prompt")
    if T >= OFFLOAD_FROM and device == "cuda":  # which pins memory
        losses["ours, offload"] = offloaded(model, losses[DEFAULT])
    return losses


class Steps:
    """Training steps of one model with several losses."""

    def __init__(self, model: nn.Module, losses: dict[str, Loss], device: str) -> None:
        self.losses, self.device = losses, device
        self.clock = Stopwatch(device)
        trained = [each for each in model.parameters() if each.requires_grad]
        # With steps of nothing the weights stay: everybody computes the same loss.
        self.optimizer = torch.optim.AdamW(trained, lr=0.0)
        self.weights_bytes = torch.cuda.memory_allocated() if device == "cuda" else 0

    def step(self, name: str) -> Tensor:
        """Forward, backward and update; the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.losses[name].call()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def first(self, name: str) -> Row:
        """Loss and peak memory of a first step, the kernels of a second."""
        cuda = self.device == "cuda"
        self.optimizer.zero_grad(set_to_none=True)
        with self.losses[name].around():
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            loss = self.step(name).item()
            over = torch.cuda.max_memory_allocated() - self.weights_bytes if cuda else 0
            kernels = counted(lambda: self.step(name), self.device)
        return {"first_loss": loss, "over_weights_bytes": over, **kernels}

    def turn(self, name: str) -> float:
        """Seconds of a step."""
        with self.losses[name].around():
            return self.clock(lambda: self.step(name))


def measured(
    steps: Steps, rows: dict[str, Row], T: int, until: float, save: Callable[[], None]
) -> None:
    """Adds to every row what its steps take, in turns; `save` is called after each round."""

    def add(taken: Seconds) -> None:
        for name, seconds in taken.items():
            rows[name]["time_ms"] = median_iqr([1e3 * each for each in seconds])
            rows[name]["tokens_per_s"] = median_iqr([2 * T / each for each in seconds])
            if TRL in taken:
                rows[name]["of_trl"] = median_iqr(ratios(taken, name))
        save()

    right = {name for name, row in rows.items() if not {"skipped", "failed"} & row.keys()}
    turns = {name: partial(steps.turn, name) for name in rows if name in right}
    if turns:
        take_turns(turns, rounds=3 if T > 9000 else 5, until=until, after_round=add)


def refuse_other_losses(rows: dict[str, Row]) -> None:
    """A row whose loss is not TRL's has failed, and is not timed."""
    reference = rows.get(TRL, {}).get("first_loss")
    for row in rows.values():
        loss = row.get("first_loss", reference)
        if reference is not None and not abs(loss - reference) <= TOLERANCE * abs(reference):
            row["failed"] = f"its loss is {loss:.4f}, TRL's {reference:.4f}"


def run_model(
    spec: Model,
    device: str,
    until: float,
    say: Callable[[str], None],
    done: Rows,
    save: Callable[[], None],
) -> None:
    """Adds the rows of every length to `done`; `save` is called whenever they say more."""
    model = build(spec, device)
    say(f"{spec.name} is built")
    for T in spec.lengths:
        if time.perf_counter() > until:
            say(f"out of time before T {T}")
            return
        steps = Steps(model, losses_of(model, T, spec.config["vocab_size"], device), device)
        rows: dict[str, Row] = {}
        for name in steps.losses:
            rows[name] = {"model": spec.name, "T": T, "loss": name}
            rows[name] |= figures_or_reason(partial(steps.first, name))
            done.append(rows[name])
            save()
            say(f"T {T}, {name}: two steps")
        refuse_other_losses(rows)
        measured(steps, rows, T, until, save)
        for row in rows.values():
            print(text(row), flush=True)
        del steps
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def text(row: Row) -> str:
    """One line of the table."""
    start = f"{row['model'].split()[0]:12} T {row['T']:5} {row['loss']:19}"
    if "time_ms" not in row:
        return f"{start} {row.get('skipped') or row.get('failed')}"
    wall, share, rate = row["time_ms"], row.get("of_trl"), row["tokens_per_s"]
    kernels = f", kernels {row['kernels_ms']:.0f}" if "kernels_ms" in row else ""
    of_trl = f"{share['median']:6.3f} ({share['iqr']:.3f}) of TRL's, " if share else ""
    return (
        f"{start} {wall['median']:7.1f} ms ({wall['iqr']:.1f}){kernels}; {of_trl}"
        f"{rate['median']:.0f} tokens/s, {row['over_weights_bytes'] / GIB:.2f} GiB, "
        f"loss {row['first_loss']:.3f}"
    )


def chosen(options: argparse.Namespace) -> list[Model]:
    """The models and lengths of the command line whose libraries are installed."""
    if options.tiny:
        return [Model("tiny", "llama", TINY, False, (64,))]
    found = []
    for model in MODELS:
        if not any(each in model.name for each in options.models):
            continue
        missing = [each for each in model.needs if importlib.util.find_spec(each) is None]
        if missing:
            print(f"{model.name}: left out, not installed: {', '.join(missing)}")
            continue
        lengths = tuple(T for T in model.lengths if T in (options.lengths or model.lengths))
        found.append(model._replace(lengths=lengths))
    return found


def main(arguments: list[str] | None = None, begun: float | None = None) -> int:
    """The command line; `begun`: since when its seconds count, default now."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_step", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--models", nargs="+", default=[""], help="with one of these in their name")
    parser.add_argument("--lengths", type=int, nargs="+", help="of these only")
    parser.add_argument(
        "--seconds", type=float, default=110.0, help="start nothing new after this, imports counted"
    )
    parser.add_argument("--tiny", action="store_true", help="a tiny model: shows that it runs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    begun = time.perf_counter() if begun is None else begun
    until, say, rows = begun + options.seconds, saying(begun), Rows()

    def save() -> None:
        if options.json:
            machine.write_results(options.json, options.device, rows)

    save()
    for model in chosen(options):
        if time.perf_counter() > until:
            say(f"out of time before {model.name}")
            break
        run_model(model, options.device, until, say, rows, save)
        save()
        gc.collect()
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main(begun=BEGUN))
