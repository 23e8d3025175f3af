"""Which sequence a token is of, which sequences are pairs, and how the pairs are weighed.

Stacked sequences, chosen first: sequence i is paired with sequence P + i. Padded, a sequence is a
row of (2P, T). Packed, a token (N,) has the id of its sequence; how many there are is told apart
from the ids, as a sequence without a token has none.
"""

from dataclasses import dataclass
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

from orpo_kernels.options import (
    check_beta,
    check_choice,
    check_flag,
    check_integer,
    validate_labels,
)
from orpo_kernels.presets import NLL_REDUCTIONS


class BatchKeywords(TypedDict, total=False):
    """What `ORPOLoss.from_logps` takes by name, call by call; see `orpo_loss`."""

    sequence_ids: Tensor | None
    num_sequences: int | None
    num_nll_tokens: Tensor | int | None
    num_pairs: Tensor | int | None


class CallKeywords(BatchKeywords, total=False):
    """What a call of `ORPOLoss` takes by name: the same, and what of `linear_logps` is tensors."""

    tail_groups: Tensor | None
    low_rank: tuple[Tensor, Tensor] | None


class Pairing(NamedTuple):
    """The sequences of a batch: `sequence_ids` (N,) int64 when packed, and 2P, how many."""

    sequence_ids: Tensor | None
    num_sequences: int

    @property
    def pairs(self) -> int:
        """P."""
        return self.num_sequences // 2


def as_int64(name: str, labels: Tensor) -> Tensor:
    """Labels or ids as int64, which can hold the ignore index; a mask or floats are refused."""
    validate_labels(name, labels)
    return labels.to(torch.int64)


def pairing_of(labels: Tensor, sequence_ids: Tensor | None, num_sequences: int | None) -> Pairing:
    """The sequences of `labels`, (2P, T) or packed (N,).

    Raises:
        TypeError: ids or a count that are not integer.
        ValueError: shapes that do not match, packed ones without a count, an odd count, ids outside
            [0, 2P) (CPU tensors; on other devices a device-side assertion).
    """
    if sequence_ids is None:
        count = _rows(labels, num_sequences)
    else:
        sequence_ids = as_int64("sequence_ids", sequence_ids)
        count = _packed_count(labels, sequence_ids, num_sequences)
    if count % 2:
        raise ValueError(
            f"sequences must come in pairs, P chosen then P rejected, got {count} sequences; "
            "stack both halves"
        )
    return Pairing(sequence_ids, count)


def _rows(labels: Tensor, num_sequences: int | None) -> int:
    if labels.ndim != 2:
        raise ValueError(
            f"labels must be (2P, T), got {tuple(labels.shape)}; packed (N,) needs sequence_ids "
            "and num_sequences"
        )
    rows: int = labels.shape[0]
    if num_sequences not in (None, rows):
        raise ValueError(
            f"num_sequences is for packed labels with sequence_ids; labels (2P, T) have {rows} "
            f"rows, got num_sequences={num_sequences}"
        )
    return rows


def _packed_count(labels: Tensor, sequence_ids: Tensor, num_sequences: int | None) -> int:
    if labels.ndim != 1 or sequence_ids.shape != labels.shape:
        raise ValueError(
            "packed labels and sequence_ids must both be (N,), got "
            f"{tuple(labels.shape)} and {tuple(sequence_ids.shape)}"
        )
    if num_sequences is None:
        raise ValueError(
            "packed sequences need num_sequences: sequence_ids do not tell how many there are when "
            "the last are empty; pass num_sequences=2P"
        )
    check_integer("num_sequences", num_sequences, least=0)
    if sequence_ids.device.type != "cpu":
        within = ((sequence_ids >= 0) & (sequence_ids < num_sequences)).all()
        torch._assert_async(within, "orpo_kernels: a sequence id is outside [0, num_sequences)")
    elif sequence_ids.numel():
        low, high = (int(bound) for bound in sequence_ids.aminmax())
        if low < 0 or high >= num_sequences:
            raise ValueError(
                f"sequence_ids must be in [0, num_sequences) = [0, {num_sequences}), "
                f"got ids from {low} to {high}"
            )
    return num_sequences


