"""A few training steps of a tiny Hugging Face model whose head is fused; needs transformers."""

import importlib
from collections.abc import Iterator
from threading import Lock

import torch
from torch import Tensor

from orpo_kernels.loss import ORPOLoss
from orpo_kernels.selftest.figures import EPS32, Case, Figure, Setting, exact, relative_errors

STEPS = 8
_seeding = Lock()  # torch's random state is one for all threads
VOCABULARY = 97


def cases(setting: Setting) -> Iterator[Case]:
    """Training in float32, and under autocast in bf16."""
    if setting.dtype != torch.float16:  # needs a GradScaler: a matter of the training loop
        yield Case("fuse_head", "tiny Llama trains", setting, _trains)


def load() -> None:
    """Imports what the check trains, which takes longer than the check."""
    importlib.import_module("transformers.models.llama.modeling_llama")
    importlib.import_module("orpo_kernels.integrations.transformers")


def _trains(setting: Setting) -> Iterator[Figure]:
    transformers = importlib.import_module("transformers")
    integration = importlib.import_module("orpo_kernels.integrations.transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        attn_implementation="eager",
    )  # fmt: skip
    devices = [setting.device] if setting.device.type == "cuda" else []
    with _seeding, torch.random.fork_rng(devices):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).to(setting.device)
    ids = torch.randint(3, VOCABULARY, (4, 24), generator=setting.generator()).to(setting.device)
    labels = ids.clone()
    labels[:, :6] = -100
    # Without its cache, which all threads share and which outlives a nested context.
    autocast = torch.autocast(
        setting.device.type, torch.bfloat16, setting.dtype == torch.bfloat16, cache_enabled=False
    )
    with torch.no_grad(), autocast:
        eager = _token_logps(model(input_ids=ids).logits, labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0e-2)
    losses: list[float] = []
    with integration.fuse_head(model, loss=ORPOLoss()):
        for _ in range(STEPS):
            with autocast:
                out = model(input_ids=ids, labels=labels)
            if not losses:
                error, _ = relative_errors(out.token_logps, eager)
                # Measured 2e-7, and 2e-3 where torch rounds the logits to bf16.
                yield Figure("log-probs against the logits", error, max(32 * EPS32, setting.eps))
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
            losses.append(float(out.loss.detach()))
    # Measured 0.65: eight steps on one batch.
    yield Figure(f"loss after {STEPS} steps / before", losses[-1] / losses[0], 0.9)


def _token_logps(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-prob of the next label at each position, 0 where ignored and at the last."""
    logps = torch.zeros(labels.shape, dtype=torch.float64)
    shifted = labels[:, 1:].cpu()
    picked = exact(logits)[:, :-1].log_softmax(-1).gather(-1, shifted.clamp(min=0)[..., None])
    logps[:, :-1] = picked[..., 0] * (shifted >= 0)
    return logps
