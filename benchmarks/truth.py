"""What the right answer is, on a slice, from `orpo_kernels.reference` in float64.

The loss and the coefficient of every token come from all scored rows (log-probs a few rows at a
time); the gradients of `hidden` are checked on `ROWS` sampled rows, those of `weight` on `COLUMNS`
sampled tokens (half of them labels), against the output of the very run, at full size, that is
timed next.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers import BETA
from benchmarks.workloads import Workload
from orpo_kernels import reference
from orpo_kernels.constants import IGNORE_INDEX

ROWS = 32
COLUMNS = 128
CHUNK_BYTES = 256 << 20  # float64 logits at once

# A peer over these is recorded and flagged: naive bf16 logits alone cost 1e-2 to 9e-2 in the
# gradient of confident rows.
LIMITS = {
    "float32": {"loss": 1e-5, "dhidden": 1e-3, "dweight": 1e-3},
    "bfloat16": {"loss": 5e-3, "dhidden": 3e-2, "dweight": 3e-2},
}
# What we refuse to time in our own code, which errs by rounding alone: 2e-3 of both gradients in
# bf16, and 1.4e-2 of dhidden where it is sparse. A race once cost 1e-2 of dW.
OWN_LIMITS = {**LIMITS, "bfloat16": {"loss": 1e-4, "dhidden": 2e-2, "dweight": 5e-3}}
GROSS = 0.3  # over this it is not the same function: nobody is timed


class WrongResult(AssertionError):
    """An implementation does not compute the ORPO loss; its time would mean nothing."""


@dataclass
class Truth:
    """The loss, `dhidden` (ROWS, H) of the flat `rows`, `dweight` (COLUMNS, H) of `columns`."""

    loss: float
    rows: Tensor
    dhidden: Tensor
    columns: Tensor
    dweight: Tensor


def compute_truth(workload: Workload, seed: int = 0) -> Truth:
    """Float64 truth of `workload`, on its own rounded inputs."""
    hidden = workload.hidden.detach().flatten(0, 1)
    labels = workload.union_labels
    scored = (labels.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    targets = labels.flatten()[scored]
    weight = workload.weight.detach().double()
    softcap = workload.softcap

    rows_at_once = max(1, CHUNK_BYTES // (8 * weight.shape[0]))
    with torch.no_grad():
        logps = torch.cat(
            [
                reference.linear_logps(hidden[index].double(), weight, target, softcap=softcap)
                for index, target in zip(
                    scored.split(rows_at_once), targets.split(rows_at_once), strict=True
                )
            ]
        )
    loss, coefficients = _loss_of_logps(logps, workload)

    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(len(scored), generator=generator)[:ROWS].to(hidden.device)
    some = hidden[scored[picked]].double().requires_grad_()
    weighted = (
        reference.linear_logps(some, weight, targets[picked], softcap=softcap)
        * coefficients[picked]
    )
    (dhidden,) = torch.autograd.grad(weighted.sum(), some)

    columns = _columns(targets, weight.shape[0], generator)
    dweight = _dweight(
        hidden[scored].double(), weight, targets, logps, coefficients, columns, softcap
    )
    return Truth(loss, scored[picked], dhidden, columns, dweight)


def _loss_of_logps(logps: Tensor, workload: Workload) -> tuple[float, Tensor]:
    """The loss and its derivative by the log-prob of every scored row, (N,) float64."""
    labels, nll_labels = workload.labels, workload.nll_labels
    mask = workload.union_labels != IGNORE_INDEX
    leaf = logps.detach().requires_grad_()
    full = leaf.new_zeros(mask.shape).masked_scatter(mask, leaf)
    chosen, rejected = reference.sequence_mean(full, labels).chunk(2)
    nll = nll_labels != IGNORE_INDEX
    loss = -(full * nll).sum() / nll.sum()
    loss = loss + BETA * reference.odds_ratio_loss(chosen, rejected)[0].mean()
    (coefficients,) = torch.autograd.grad(loss, leaf)
    return loss.item(), coefficients


def _columns(targets: Tensor, vocab: int, generator: torch.Generator) -> Tensor:
    labels = targets.unique()
    some = labels[
        torch.randperm(len(labels), generator=generator)[: COLUMNS // 2].to(labels.device)
    ]
    others = torch.randint(0, vocab, (COLUMNS - len(some),), generator=generator)
    return torch.cat([some, others.to(labels.device)]).unique()


def _dweight(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    logps: Tensor,
    coefficients: Tensor,
    columns: Tensor,
    softcap: float | None,
) -> Tensor:
    """dW_v = sum_t a_t d_tv (1[v = y_t] - p_tv) h_t on some v; d, of the softcap, by autograd."""
    some = weight[columns].requires_grad_()
    z = reference.logits(hidden, some, softcap=softcap)  # (N, C)
    with torch.no_grad():
        label_logits = (hidden * weight[targets]).sum(-1)
        if softcap is not None:
            label_logits = softcap * torch.tanh(label_logits / softcap)
        lse = label_logits - logps
        p = torch.exp(z - lse[:, None])
        factor = coefficients[:, None] * ((targets[:, None] == columns).double() - p)
    (dweight,) = torch.autograd.grad((z * factor).sum(), some)
    return dweight


def errors(
    truth: Truth, loss: Tensor, dhidden: Tensor | None, dweight: Tensor | None
) -> dict[str, float]:
    """Relative errors (of the loss; Frobenius norm of the sampled gradients)."""
    found = {"loss": abs(loss.item() - truth.loss) / abs(truth.loss)}
    if dhidden is not None:
        found["dhidden"] = relative(dhidden.flatten(0, 1)[truth.rows], truth.dhidden)
    if dweight is not None:
        found["dweight"] = relative(dweight[truth.columns], truth.dweight)
    return found


def relative(got: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference, over that of what is expected."""
    return ((got.double() - expected).norm() / expected.norm()).item()


def judge(found: dict[str, float], dtype: str, *, peer: bool) -> bool:
    """True when every error is within the limits.

    Raises:
        WrongResult: an error is gross, or over the limits in our own code.
    """
    limits = (LIMITS if peer else OWN_LIMITS)[dtype]
    over = {name: value for name, value in found.items() if not value <= limits[name]}
    gross = {name: value for name, value in over.items() if not value <= GROSS or math.isnan(value)}
    if gross or (over and not peer):
        raise WrongResult(
            f"relative errors must be within {limits}, got {found}; not timed until it is right"
        )
    return not over
