"""Which positions are scored, by which label, and the rows of hidden states that go with them."""

from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.engine.chunks import Columns, Rows, Sizes
from orpo_kernels.engine.exact import Coefficients, Head, Labels


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

    def logps(self, statistics: Tensor) -> Tensor:
        """Log-probs (K, N) per label set, 0 where it does not score, from the statistics (7, N)."""
        logps = statistics[3:4]
        if self.labels.second is not None:
            second = torch.where(self.labels.second >= 0, statistics[4], statistics[3])
            logps = torch.stack((statistics[3], second))
        return torch.where(self.masks, logps, 0.0)


def refuse_out_of_range(labels: Tensor, ignore_index: int, vocabulary: int) -> None:
    """Refuse ids outside [0, V): an error on a CPU, elsewhere an assertion that does not sync."""
    in_range = ((labels >= 0) & (labels < vocabulary)) | (labels == ignore_index)
    if labels.device.type != "cpu":
        torch._assert_async(in_range.all(), "orpo_kernels: a label is outside [0, V)")
    elif not bool(in_range.all()):
        worst = int(labels[~in_range][0])
        raise ValueError(
            f"labels must be in [0, V) = [0, {vocabulary}) or ignore_index = {ignore_index}, "
            f"got {worst}; is the tokenizer larger than the head?"
        )


def refuse_other_groups(groups: Tensor) -> None:
    """Refuse tail groups but 0 and 1; an error or an assertion, as for ids out of range."""
    known = ((groups == 0) | (groups == 1)).all()
    if groups.device.type != "cpu":
        torch._assert_async(known, "orpo_kernels: a tail group is neither 0 nor 1")
    elif not bool(known):
        raise ValueError("tail_groups must be 0 or 1 everywhere")


def score(labels: Tensor, ignore_index: int) -> Scored:
    """Labels (K, ...) to one or two distinct labels per position."""
    flat = labels.reshape(labels.shape[0], -1)
    masks = flat != ignore_index
    if flat.shape[0] == 1:
        return Scored(Labels(torch.where(masks[0], flat[0], -1), None), masks)
    either = torch.where(masks[0], flat[0], torch.where(masks[1], flat[1], -1))
    second = torch.where(masks[0] & masks[1] & (flat[0] != flat[1]), flat[1], -1)
    return Scored(Labels(either, second), masks)


class Selection(NamedTuple):
    """The scored rows: their hidden parts, head, labels, and where they stand among all N."""

    rows: Rows
    head: Head
    labels: Labels
    sizes: Sizes
    scored: Tensor | None  # (M,) or None: every row is scored


def select(
    hidden: tuple[Tensor, Tensor | None],
    weight: tuple[Tensor, Tensor | None],
    bias: Tensor | None,
    scored: Scored,
    options: tuple[float, float | None, torch.dtype],
) -> Selection:
    """The scored rows of hidden and its low-rank part; syncs a GPU once, to count them.

    While a CUDA graph is captured nothing may sync: every row is processed, those that are not
    scored as rows of 0 with coefficient 0.
    """
    logit_scale, softcap, dtype = options
    flat = [flat_rows(each) for each in hidden if each is not None]
    is_scored = scored.labels.first >= 0
    index: Tensor | None = None
    labels, count = scored.labels, is_scored.shape[0]
    capturing = is_capturing(is_scored.device)
    if not capturing:
        index = is_scored.nonzero()[:, 0]
    if index is not None and index.shape[0] < count:
        labels = labels.take(index)
    elif all(part.ndim == 2 for part in flat):
        index = None
    elif capturing:
        index = torch.arange(count, device=is_scored.device)
    parts = tuple(each for each in weight if each is not None)
    head = Head(Columns(parts, dtype), bias, logit_scale, softcap)
    sizes = problem_sizes(labels.first.shape[0], hidden, weight, scored.masks.shape[0], dtype)
    rows = Rows(tuple(flat), index, dtype, is_scored if capturing else None)
    return Selection(rows, head, labels, sizes, index)


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


def problem_sizes(
    rows: int,
    hidden: tuple[Tensor, Tensor | None],
    weight: tuple[Tensor, Tensor | None],
    label_sets: int,
    dtype: torch.dtype,
) -> Sizes:
    """Sizes of `rows` rows of this hidden on this head."""
    columns = hidden[0].shape[-1] + (0 if hidden[1] is None else hidden[1].shape[-1])
    copied = weight[1] is not None or weight[0].dtype != dtype
    return Sizes(rows, weight[0].shape[0], columns, label_sets, dtype, copied, weight[0].device)