@dataclass(frozen=True)
class Weighting:
    """How the terms of the loss are weighed, checked; see `orpo_loss`.

    Raises:
        TypeError: a value of another type.
        ValueError: a value out of range.
    """

    beta: float
    nll_reduction: str
    num_nll_tokens: Tensor | int | None = None
    num_pairs: Tensor | int | None = None
    nll: bool = True

    def __post_init__(self) -> None:
        check_beta(self.beta)
        check_choice("nll_reduction", self.nll_reduction, NLL_REDUCTIONS)
        check_flag("nll", self.nll)
        _check_count("num_nll_tokens", self.num_nll_tokens)
        _check_count("num_pairs", self.num_pairs)


def _check_count(name: str, count: Tensor | int | None) -> None:
    if isinstance(count, Tensor):
        if count.ndim != 0:
            raise ValueError(f"{name} must be 0-dim, got {tuple(count.shape)}; sum it")
    elif count is not None:
        check_integer(name, count, least=0)


def count_on(device: torch.device, count: Tensor | int | None) -> Tensor | None:
    """A checked count as a 0-dim tensor; a number goes there by a launch, where a copy waits."""
    if count is None or isinstance(count, Tensor):
        return None if count is None else count.to(device)
    return torch.full((), count, dtype=torch.int64, device=device)


def check_log_probs(name: str, logps: Tensor, labels: Tensor) -> None:
    """Refuse log-probs that are not those of `labels`.

    Raises:
        TypeError: not floating point.
        ValueError: of another shape.
    """
    if not logps.is_floating_point():
        raise TypeError(f"{name} must be floating point, got {logps.dtype}")
    if logps.shape != labels.shape:
        raise ValueError(
            f"{name} must have the shape of labels, {tuple(labels.shape)}, got {tuple(logps.shape)}"
        )


def check_nll_labels(nll_labels: Tensor, labels: Tensor, pairing: Pairing) -> Tensor:
    """NLL labels as int64: (2P, T) like `labels`, or the chosen half (P, T); packed (N,).

    Raises:
        TypeError: not integer.
        ValueError: of another shape.
    """
    nll_labels, half = as_int64("nll_labels", nll_labels), (pairing.pairs, *labels.shape[1:])
    if pairing.sequence_ids is not None and nll_labels.shape != labels.shape:
        raise ValueError(
            f"nll_labels must be (N,) = {tuple(labels.shape)}, got {tuple(nll_labels.shape)}"
        )
    if nll_labels.shape not in (labels.shape, half):
        raise ValueError(
            f"nll_labels must be (2P, T) = {tuple(labels.shape)} or its chosen half (P, T), "
            f"got {tuple(nll_labels.shape)}"
        )
    return nll_labels.to(labels.device)


def chosen_only(nll_labels: Tensor, labels: Tensor, pairing: Pairing, ignore_index: int) -> Tensor:
    """Checked NLL labels in the shape of `labels`, with the rejected half ignored."""
    if pairing.sequence_ids is not None:
        return torch.where(pairing.sequence_ids < pairing.pairs, nll_labels, ignore_index)
    ignored = torch.full_like(labels[pairing.pairs :], ignore_index)
    return torch.cat((nll_labels[: pairing.pairs], ignored))


def tail_groups(labels: Tensor, pairing: Pairing) -> Tensor:
    """0 for the tokens of chosen sequences, 1 for those of rejected ones, in the shape of `labels`.

    The loss raises the log-probs of the first and lowers those of the second: see `linear_logps`.
    """
    if pairing.sequence_ids is not None:
        return (pairing.sequence_ids >= pairing.pairs).to(torch.int64)
    groups = torch.zeros_like(labels, memory_format=torch.contiguous_format)
    groups[pairing.pairs :] = 1
    return groups
