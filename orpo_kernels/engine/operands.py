"""What the loops multiply and score: the scored rows, the head, the labels, the coefficients.

Rows of hidden states are gathered and vocabulary blocks of the head are cast one at a time; both
come out with contiguous rows, whatever the strides of what was given.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.engine.budget import Sizes, accumulation_dtype, spans
from orpo_kernels.engine.problem import Transform
from orpo_kernels.engine.tiles.plain import transformed

_FEW_ROWS = 256


class Labels(NamedTuple):
    """Labels of the scored rows, (M,) int64: the first of a row, and a differing second or -1."""

    first: Tensor
    second: Tensor | None

    def take(self, rows: Tensor) -> "Labels":
        """Those rows."""
        return Labels(self.first[rows], None if self.second is None else self.second[rows])

    def stacked(self, start: int, stop: int) -> Tensor:
        """`(K, R)`, as the tile operations take them."""
        sets = (self.first,) if self.second is None else (self.first, self.second)
        return torch.stack([labels[start:stop] for labels in sets])


class Coefficients(NamedTuple):
    """Slope of the loss in each scored row's log-probs, (M,): the first's; the second's, else 0."""

    first: Tensor
    second: Tensor | None

    def take(self, rows: Tensor) -> "Coefficients":
        """Those rows."""
        return Coefficients(self.first[rows], None if self.second is None else self.second[rows])

    @property
    def total(self) -> Tensor:
        """The coefficient of the softmax itself."""
        return self.first if self.second is None else self.first + self.second


class Statistics(NamedTuple):
    """What the backward needs of each row's softmax, (N,) each, by name.

    In memory they are one tensor (7, N), or (8, N) of the sparse gradient.
    """

    reference: Tensor  # m, which E = exp(z - m) d refers to
    scale: Tensor  # e^(m - lse): from E to probabilities
    beside: Tensor  # the mass beside the labels: 1 - p, never by subtraction
    first_logp: Tensor
    second_logp: Tensor  # of the second label, where it differs; else 0
    first_slope: Tensor  # d = dz / d(h W^T) at the first label
    second_slope: Tensor
    dropped: Tensor | None = None  # the sparse gradient's m_t over the mass beside the labels

    @classmethod
    def of(cls, rows: Tensor) -> "Statistics":
        """The names of a tensor (7 or 8, ...)."""
        return cls(*rows.unbind(0))

    def label_shares(self, a: Coefficients) -> list[Tensor]:
        """What multiplies h in dW[label], (M,) per label set: `d (a (1 - p) - a_other p)`."""
        if a.second is None:
            return [-a.first * torch.expm1(self.first_logp) * self.first_slope]
        first = -a.first * torch.expm1(self.first_logp) - a.second * torch.exp(self.first_logp)
        second = -a.second * torch.expm1(self.second_logp) - a.first * torch.exp(self.second_logp)
        return [first * self.first_slope, second * self.second_slope]

    def moved(self, a: Coefficients) -> Tensor:
        """What multiplies `d W[y] - d_2 W[y_2]` in dhidden, (M,): `a p_2 - a_2 (1 - p_2)`.

        Of a row whose labels are not two that differ it means nothing.
        """
        own = torch.zeros_like(a.first) if a.second is None else a.second
        return own * torch.expm1(self.second_logp) + a.first * torch.exp(self.second_logp)


class Rows:
    """Rows of hidden states (and of their low-rank part), gathered by chunk in the GEMMs' dtype.

    With `scored` (N,) bool, the other rows are read as 0, whatever padding left in them.
    """

    def __init__(
        self,
        parts: tuple[Tensor, ...],
        index: Tensor | None,
        dtype: torch.dtype,
        scored: Tensor | None = None,
    ) -> None:
        self.parts = parts
        self.index = index
        self.dtype = dtype
        self.scored = scored

    def take(self, start: int, stop: int, parts: tuple[int, ...] | None = None) -> Tensor:
        """Rows `start` to `stop` of the chosen parts, `(R, H)`; a view where nothing moves."""
        chosen = self.parts if parts is None else tuple(self.parts[i] for i in parts)
        pieces = [self._gather(part, start, stop).to(self.dtype) for part in chosen]
        if self.scored is not None:
            keep = self.scored[start:stop, None]
            pieces = [torch.where(keep, piece, 0.0) for piece in pieces]
        return in_rows(pieces[0]) if len(pieces) == 1 else torch.cat(pieces, 1)

    def _gather(self, part: Tensor, start: int, stop: int) -> Tensor:
        if self.index is None:
            return part[start:stop]
        rows = self.index[start:stop]
        if part.ndim == 2:
            return part.index_select(0, rows)
        return part[torch.unravel_index(rows, part.shape[:-1])]

    def largest_magnitude(self, count: int) -> Tensor:
        """Of the first `count` rows, at least one; 0-dim float32, a few rows at a time."""
        spanned = [self.take(i, j).abs().amax() for i, j in spans(count, _FEW_ROWS)]
        return torch.stack(spanned).amax().float()


