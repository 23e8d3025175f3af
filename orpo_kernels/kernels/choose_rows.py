"""The scored rows in their order: where they stand, their labels and tail groups, in one launch.

    places[k] = position of the k-th row with a label;   y, y2 and the group of it likewise
    places[N - 1 - k] = position of the k-th row with none
    totals = scored rows, ids outside [0, V), groups but 0 and 1

N positions in blocks, of which `score_rows.py` has counted these three. Every program adds up the
blocks before its own; nothing is atomic. Bytes: 8 (K + 1) read, 8 (K + 2) written, and the counts
once per program.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels import tuning
from orpo_kernels.kernels.start import Start
from orpo_kernels.kernels.tuning import row_of


class Chosen(NamedTuple):
    """Of the scored rows, which come first in tensors of N; `totals` says how many they are."""

    places: Tensor  # (N,) int64, those of all positions
    labels: Tensor  # (K, N) int64
    groups: Tensor | None  # (N,) int64
    totals: Tensor  # (3,) int32


@triton.jit
def _sum(counts_ptr, stop, BLOCK: tl.constexpr):
    """Of the first `stop` counts."""
    sums = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, stop, BLOCK):
        block = start + tl.arange(0, BLOCK)
        sums += tl.load(counts_ptr + block, mask=block < stop, other=0)
    return tl.sum(sums, 0)


@triton.jit(
    do_not_specialize=["N", "blocks"],
    do_not_specialize_on_alignment=[
        "places_ptr", "chosen_ptr", "chosen_groups_ptr", "totals_ptr", "first_ptr", "second_ptr",
        "groups_ptr", "counts_ptr",
    ],
)  # fmt: skip
def _choose_rows_kernel(
    places_ptr, chosen_ptr,  # (N,) int64, (K, N) int64
    chosen_groups_ptr,  # (N,) int64
    totals_ptr,  # (3,) int32
    first_ptr, second_ptr, groups_ptr,  # (N,) int64 each
    counts_ptr,  # (3, blocks) int32
    N, blocks,
    HAS_SECOND: tl.constexpr, HAS_GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    position = pid * BLOCK + tl.arange(0, BLOCK)
    exists = position < N

    label = tl.load(first_ptr + position, mask=exists, other=-1)
    scored = label >= 0
    before = _sum(counts_ptr, pid, BLOCK)
    place = before + tl.cumsum(scored.to(tl.int32), 0) - 1

    at = tl.where(scored, place, N - position + place)
    tl.store(places_ptr + at, position.to(tl.int64), mask=exists)
    tl.store(chosen_ptr + place, label, mask=scored)
    if HAS_SECOND:
        second = tl.load(second_ptr + position, mask=exists, other=-1)
        tl.store(chosen_ptr + N + place, second, mask=scored)
    if HAS_GROUPS:
        group = tl.load(groups_ptr + position, mask=exists, other=0)
        tl.store(chosen_groups_ptr + place, group, mask=scored)
    if pid == blocks - 1:
        tl.store(totals_ptr, before + tl.sum(scored.to(tl.int32), 0))
        tl.store(totals_ptr + 1, _sum(counts_ptr + blocks, blocks, BLOCK))
        tl.store(totals_ptr + 2, _sum(counts_ptr + 2 * blocks, blocks, BLOCK))


def choose_rows(
    first: Tensor,  # (N,) int64, -1 for none
    second: Tensor | None,  # (N,) int64, -1 for none
    groups: Tensor | None,  # (N,) int64
    counts: Tensor,  # (3, blocks) int32, of `score_rows`
) -> Chosen:
    """Launches the choice."""
    N, new = first.shape[0], first.new_empty
    row = row_of("score_rows", torch.int64, first.device)
    labels = new((1 if second is None else 2, N))
    chosen = Chosen(new(N), labels, None if groups is None else new(N), new(3, dtype=torch.int32))
    with tuning.guard(first.device):
        start = Start(
            _choose_rows_kernel,
            (*chosen, first, second, groups, counts),
            row,
            {
                "HAS_SECOND": second is not None, "HAS_GROUPS": groups is not None,
                "BLOCK": row.block,
            },
        )  # fmt: skip
        start(counts.shape[1], N, counts.shape[1])
    return chosen
