"""What the loops multiply and score: the scored rows, the head, the labels, the coefficients.

Rows of hidden states are gathered and vocabulary blocks of the head are cast one at a time; both
come out with contiguous rows, whatever the strides of what was given.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.engine.budget import Sizes, accumulation_dtype, spans
from orpo_kernels.engine.problem import Problem, Transform
from orpo_kernels.engine.tiles.plain import transformed
from orpo_kernels.kernels import launcher, runs_triton

_FEW_ROWS = 256
_ANY_ID = 2**31 - 1


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


class Scored(NamedTuple):
    """Per position (N,): the labels with -1 for none, and which label sets score it."""

    labels: Labels
    masks: Tensor  # (K, N) bool

    def coefficients(self, dlogps: Tensor) -> Coefficients:
        """From `d loss / d logps` (K, ...), any strides; ignored positions are dropped."""
        a = torch.where(self.masks, dlogps.reshape(self.masks.shape), 0.0)
        if self.labels.second is None:
            return Coefficients(a[0], None)
        second = torch.where(self.labels.second >= 0, a[1], 0.0)
        return Coefficients(a[0] + (a[1] - second), second)

    def logps(self, statistics: Statistics) -> Tensor:
        """Log-probs (K, N) per label set, 0 where it does not score."""
        logps = statistics.first_logp[None]
        if self.labels.second is not None:
            differs = self.labels.second >= 0
            second = torch.where(differs, statistics.second_logp, statistics.first_logp)
            logps = torch.stack((statistics.first_logp, second))
        return torch.where(self.masks, logps, 0.0)


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

    def placed(self, start: int, stop: int) -> slice | Tensor:
        """Where rows `start` to `stop` stand among all N."""
        return slice(start, stop) if self.places is None else self.places[start:stop]


def refuse_other_groups(groups: Tensor) -> None:
    """Refuse tail groups but 0 and 1; an error or an assertion, as for ids out of range."""
    known = ((groups == 0) | (groups == 1)).all()
    if groups.device.type != "cpu":
        torch._assert_async(known, "orpo_kernels: a tail group is neither 0 nor 1")
    elif not bool(known):
        raise ValueError("tail_groups must be 0 or 1 everywhere")


def score(labels: Tensor, ignore_index: int, vocabulary: int | None = None) -> Scored:
    """Labels (K, ...) to one or two distinct labels per position; in one launch on a GPU.

    With `vocabulary` ids outside [0, V) are refused: an error on a CPU, elsewhere an assertion that
    does not sync.
    """
    flat = labels.reshape(labels.shape[0], -1)
    if runs_triton(labels.device, torch.float32) and flat.shape[1] > 0:
        found, masks, valid = launcher("score_rows", "score_rows")(
            flat, ignore_index, _ANY_ID if vocabulary is None else vocabulary
        )
        if vocabulary is not None:
            _refuse(valid.all(), flat, ignore_index, vocabulary)
        return Scored(Labels(found[0], found[1] if found.shape[0] == 2 else None), masks)
    masks = flat != ignore_index
    if vocabulary is not None:
        in_range = (flat >= 0) & (flat < vocabulary)
        _refuse((in_range | ~masks).all(), flat, ignore_index, vocabulary)
    if flat.shape[0] == 1:
        return Scored(Labels(torch.where(masks[0], flat[0], -1), None), masks)
    either = torch.where(masks[0], flat[0], torch.where(masks[1], flat[1], -1))
    second = torch.where(masks[0] & masks[1] & (flat[0] != flat[1]), flat[1], -1)
    return Scored(Labels(either, second), masks)


def _refuse(valid: Tensor, labels: Tensor, ignore_index: int, vocabulary: int) -> None:
    if labels.device.type != "cpu":
        torch._assert_async(valid, "orpo_kernels: a label is outside [0, V)")
    elif not bool(valid):
        in_range = ((labels >= 0) & (labels < vocabulary)) | (labels == ignore_index)
        raise ValueError(
            f"labels must be in [0, V) = [0, {vocabulary}) or ignore_index = {ignore_index}, "
            f"got {int(labels[~in_range][0])}; is the tokenizer larger than the head?"
        )


def select(problem: Problem, scored: Scored) -> Operands:
    """The scored rows of a problem; syncs a GPU once, to count them.

    While a CUDA graph is captured nothing may sync: every row is processed, those that are not
    scored as rows of 0 with coefficient 0.
    """
    is_scored = scored.labels.first >= 0
    if is_capturing(is_scored.device):
        return _operands(problem, scored, None, is_scored)
    return _operands(problem, scored, is_scored.nonzero()[:, 0], None)


class Places(NamedTuple):
    """Which rows a forward selected, for its backward, which then need not wait for the device."""

    rows: Tensor  # (N,) int64, the scored ones first
    number: Tensor  # (1,) int64 on the host: how many; -1: every row, those not scored as 0

    @classmethod
    def empty(cls, problem: Problem) -> "Places":
        """Their memory, of no element where no backward will ask."""
        count = problem.count if problem.trainable else 0
        number = torch.empty(int(problem.trainable), dtype=torch.int64)
        return cls(problem.labels.new_empty(count), number)

    def note(self, operands: Operands) -> None:
        """Keeps what was selected."""
        masked = operands.rows.scored is not None
        self.number.fill_(-1 if masked else operands.sizes.rows)
        if operands.places is not None and self.rows.shape[0] > 0 and not masked:
            self.rows[: operands.sizes.rows].copy_(operands.places)


def select_again(problem: Problem, scored: Scored, places: Places) -> Operands:
    """The same rows in the backward."""
    count = int(places.number)
    if count < 0:
        return _operands(problem, scored, None, scored.labels.first >= 0)
    return _operands(problem, scored, places.rows[:count], None)


def _operands(
    problem: Problem, scored: Scored, index: Tensor | None, mask: Tensor | None
) -> Operands:
    """Of the rows `index`, or of all of them, those outside `mask` as 0."""
    parts = tuple(flat_rows(each) for each in problem.hiddens)
    labels, count = scored.labels, problem.count
    if index is not None and index.shape[0] < count:
        labels = labels.take(index)
    elif all(part.ndim == 2 for part in parts):
        index = None
    elif index is None:
        index = torch.arange(count, device=labels.first.device)
    rows = Rows(parts, index, problem.dtype, mask)
    head = Head(problem.weights, problem.bias, problem.transform, problem.dtype)
    return Operands(rows, head, labels, problem.sizes(labels.first.shape[0]), index)


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured, in which nothing may wait for the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


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
