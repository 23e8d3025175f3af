"""Checks of what follows the log-probs: sequence means, the pair term, and the loss as a whole."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from orpo_kernels import reference
from orpo_kernels.constants import IGNORE_INDEX
from orpo_kernels.loss import orpo_loss
from orpo_kernels.odds_ratio import odds_ratio_loss
from orpo_kernels.pair_loss import pair_loss
from orpo_kernels.selftest.figures import (
    EPS32,
    Case,
    Figure,
    Setting,
    exact,
    gradients_of,
    largest,
    relative_errors,
    rounded_once,
)
from orpo_kernels.selftest.logps import VOCABULARY
from orpo_kernels.sequence_mean import sequence_mean

# Mean log-probs: the pole at p = 1 first, both forms of log1mexp, what underflows.
GRID = [0.0, -(2.0**-27), -2.0e-8, -1.0e-6, -1.0e-3, -0.1, -0.5, -0.6931472, -0.7, -2.0, -10.0]
GRID += [-30.0, -100.0, -1.0e4]


def cases(setting: Setting) -> Iterator[Case]:
    """Means and pair loss (float32, whatever the model is), pair term and loss, in one dtype."""
    if setting.dtype == torch.float32:
        yield Case("sequence_mean", "padded", setting, _sequence_mean, (False,))
        yield Case("sequence_mean", "packed", setting, _sequence_mean, (True,))
        yield Case("pair_loss", "token mean, grid up to p = 1", setting, _pair_loss, (True,))
        yield Case("pair_loss", "pair mean, counts given", setting, _pair_loss, (False,))
        yield Case("pair_loss", "without the NLL", setting, _pair_loss, (True, False))
    yield Case("odds_ratio", "grid up to p = 1", setting, _odds_ratio)
    yield Case("orpo_loss", "token mean, padded, an empty side", setting, _loss, ("token", False))
    yield Case("orpo_loss", "pair mean, packed, an empty side", setting, _loss, ("pair", True))
    yield Case("orpo_loss", "nothing scored", setting, _nothing_scored)


def _sequence_mean(setting: Setting, packed: bool) -> Iterator[Figure]:
    # 301 positions: more than one vector, and no multiple of one. Row 4 has no token.
    generator = setting.generator()
    rows, positions = 6, 301
    logps = -4.0 * torch.rand(rows, positions, generator=generator)
    mask = torch.rand(rows, positions, generator=generator) < 0.7
    mask[4] = False
    weights = torch.randn(2, rows, generator=generator)
    true_logps, labels = exact(logps).requires_grad_(), torch.where(mask, 0, IGNORE_INDEX)
    # Two label sets, here the same one: the second scores the first three sequences only.
    true_mean = reference.sequence_mean(true_logps, labels)
    of_sets = weights[0] + torch.where(torch.arange(rows) < rows // 2, weights[1], 0.0)
    (true_dlogps,) = gradients_of([true_mean], [of_sets.double()], [true_logps])
    ids, given, scored = None, logps, labels
    if packed:
        order = torch.randperm(rows * positions, generator=generator)
        ids = (order // positions).to(setting.device)
        given, scored, true_dlogps = (x.flatten()[order] for x in (logps, scored, true_dlogps))
    x = setting.put(given).requires_grad_()
    scored = scored.to(setting.device)
    mean, count = sequence_mean(x, scored, (x, scored), sequence_ids=ids, num_sequences=rows)
    (dlogps,) = gradients_of([mean], [weights.to(setting.device)], [x])
    yield Figure("mean", relative_errors(mean[0], true_mean)[0], 32 * EPS32)
    yield Figure("mean of the second set", largest(mean[1, :3] - mean[0, :3]), 0.0)
    yield Figure("count", largest(exact(count[0]) - mask.sum(1)), 0.0)
    yield Figure("count of the second set", largest(exact(count[1, 3:])), 0.0)
    yield rounded_once("dlogps", dlogps, true_dlogps)


def _pair_loss(setting: Setting, by_token: bool, with_nll: bool = True) -> Iterator[Figure]:
    # Pairs of -1e-3 to -1e4 and of p = 1; two more that lack a side, with NaN there.
    chosen, rejected = torch.cartesian_prod(torch.tensor(GRID), torch.tensor(GRID)).unbind(1)
    P, beta = len(chosen), 0.5
    tokens = torch.arange(P) % 7 + 1.0
    counts: dict[str, Any] = (
        {} if by_token else {"num_pairs": torch.tensor(2 * P, device=setting.device)}
    )
    true = [exact(each).requires_grad_() for each in (chosen, rejected, chosen / 2)]
    losses, _ = reference.odds_ratio_loss(true[0], true[1])
    nll = -(true[2] * (tokens.double() if by_token else 1.0)).sum()
    pairs, weight = (P, float(tokens.sum())) if by_token else (2 * P, 2 * P)
    true_loss = with_nll * nll / weight + beta * losses.sum() / pairs
    true_gradients = torch.autograd.grad(true_loss, true)

    gap = torch.tensor([torch.nan, -1.0])
    mean = torch.stack(
        (
            torch.cat((chosen, gap, rejected, gap.flip(0))),
            torch.cat((chosen / 2, gap.flip(0), torch.zeros(P + 2))),
        )
    )
    count = torch.where(mean.isnan(), 0.0, 1.0)
    count[1, :P] = tokens
    given = setting.put(mean).requires_grad_()
    options = {"beta": beta, "by_token": by_token, "nll": with_nll, **counts}
    out = pair_loss(given, setting.put(count), **options)
    (dmean,) = torch.autograd.grad(out.loss, given)
    found = (dmean[0, :P], dmean[0, P + 2 : -2], dmean[1, :P])
    yield Figure("loss", relative_errors(out.loss, true_loss)[0], 32 * EPS32)
    yield Figure("NLL", relative_errors(out.parts[0], nll / weight)[0], 32 * EPS32)
    rewards = beta * exact(torch.cat((mean[0, :P], mean[0, P + 2 : -2])))
    found_rewards = torch.cat((out.rewards[:P], out.rewards[P + 2 : -2]))
    yield Figure("rewards", relative_errors(found_rewards, rewards)[0], EPS32)
    yield Figure("skipped pairs", abs(int(out.counts[0]) - 2), 0.0)
    yield Figure("gradient of skipped pairs", largest(dmean[:, P : P + 2]), 0.0)
    for what, ours, truth in zip(
        ("dchosen", "drejected", "dnll"), found, true_gradients, strict=True
    ):
        relative = (exact(ours) - truth).abs() / truth.abs().clamp(
            min=torch.finfo().smallest_normal
        )
        yield Figure(what, largest(relative), 2.0**-16)


def _odds_ratio(setting: Setting) -> Iterator[Figure]:
    # fp16 has no number above 65,504: the pole at p = 1 is checked in the wider dtypes.
    grid = GRID if setting.dtype != torch.float16 else GRID[4:]
    pairs = torch.cartesian_prod(torch.tensor(grid), torch.tensor(grid)).unbind(1)
    inputs = [setting.put(each).requires_grad_() for each in pairs]
    true_inputs = [exact(each).requires_grad_() for each in inputs]
    loss, ratio = odds_ratio_loss(*inputs)
    true_loss, true_ratio = reference.odds_ratio_loss(*true_inputs)
    actual = (loss, ratio, *torch.autograd.grad(loss.sum(), inputs))
    truth = (true_loss, true_ratio, *torch.autograd.grad(true_loss.sum(), true_inputs))
    names = ("loss", "log odds ratio", "dchosen", "drejected")
    for what, ours, true in zip(names, actual, truth, strict=True):
        limit = 2.0**-16 + torch.finfo(ours.dtype).eps
        yield Figure(what, _largest_relative(ours, true.detach()), limit)


def _largest_relative(ours: Tensor, true: Tensor) -> float:
    """Error by pair, as one certain pair must not hide the others."""
    smallest = torch.finfo(ours.dtype).smallest_normal  # below it there are no numbers
    return largest((exact(ours) - true).abs() / true.abs().clamp(min=smallest))


def _loss(setting: Setting, reduction: str, packed: bool) -> Iterator[Figure]:
    # 3 pairs of 13 positions; the rejected side of the second pair is empty.
    generator = setting.generator()
    rows, positions, hidden_size, vocabulary = 6, 13, 32, VOCABULARY
    labels = torch.randint(0, vocabulary, (rows, positions), generator=generator)
    nll_labels = labels.clone()
    labels[:, :4] = IGNORE_INDEX
    labels[4] = IGNORE_INDEX
    hidden = setting.put(torch.randn(rows, positions, hidden_size, generator=generator))
    weight = setting.put(torch.randn(vocabulary, hidden_size, generator=generator) / 6.0)
    keywords: dict[str, Any] = {"nll_reduction": reduction, "beta": 0.5}
    true_leaves = [exact(each).requires_grad_() for each in (hidden, weight)]
    true = reference.orpo_loss(
        true_leaves[0], true_leaves[1], labels, nll_labels=nll_labels, **keywords
    )
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    given, *both = (each.to(setting.device) for each in (hidden, labels, nll_labels))
    if packed:
        given, *both = (given.flatten(0, 1), *(each.flatten() for each in both))
        ids = torch.arange(rows, device=setting.device).repeat_interleave(positions)
        keywords |= {"sequence_ids": ids, "num_sequences": rows}
    out = orpo_loss(given, weight, both[0], nll_labels=both[1], **keywords)
    for what in ("loss", "nll_loss", "or_loss", "log_odds_ratio"):
        error, _ = relative_errors(getattr(out, what), getattr(true, what))
        yield Figure(what, error, 2 * setting.eps)
    yield Figure("skipped pairs", abs(int(out.skipped_pairs) - 1), 0.0)
    gradients = torch.autograd.grad(out.loss, leaves)
    true_gradients = torch.autograd.grad(true.loss, true_leaves)
    for what, ours, truth in zip(("dhidden", "dweight"), gradients, true_gradients, strict=True):
        # Measured 0.5 eps in bf16, 0.7 eps in fp16, 2e-7 in float32.
        yield Figure(what, max(relative_errors(ours, truth)), 4 * setting.eps)


def _nothing_scored(setting: Setting) -> Iterator[Figure]:
    # What is not scored is not read: NaN in it must not reach the loss or a gradient.
    hidden = setting.put(torch.full((4, 5, 8), torch.nan)).requires_grad_()
    weight = setting.put(torch.ones(33, 8)).requires_grad_()
    labels = torch.full((4, 5), IGNORE_INDEX, device=setting.device)
    out = orpo_loss(hidden, weight, labels)
    gradients = torch.autograd.grad(out.loss, (hidden, weight))
    for what, each in zip(("loss", "dhidden", "dweight"), (out.loss, *gradients), strict=True):
        yield Figure(what, largest(each), 0.0)
    yield Figure("skipped pairs", abs(int(out.skipped_pairs) - 2), 0.0)
