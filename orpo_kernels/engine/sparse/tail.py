"""What the sparse gradient drops, what it gives back for it, and the certificate of the rest."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.engine.budget import spans
from orpo_kernels.engine.operands import Head, Operands, Statistics, in_rows
from orpo_kernels.engine.problem import Problem
from orpo_kernels.engine.scoring import Scored
from orpo_kernels.engine.tiles import column_sums
from orpo_kernels.kernels import launcher, runs_triton


@dataclass(frozen=True)
class Tail:
    """What is dropped: entries up to `eps`, and their sums by group."""

    eps: float
    groups: Tensor  # (M,) int64, of the scored rows
    sums: Tensor  # (G, V)

    @classmethod
    def of(cls, problem: Problem, operands: Operands, sums: Tensor) -> "Tail":
        """With the group of each scored row, -1 where a captured graph has one that is not."""
        first = operands.labels.first
        if operands.groups is not None:
            return cls(problem.eps, operands.groups, sums)
        if problem.groups is None:
            of_row = torch.zeros_like(first)
        else:
            flat = problem.groups.reshape(-1)
            of_row = flat.contiguous() if operands.places is None else flat[operands.places]
        if operands.rows.scored is not None:
            of_row = torch.where(first >= 0, of_row, -1)
        return cls(problem.eps, of_row, sums)

    def mean(self) -> Tensor:
        """The vectors q (G, V): each sums to 1, or is 0 where nothing was dropped."""
        return self._over_mass(self.sums)

    def product(self, head: Head, step: int) -> Tensor:
        """The rows q W (G, H), from entries of the head that are not rounded."""
        parts = [self.sums.new_zeros((self.sums.shape[0], w.shape[1])) for w in head.parts]
        for v0, v1 in spans(self.sums.shape[1], step):
            for total, weight in zip(parts, head.parts, strict=True):
                total += column_sums(in_rows(weight[v0:v1]), self.sums[:, v0:v1])
        return self._over_mass(torch.cat(parts, 1))

    def _over_mass(self, sums: Tensor) -> Tensor:
        # The mass may be a subnormal number, whose reciprocal is infinite.
        mass = self.sums.sum(1, keepdim=True)
        return torch.where(mass > 0, sums / mass, 0.0)


class Packed(NamedTuple):
    """The kept entries between forward and backward, by tile: chunk x block, block the faster."""

    store: Tensor  # (bytes,) uint8
    table: Tensor  # (items, 2) int64: first byte and bytes of an item, -1 for none
    per_block: Tensor  # (blocks, 2, N): the m that E of a block refers to, and the E dropped in it


def certificate_fields(
    problem: Problem, scored: Scored, statistics: Tensor, entries: Tensor, rounding: float
) -> Tensor:
    """The fields of `Certificate`, (5,) float32; `entries` (any length) are the kept ones, counted.

    All as probabilities, without the scale that entries have. What was dropped may be as much more
    than m_t as the kept entries, `rounding` of each, were rounded up by. Their sum is that of all,
    at most the mass beside the labels (with a softcap less), without m_t.
    """
    vocabulary, scale = problem.weight.shape[0], problem.transform.scale
    rounded = rounding / (1.0 - rounding)
    if runs_triton(statistics.device, statistics.dtype) and scored.labels.first.shape[0] > 0:
        numbers = (scale, problem.eps / scale, rounded)
        launch = launcher("certificate", "certificate")
        fields: Tensor = launch(scored.labels.first, statistics, entries, vocabulary, numbers)
        return fields
    is_scored, figures = scored.labels.first >= 0, Statistics.of(statistics)
    rows, beside = is_scored.sum().clamp(min=1), figures.beside
    mass = torch.where(is_scored, _dropped(figures) * beside / scale, 0.0)
    kept_sum = torch.where(is_scored, beside - mass, 0.0).clamp(min=0.0)
    residual = (problem.eps / scale * (mass + rounded * kept_sum).clamp(min=0.0)).sqrt()
    share = entries.sum() / vocabulary / rows
    of_rows = (share, mass.sum() / rows, mass.amax(), residual.sum() / rows, residual.amax())
    return torch.stack([each.to(torch.float32) for each in of_rows])


def _dropped(statistics: Statistics) -> Tensor:
    if statistics.dropped is None:
        raise TypeError("these statistics are of an exact call: nothing was dropped")
    return statistics.dropped
