"""Which label sets score a position, by which labels, and what there is of each: one launch.

    masks_k = l_k != ignored;   y = l_0 if masks_0 else l_1;   y2 = l_1 where both score and differ

N positions, K label sets. -1 stands for no label. Counted by block: positions that are scored,
scored ids outside [0, V), tail groups but 0 and 1. Bytes: 8 K read, 9 K written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels import tuning
from orpo_kernels.kernels.start import Start
from orpo_kernels.kernels.tuning import cdiv, row_of


@triton.jit(
    do_not_specialize=["N", "V", "ignore_index"],
    do_not_specialize_on_alignment=[
        "labels_ptr", "masks_ptr", "counts_ptr", "of_sets_ptr", "groups_ptr",
    ],
)  # fmt: skip
def _score_rows_kernel(
    labels_ptr, masks_ptr,  # (K, N) int64, (K, N) bool
    counts_ptr,  # (3, blocks) int32
    of_sets_ptr, groups_ptr,  # (K, N) int64, (N,) int64
    N, V, ignore_index,
    HAS_SECOND: tl.constexpr, HAS_GROUPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    position = pid * BLOCK + tl.arange(0, BLOCK)
    exists = position < N
    label = tl.load(of_sets_ptr + position, mask=exists, other=0)
    scored = exists & (label != ignore_index)
    bad = scored & ((label < 0) | (label >= V))
    first = tl.where(scored, label, -1)
    tl.store(masks_ptr + position, scored, mask=exists)
    if HAS_SECOND:
        other = tl.load(of_sets_ptr + N + position, mask=exists, other=0)
        also = exists & (other != ignore_index)
        bad = bad | (also & ((other < 0) | (other >= V)))
        differs = scored & also & (label != other)
        first = tl.where(scored, label, tl.where(also, other, -1))
        tl.store(masks_ptr + N + position, also, mask=exists)
        tl.store(labels_ptr + N + position, tl.where(differs, other, -1), mask=exists)
    tl.store(labels_ptr + position, first, mask=exists)
    strange = tl.zeros((BLOCK,), tl.int32)
    if HAS_GROUPS:
        group = tl.load(groups_ptr + position, mask=exists, other=0)
        strange = ((group != 0) & (group != 1)).to(tl.int32)
    blocks = tl.num_programs(0)
    tl.store(counts_ptr + pid, tl.sum((first >= 0).to(tl.int32), 0))
    tl.store(counts_ptr + blocks + pid, tl.sum(bad.to(tl.int32), 0))
    tl.store(counts_ptr + 2 * blocks + pid, tl.sum(strange, 0))


def score_rows(
    labels: Tensor,  # (K, N) int64
    ignore_index: int,
    vocabulary: int,
    groups: Tensor | None = None,  # (N,) int64
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the labels (K, N): the first, a differing second; masks (K, N); counts (3, blocks)."""
    labels = labels.contiguous()
    (K, N), new = labels.shape, labels.new_empty
    row = row_of("score_rows", torch.int64, labels.device)
    found, masks = new((K, N)), new((K, N), dtype=torch.bool)
    counts = new((3, cdiv(N, row.block)), dtype=torch.int32)
    with tuning.guard(labels.device):
        start = Start(
            _score_rows_kernel, (found, masks, counts, labels, groups), row,
            {"HAS_SECOND": K == 2, "HAS_GROUPS": groups is not None, "BLOCK": row.block},
        )  # fmt: skip
        start(counts.shape[1], N, vocabulary, ignore_index)
    return found, masks, counts
