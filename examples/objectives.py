"""Other objectives on the same op: DPO, IPO, KTO, SimPO, CPO, and the policy terms of PPO and GRPO.

    python -m examples.objectives        # a few steps of each on a tiny random model

All of them are sums over log-probs of tokens, so `linear_logps`, whose backward takes any
coefficient per token, is all they need: no logits, whatever the vocabulary. These are recipes to
copy, not a second product. Each is TRL 1.16's, to the digits of float32 (tests/test_objectives.py).

Shapes: B sequences, P pairs stacked as B = 2P with the chosen answers first, T tokens; `logps` and
`ref_logps` are log-probs in nats, 0 where `mask` is False; losses are means, 0-dim.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orpo_kernels import linear_logps

IGNORE_INDEX = -100


def token_logps(model: nn.Module, ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
    """(B, T - 1) log-probs of `labels` (B, T), unshifted; 0 where they are -100.

    The reference model's are the same call under `torch.no_grad()`, one pass and no gradient
    buffer. A head with a logit scale or a softcap: hand them on, or take `fuse_head`, which does.
    """
    hidden = model.base_model(ids, attention_mask=attention_mask).last_hidden_state
    head = model.get_output_embeddings()
    return linear_logps(hidden[:, :-1], head.weight, labels[:, 1:], head.bias)


def dpo(logps: Tensor, ref_logps: Tensor, beta: float = 0.1) -> Tensor:
    """Direct preference optimisation (arXiv 2305.18290): of two answers, by their log-ratios.

    Args:
        logps: (2P, T).
        ref_logps: (2P, T), of the reference model.
        beta: of the implied reward.
    """
    chosen, rejected = (logps - ref_logps).sum(1).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected)).mean()


def ipo(logps: Tensor, ref_logps: Tensor, mask: Tensor, beta: float = 0.1) -> Tensor:
    """Identity preference optimisation (arXiv 2310.12036): a margin of 1 / 2 beta, per token.

    Args:
        logps: (2P, T).
        ref_logps: (2P, T).
        mask: (2P, T) bool, the answers' tokens.
        beta: the paper's tau.
    """
    chosen, rejected = ((logps - ref_logps).sum(1) / mask.sum(1).clamp(min=1)).chunk(2)
    return (chosen - rejected - 1 / (2 * beta)).square().mean()


def kto(
    logps: Tensor, ref_logps: Tensor, desirable: Tensor, kl: Tensor, beta: float = 0.1
) -> Tensor:
    """Kahneman-Tversky optimisation (arXiv 2402.01306): single answers, wanted or not.

    Args:
        logps: (B, T).
        ref_logps: (B, T).
        desirable: (B,) bool.
        kl: (), mean over mismatched prompts and answers of their summed log-ratios; no graph.
        beta: of the implied reward.
    """
    margin = (logps - ref_logps).sum(1) - kl.clamp(min=0)
    return (1 - torch.sigmoid(beta * torch.where(desirable, margin, -margin))).mean()


def simpo(logps: Tensor, mask: Tensor, beta: float = 2.0, gamma: float = 1.0) -> Tensor:
    """SimPO (arXiv 2405.14734): mean log-probs with a margin, no reference model.

    Args:
        logps: (2P, T).
        mask: (2P, T) bool.
        beta: of the implied reward.
        gamma: its margin.
    """
    chosen, rejected = (logps.sum(1) / mask.sum(1)).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma).mean()


def cpo(logps: Tensor, mask: Tensor, beta: float = 0.1, alpha: float = 1.0) -> Tensor:
    """Contrastive preference optimisation (arXiv 2401.08417): preference and the chosen's NLL.

    Args:
        logps: (2P, T).
        mask: (2P, T) bool.
        beta: of the implied reward.
        alpha: weight of the NLL.
    """
    chosen, rejected = logps.sum(1).chunk(2)
    nll = -chosen.sum() / mask.chunk(2)[0].sum()
    return -F.logsigmoid(beta * (chosen - rejected)).mean() + alpha * nll


def clipped(logps: Tensor, old_logps: Tensor, advantages: Tensor, epsilon: float = 0.2) -> Tensor:
    """(B, T) PPO's clipped surrogate (arXiv 1707.06347), to be minimised.

    Args:
        logps: (B, T).
        old_logps: (B, T), of the policy that sampled.
        advantages: (B, T), or (B, 1).
        epsilon: how far the ratio may go.
    """
    ratio = torch.exp(logps - old_logps)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)


def ppo(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, mask: Tensor, epsilon: float = 0.2
) -> Tensor:
    """The policy term of PPO: the clipped surrogate, a mean over all tokens.

    Args:
        logps: (B, T).
        old_logps: (B, T).
        advantages: (B, T), of each token.
        mask: (B, T) bool.
        epsilon: how far the ratio may go.
    """
    return (clipped(logps, old_logps, advantages, epsilon) * mask).sum() / mask.sum().clamp(min=1)


def grpo(
    logps: Tensor,
    old_logps: Tensor,
    ref_logps: Tensor,
    rewards: Tensor,
    mask: Tensor,
    beta: float = 0.04,
    epsilon: float = 0.2,
) -> Tensor:
    """GRPO (arXiv 2402.03300): rewards against their group's, and a KL to the reference model.

    Args:
        logps: (G * K, T), K answers to each of G prompts.
        old_logps: (G * K, T).
        ref_logps: (G * K, T).
        rewards: (G, K).
        mask: (G * K, T) bool.
        beta: weight of the KL term.
        epsilon: how far the ratio may go.
    """
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    gap = ref_logps - logps
    terms = clipped(logps, old_logps, advantages.reshape(-1, 1), epsilon)
    terms = terms + beta * (torch.exp(gap) - gap - 1)
    return ((terms * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


OBJECTIVES = {
    "DPO": lambda now, ref, mask: dpo(now, ref),
    "IPO": lambda now, ref, mask: ipo(now, ref, mask),
    "KTO": lambda now, ref, mask: kto(now, ref, halves(now) == 0, torch.zeros(())),
    "SimPO": lambda now, ref, mask: simpo(now, mask),
    "CPO": lambda now, ref, mask: cpo(now, mask),
    "PPO": lambda now, ref, mask: ppo(now, ref, 1 - 2 * halves(now)[:, None].float(), mask),
    "GRPO": lambda now, ref, mask: grpo(
        now, ref, ref, (1 - halves(now).float()).view(2, -1).t(), mask
    ),
}
"""Each from the log-probs (2P, T) of now and of the reference; the first half is what is wanted."""


def halves(logps: Tensor) -> Tensor:
    """(2P,) 0 for the first half of the sequences, 1 for the second."""
    return torch.arange(len(logps)) // (len(logps) // 2)


def train(model: nn.Module, batch: dict[str, Tensor], name: str, steps: int = 5) -> list[float]:
    """Losses of a few steps on one batch: `ids`, `attention_mask`, `labels` (2P, T)."""
    with torch.no_grad():
        ref = token_logps(model, **batch)
    mask, losses = batch["labels"][:, 1:] != IGNORE_INDEX, []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        loss = OBJECTIVES[name](token_logps(model, **batch), ref, mask)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def main() -> None:
    """Train a tiny random Llama for a few steps with each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    for name in OBJECTIVES:
        torch.manual_seed(0)
        ids = torch.randint(0, 1000, (8, 24))
        labels = ids.clone()
        labels[:, :6] = IGNORE_INDEX  # the prompt
        batch = {"ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        losses = train(LlamaForCausalLM(config), batch, name)
        sys.stdout.write(f"{name:<6}" + "".join(f"{loss:10.4f}" for loss in losses) + "\n")


if __name__ == "__main__":
    main()
