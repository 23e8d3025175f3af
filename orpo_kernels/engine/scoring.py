"""Which positions of a call are scored, by which labels: the rows that the loops are given.

The host must know how many they are, and waits for the device once to learn it.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orpo_kernels.engine.host_copy import HostCopy, is_capturing
from orpo_kernels.engine.operands import (
    Coefficients,
    Head,
    Labels,
    Operands,
    Rows,
    Statistics,
    flat_rows,
)
from orpo_kernels.engine.problem import Problem
from orpo_kernels.kernels import launcher, runs_triton

_ANY_ID = 2**31 - 1
_BAD_LABEL = "orpo_kernels: a label is outside [0, V)"
_BAD_GROUP = "orpo_kernels: a tail group is neither 0 nor 1"
_OTHER_GROUPS = "tail_groups must be 0 or 1 everywhere"


class Scored(NamedTuple):
    """Per position (N,): the labels with -1 for none, and which label sets score it."""

    labels: Labels
    masks: Tensor  # (K, N) bool
    counts: Tensor | None = None  # of `kernels/score_rows.py`

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


def score(
    labels: Tensor, ignore_index: int, vocabulary: int | None = None, groups: Tensor | None = None
) -> Scored:
    """Labels (K, ...) to one or two distinct labels per position; in one launch on a GPU.

    With `vocabulary` ids outside [0, V) are refused, and tail groups but 0 and 1: on a CPU here,
    of what kernels have scored by `select`, which waits for them; by an assertion that does not
    sync while a CUDA graph is captured, and where plain torch runs on another device.
    """
    flat = labels.reshape(labels.shape[0], -1)
    if runs_triton(labels.device, torch.float32) and flat.shape[1] > 0:
        of_rows = None if groups is None else groups.reshape(-1).contiguous()
        most = _ANY_ID if vocabulary is None else vocabulary
        found, masks, counts = launcher("score_rows", "score_rows")(
            flat, ignore_index, most, of_rows
        )
        if vocabulary is not None and is_capturing(labels.device):
            torch._assert_async((counts[1] == 0).all(), _BAD_LABEL)
            if of_rows is not None:
                torch._assert_async((counts[2] == 0).all(), _BAD_GROUP)
        return Scored(Labels(found[0], found[1] if found.shape[0] == 2 else None), masks, counts)
    masks = flat != ignore_index
    if groups is not None:
        _refuse_groups(groups)
    if vocabulary is not None:
        in_range = (flat >= 0) & (flat < vocabulary)
        _refuse_labels((in_range | ~masks).all(), flat, ignore_index, vocabulary)
    if flat.shape[0] == 1:
        return Scored(Labels(torch.where(masks[0], flat[0], -1), None), masks)
    either = torch.where(masks[0], flat[0], torch.where(masks[1], flat[1], -1))
    second = torch.where(masks[0] & masks[1] & (flat[0] != flat[1]), flat[1], -1)
    return Scored(Labels(either, second), masks)


def _refuse_groups(groups: Tensor) -> None:
    known = ((groups == 0) | (groups == 1)).all()
    if groups.device.type != "cpu":
        torch._assert_async(known, _BAD_GROUP)
    elif not bool(known):
        raise ValueError(_OTHER_GROUPS)


def _refuse_labels(valid: Tensor, labels: Tensor, ignore_index: int, vocabulary: int) -> None:
    if labels.device.type != "cpu":
        torch._assert_async(valid, _BAD_LABEL)
    elif not bool(valid):
        raise ValueError(_of_labels(labels, ignore_index, vocabulary))


def _of_labels(labels: Tensor, ignore_index: int, vocabulary: int) -> str:
    """What is wrong with labels of which one is not in [0, V)."""
    in_range = ((labels >= 0) & (labels < vocabulary)) | (labels == ignore_index)
    return (
        f"labels must be in [0, V) = [0, {vocabulary}) or ignore_index = {ignore_index}, "
        f"got {int(labels[~in_range][0])}; is the tokenizer larger than the head?"
    )


def select(problem: Problem, scored: Scored) -> Operands:
    """The scored rows of a problem; syncs a GPU once, to count them: see `Selection`."""
    return Selection(problem, scored).operands


class Selection:
    """The scored rows of a problem, being chosen: a GPU is waited for when they are asked for.

    While a CUDA graph is captured nothing may sync: every row is processed, those that are not
    scored as rows of 0 with coefficient 0.
    """

    def __init__(self, problem: Problem, scored: Scored) -> None:
        """Launches the choice."""
        self.problem, self.scored, self.parts = problem, scored, _parts_of(problem)
        self.chosen: Any = None
        self.asked: HostCopy | None = None
        if scored.counts is not None and not is_capturing(scored.labels.first.device):
            groups = None if problem.groups is None else problem.groups.reshape(-1).contiguous()
            choose = launcher("choose_rows", "choose_rows")
            self.chosen = choose(*scored.labels, groups, scored.counts)

    def ask(self) -> None:
        """Sends for the count now: what is launched from here on the host need not wait for."""
        if self.chosen is not None:
            self.asked = HostCopy(self.chosen.totals)

    @property
    def candidates(self) -> Operands:
        """All N positions, of which the scored ones come first: to prepare for before the wait."""
        if self.chosen is None:
            return self.operands
        places, labels, groups, _ = self.chosen
        rows = Rows(self.parts.hidden, places, self.problem.dtype)
        sizes = self.problem.sizes(self.problem.count)
        second = None if labels.shape[0] == 1 else labels[1]
        return Operands(rows, self.parts.head, Labels(labels[0], second), sizes, places, groups)

    @functools.cached_property
    def operands(self) -> Operands:
        """The scored rows.

        Raises:
            ValueError: labels or tail groups that kernels have scored, and which are no such.
        """
        problem, labels = self.problem, self.scored.labels
        if self.chosen is None and is_capturing(labels.first.device):
            return _operands(problem, self.parts, labels, None, labels.first >= 0)
        if self.chosen is None:
            index = (labels.first >= 0).nonzero()[:, 0]
            of_rows = labels if index.shape[0] == problem.count else labels.take(index)
            return _operands(problem, self.parts, of_rows, index, None)
        places, of_rows, groups, totals = self.chosen
        count, bad_labels, bad_groups = waited_for(
            totals if self.asked is None else self.asked.get()
        )
        if bad_labels:
            vocabulary = problem.weight.shape[0]
            raise ValueError(_of_labels(problem.labels, problem.ignore_index, vocabulary))
        if bad_groups:
            raise ValueError(_OTHER_GROUPS)
        second = None if labels.second is None else of_rows[1, :count]
        chosen = Labels(of_rows[0, :count], second)
        groups = None if groups is None else groups[:count]
        return _operands(problem, self.parts, chosen, places[:count], None, groups)


def waited_for(totals: Tensor) -> list[int]:
    """A few numbers of a device, which does everything before them first."""
    return totals.tolist()


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
        if self.number.shape[0] == 0:
            return
        masked = operands.rows.scored is not None
        self.number.fill_(-1 if masked else operands.sizes.rows)
        if operands.places is not None and not masked:
            self.rows[: operands.sizes.rows].copy_(operands.places)


def select_again(problem: Problem, scored: Scored, places: Places) -> Operands:
    """The same rows in the backward."""
    count, labels, parts = int(places.number), scored.labels, _parts_of(problem)
    if count < 0:
        return _operands(problem, parts, labels, None, labels.first >= 0)
    index = places.rows[:count]
    of_rows = labels if count == problem.count else labels.take(index)
    return _operands(problem, parts, of_rows, index, None)


class _Parts(NamedTuple):
    """Of all rows, made before the device is waited for."""

    hidden: tuple[Tensor, ...]
    head: Head


def _parts_of(problem: Problem) -> _Parts:
    hidden = tuple(flat_rows(each) for each in problem.hiddens)
    return _Parts(hidden, Head(problem.weights, problem.bias, problem.transform, problem.dtype))


def _operands(
    problem: Problem,
    of_all: _Parts,
    labels: Labels,
    index: Tensor | None,
    mask: Tensor | None,
    groups: Tensor | None = None,
) -> Operands:
    """Of the rows `index`, whose labels are given, or of all of them, those outside `mask` as 0."""
    parts, head = of_all
    if index is None or index.shape[0] == problem.count:
        if all(part.ndim == 2 for part in parts):
            index = None
        elif index is None:
            index = torch.arange(problem.count, device=labels.first.device)
    rows = Rows(parts, index, problem.dtype, mask)
    return Operands(rows, head, labels, problem.sizes(labels.first.shape[0]), index, groups)