class LabelTerms(NamedTuple):
    """Of the first label: entry (R, H), logit, slope; of a second: logit, slope, if it differs."""

    entries: Tensor
    z: Tensor
    slope: Tensor
    second: tuple[Tensor, Tensor, Tensor] | None = None

    def lse(self, labels: Tensor) -> Tensor:
        """Log of the sum of the labels' exponentials, -inf for a row without; `labels` (K, R)."""
        lse = torch.where(labels[0] >= 0, self.z, -torch.inf)
        if self.second is None:
            return lse
        z, _, distinct = self.second
        return torch.logaddexp(lse, torch.where(distinct, z, -torch.inf))


@dataclass(frozen=True)
class Head:
    """The output projection: weight (V, H) in one or two parts, bias (V,), transform of logits."""

    parts: tuple[Tensor, ...]
    bias: Tensor | None
    transform: Transform
    dtype: torch.dtype

    def block(self, start: int, stop: int) -> Tensor:
        """Vocabulary entries `start` to `stop`, `(C, H)` in the GEMMs' dtype, its rows contiguous.

        A view, unless the head is cast, joined from two parts, or strided.
        """
        pieces = [part[start:stop].to(self.dtype) for part in self.parts]
        return in_rows(pieces[0]) if len(pieces) == 1 else torch.cat(pieces, 1)

    def block_bias(self, start: int, stop: int) -> Tensor | None:
        """Bias of a vocabulary block."""
        return None if self.bias is None else self.bias[start:stop].contiguous()

    def entries(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """Entries of the labels (-1 taken as 0), `(R, H)`, rounded like the GEMMs' operands."""
        index = labels.clamp(min=0)
        pieces = [part.index_select(0, index).to(self.dtype).to(dtype) for part in self.parts]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)

    def label_terms(self, hidden: Tensor, labels: Tensor) -> LabelTerms:
        """Label logits from float32 dots of the operands: a confident token loses no digits."""
        wide = accumulation_dtype(self.dtype)
        first = self.entries(labels[0], wide)
        dots = [_dots(hidden, first)]
        if labels.shape[0] == 2:
            dots.append(_dots(hidden, self.entries(labels[1], wide)))
        return self.terms_of(first, dots, labels)

    def terms_of(self, entries: Tensor, dots: list[Tensor], labels: Tensor) -> LabelTerms:
        """The same from the raw dots of each label set."""
        z, slope = self._transformed(dots[0], labels[0])
        if len(dots) == 1:
            return LabelTerms(entries, z, slope)
        return LabelTerms(
            entries, z, slope, (*self._transformed(dots[1], labels[1]), labels[1] >= 0)
        )

    def _transformed(self, dots: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return transformed(dots, self.bias, labels.clamp(min=0), *self.transform)


class Operands(NamedTuple):
    """The scored rows: their hidden parts, head, labels, and where they stand among all N."""

    rows: Rows
    head: Head
    labels: Labels
    sizes: Sizes
    places: Tensor | None  # (M,) or None: every row is scored
    groups: Tensor | None = None  # (M,) int64 tail groups, where they were chosen with the rows

    def placed(self, start: int, stop: int) -> slice | Tensor:
        """Where rows `start` to `stop` stand among all N."""
        return slice(start, stop) if self.places is None else self.places[start:stop]


def flat_rows(hidden: Tensor) -> Tensor:
    """`(N, H)` where that is a view, else as it is."""
    # A slice such as hidden[:, :-1] has no (N, H) view: it is gathered chunk by chunk instead.
    try:
        return hidden.view(-1, hidden.shape[-1])
    except RuntimeError:
        return hidden


def in_rows(matrix: Tensor) -> Tensor:
    """A matrix whose rows are contiguous and do not overlap: itself, or a copy."""
    lies_so = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
    # Not contiguous(): a tensor of one column is contiguous whatever its stride.
    return matrix if lies_so else matrix.clone(memory_format=torch.contiguous_format)


def _dots(hidden: Tensor, label_rows: Tensor) -> Tensor:
    return (hidden.to(label_rows.dtype) * label_rows).sum(1)
