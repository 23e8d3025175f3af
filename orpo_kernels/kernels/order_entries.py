"""Which slots and which labels a column of the vocabulary has: lists, made once a backward.

The labels' may be listed before it is known how many slots there are.

Sorted by column, stable: the order of every sum is that of the rows. torch's sort is radix on a GPU
and takes a fraction of a launch of the products. S slots, M rows, K label sets.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Order(NamedTuple):
    """Lists by column: those of column v are entries `ends[v]` to `ends[v + 1]`."""

    entries: Tensor  # (S,) int64: slots
    ends: Tensor  # (V + 1,) int32
    targets: Tensor  # (K M,) int64: row + M label set
    label_ends: Tensor  # (V + 1,) int32
    columns: Tensor  # (V,) int64: of most work first


class Listed(NamedTuple):
    """The lists of one kind."""

    entries: Tensor  # (S,) int64
    ends: Tensor  # (V + 1,) int32
    edges: Tensor  # (V + 1,) int32: 0, 1, ... V

    @classmethod
    def of(cls, keys: Tensor, edges: Tensor) -> "Listed":
        """By `keys` (S,) int32, in the order of the entries; -1 for those in no list."""
        ordered, entries = torch.sort(keys, stable=True)
        return cls(entries, torch.searchsorted(ordered, edges, out_int32=True), edges)


def label_lists(labels: Tensor, vocabulary: int) -> Listed:
    """The lists of `labels` (K, M) int64, -1 for none: no slot is needed for them."""
    edges = torch.arange(vocabulary + 1, dtype=torch.int32, device=labels.device)
    return Listed.of(labels.reshape(-1).to(torch.int32), edges)


def order_entries(columns: Tensor, labels: Listed) -> Order:
    """With the lists of slots of `columns` (S,) int32."""
    slots = Listed.of(columns, labels.edges)
    work = (slots.ends + labels.ends).diff()
    return Order(
        slots.entries, slots.ends, labels.entries, labels.ends,
        torch.argsort(work, descending=True, stable=True),
    )  # fmt: skip
