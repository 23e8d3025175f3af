"""Which slots and which labels a column of the vocabulary has: lists, made once a backward.

All of it is made before the host knows how many slots there are: of a store with room for more, what
is not there comes last.

Sorted by column, stable: the order of every sum is that of the rows. torch's sort is radix on a GPU
and takes a fraction of a launch of the products. S slots, M rows, K label sets, R ranges of the
vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MOST_ALONE = 16
"""Entries of a column that one lane of a program sums, at most; those of others are split."""

_APART = 2**24  # from the work of one range to that of the next


class Order(NamedTuple):
    """Lists by column: of column v the products `ends[v]` to `ends[v + 1]`, and targets likewise."""

    places: Tensor  # (S,) int32: of a slot, where its product is among those of all columns
    ends: Tensor  # (V + 1,) int32
    targets: Tensor  # (K M,) int64: row + M label set
    label_ends: Tensor  # (V + 1,) int32
    columns: Tensor  # (V,) int64: range by range, of most work first
    figures: Tensor  # (2 R,) int32: products before each range's end, split columns likewise


class Listed(NamedTuple):
    """The lists of one kind."""

    entries: Tensor  # (S,) int64
    ends: Tensor  # (V + 1,) int32
    edges: Tensor  # (V + 1,) int32: 0, 1, ... V

    @classmethod
    def of(cls, keys: Tensor, edges: Tensor) -> "Listed":
        """By `keys` (S,) int32, in the order of the entries; -1 and V for those in no list."""
        ordered, entries = torch.sort(keys, stable=True)
        return cls(entries, torch.searchsorted(ordered, edges, out_int32=True), edges)


def label_lists(labels: Tensor, vocabulary: int) -> Listed:
    """The lists of `labels` (K, M) int64, -1 for none: no slot is needed for them."""
    edges = torch.arange(vocabulary + 1, dtype=torch.int32, device=labels.device)
    return Listed.of(labels.reshape(-1).to(torch.int32), edges)


def order_entries(columns: Tensor, count: Tensor, labels: Listed, edges: Sequence[int]) -> Order:
    """With the lists of slots.

    Args:
        columns: (S,) int32, of the slots of a store.
        count: () int64, how many of these there are.
        labels: of `label_lists`.
        edges: where ranges of the vocabulary begin and end: 0, ... V.

    Returns:
        The lists.
    """
    vocabulary = edges[-1]
    each = torch.arange(columns.shape[0], dtype=torch.int32, device=columns.device)
    slots = Listed.of(columns.masked_fill(each >= count, vocabulary), labels.edges)
    places = torch.empty_like(each).scatter_(0, slots.entries, each)
    # Most work first: by minus what it is, and a range after the other.
    before = slots.ends + labels.ends
    work = (before[:-1] - before[1:]).clamp_(min=1 - _APART)
    for edge in edges[1:-1]:
        work[edge:].add_(_APART)
    ordered, by_work = torch.sort(work, stable=True)
    ranges = len(edges) - 1
    light = torch.arange(
        -MOST_ALONE, ranges * _APART - MOST_ALONE, _APART, dtype=torch.int32, device=columns.device
    )
    split = torch.searchsorted(ordered, light, out_int32=True)
    figures = torch.stack([*(slots.ends[edge] for edge in edges[1:]), *split.unbind(0)])
    return Order(places, slots.ends, labels.entries, labels.ends, by_work, figures)
