"""What the tests of the fused head compare with: the same model on its own logits."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orpo_kernels import ORPOLoss
from tests.tiny_models import VOCAB_SIZE

BETA = 0.5  # large enough for the odds-ratio term to show in every gradient
FIRST_ID = 5  # after the special tokens


def make_batch(pairs: int = 2, length: int = 9, vocab_size: int = VOCAB_SIZE) -> dict[str, Tensor]:
    """Stacked pairs as the collator makes them: ragged, prompts masked in the odds labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(FIRST_ID, vocab_size - 1, (2 * pairs, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, length - 3 :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    nll_labels = labels.clone()
    nll_labels[pairs:] = -100
    labels = labels.clone()
    labels[:, :3] = -100
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "nll_labels": nll_labels,
    }


class Step(NamedTuple):
    """One forward and backward."""

    loss: Tensor
    token_logps: Tensor
    nll_token_logps: Tensor
    mean_logits: Tensor
    gradients: dict[str, Tensor]


def unfused_step(model: nn.Module, batch: dict[str, Tensor], seed: int = 0, **extra: Any) -> Step:
    """The step on the model's own logits: log_softmax, gather, and autograd through both."""
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "nll_labels")}
    torch.manual_seed(seed)
    output = model(**inputs, **extra)
    logps = F.log_softmax(output.logits[:, :-1], dim=-1)

    def shifted(labels: Tensor) -> Tensor:
        return F.pad(labels[:, 1:], (0, 1), value=-100)

    def picked(labels: Tensor) -> Tensor:
        target = labels[:, 1:]
        taken = logps.gather(-1, target.clamp(min=0)[..., None])[..., 0]
        return F.pad(taken.masked_fill(target == -100, 0.0), (0, 1))

    labels, nll_labels = batch["labels"], batch["nll_labels"]
    token_logps, nll_token_logps = picked(labels), picked(nll_labels)
    loss = (
        ORPOLoss(BETA)
        .from_logps(token_logps, shifted(labels), nll_token_logps, shifted(nll_labels))
        .loss
    )
    if isinstance(getattr(output, "aux_loss", None), Tensor):
        loss = loss + 0.1 * output.aux_loss  # the coefficient of the tiny mixtures of experts
    mean_logits = output.logits[:, :-1].mean((1, 2)).detach()
    return Step(loss.detach(), token_logps, nll_token_logps, mean_logits, backward(model, loss))


def fused_step(model: nn.Module, batch: dict[str, Tensor], seed: int = 0, **extra: Any) -> Step:
    """The same step of a fused model."""
    torch.manual_seed(seed)
    output = model(**batch, **extra)
    assert output.logits.shape == (*batch["labels"].shape, 0)
    return Step(
        output.loss.detach(),
        output.token_logps,
        output.nll_token_logps,
        output.mean_logits,
        backward(model, output.loss),
    )


def backward(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return grads


def assert_same_step(fused: Step, unfused: Step, tolerance: float = 1e-5) -> None:
    """Equal up to `tolerance`, relative to the largest value of the tensor.

    A gradient that is zero but for rounding (OPT's key biases) is held to the largest of them all.
    """
    for name in ("loss", "token_logps", "nll_token_logps", "mean_logits"):
        ours, theirs = getattr(fused, name), getattr(unfused, name)
        if ours is not None:
            share = max(tolerance, 1e-5) if name == "mean_logits" else tolerance  # a float32 metric
            assert_near(name, ours, theirs, share * float(theirs.detach().abs().max()))
    assert fused.gradients.keys() == unfused.gradients.keys()
    largest = max(float(g.abs().max()) for g in unfused.gradients.values())
    for name, theirs in unfused.gradients.items():
        allowed = tolerance * (float(theirs.abs().max()) + 1e-2 * largest)
        assert_near(name, fused.gradients[name], theirs, allowed)


def assert_near(name: str, ours: Tensor, theirs: Tensor, allowed: float) -> None:
    error = float((ours.detach().double() - theirs.detach().double()).abs().max())
    assert error <= allowed, f"{name}: {error:.3g} > {allowed:.3g}"
