"""Which slots and which labels a column of the vocabulary has: lists, made once a backward.

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


def order_entries(columns: Tensor, labels: Tensor, vocabulary: int) -> Order:
    """The lists of slots of `columns` (S,) int32, and of `labels` (K, M) int64, -1 for none."""
    edges = torch.arange(vocabulary + 1, dtype=torch.int32, device=columns.device)

    def listed(keys: Tensor) -> tuple[Tensor, Tensor]:
        ordered, entries = torch.sort(keys, stable=True)
        return entries, torch.searchsorted(ordered, edges, out_int32=True)

    entries, ends = listed(columns)
    targets, label_ends = listed(labels.reshape(-1).to(torch.int32))
    work = ends.diff() + label_ends.diff()
    return Order(
        entries, ends, targets, label_ends, torch.argsort(work, descending=True, stable=True)
    )
