"""The sparse forward where one operation finishes a tile: kept entries are lists, row by row.

As the exact loop, `engine/tile_loop.py`, but that of most tiles only the kept entries meet the
head. A tile with more of them than pay off is done the exact way, as is the rest of its chunk; that
too is a superset of what is over eps.
"""

import torch
from torch import Tensor

from orpo_kernels.constants import MOST_LARGE
from orpo_kernels.engine.budget import spans
from orpo_kernels.engine.gemm import accumulate_product_, matmul_into
from orpo_kernels.engine.operands import Operands
from orpo_kernels.engine.sparse import plan as plans
from orpo_kernels.engine.sparse.plan import SparsePlan
from orpo_kernels.engine.sparse.tail import Packed, Tail
from orpo_kernels.engine.tile_loop import Buffers, Redone, Results, empty_sums, finish
from orpo_kernels.engine.tiles import csr_matmul_, softmax_collect_, softmax_compact_online_
from orpo_kernels.engine.tiles.collect import Entries
from orpo_kernels.engine.tiles.compact import pack_entries


def forward(
    operands: Operands, plan: SparsePlan, tail: Tail, packed: Packed | None, out: Results
) -> Tensor:
    """Fills the results, g without its tail, and adds what is dropped to `tail.sums`.

    Args:
        operands: the scored rows.
        plan: shapes.
        tail: of these rows.
        packed: receives the kept entries, for a trainable head.
        out: to be filled; the last row of statistics is `m_t` over the mass beside the labels.

    Returns:
        (1,) int64, how many entries were kept.
    """
    rows, head, labels, sizes, _, _ = operands
    shape = plan.tile.even(sizes.rows)
    buffers, redone = Buffers.of(operands, shape, out, tiles=True), Redone.of(operands)
    kept_count = labels.first.new_zeros(1)
    for start, stop in spans(sizes.rows, shape.rows):
        hidden, row_labels = rows.take(start, stop), labels.stacked(start, stop)
        label = head.label_terms(hidden, row_labels)
        label_lse, sums = label.lse(row_labels), empty_sums(hidden)
        all_dropped = torch.zeros_like(sums[0])
        per_block: list[Tensor] = []
        accumulator = torch.zeros_like(hidden, dtype=sums[0].dtype) if out.wants_g else None
        dense = False
        for v0, v1 in spans(sizes.vocabulary, shape.columns):
            weight = head.block(v0, v1)
            tile, probs = buffers.tiles(stop - start, v1 - v0)
            matmul_into(tile, hidden, weight.t())
            arguments = (tile, head.block_bias(v0, v1), row_labels, v0, *sums)
            inputs = redone.inputs(hidden, weight)
            if not dense:
                capacity = max(1, int((v1 - v0) * plans.live_share(tile.device)))
                rescale, *entries, dropped = softmax_compact_online_(
                    *arguments, label_lse, *inputs, tail.eps, redone.share, MOST_LARGE,
                    *head.transform, tail.groups[start:stop], tail.sums[:, v0:v1], capacity,
                )  # fmt: skip
                dense = dropped.numel() < rescale.numel()
            else:
                rescale, *entries = softmax_collect_(
                    *arguments, label.z, *inputs, redone.share, MOST_LARGE, *head.transform,
                    True, True,
                )  # fmt: skip
            kept_count += tile.numel() if dense else entries[2].numel()
            if dense:
                dropped = torch.zeros_like(rescale)
            if accumulator is not None:
                if dense:
                    probs = tile if probs is tile else probs.copy_(tile)
                    before = rescale if v0 > 0 else None
                    accumulate_product_(accumulator, before, probs, weight, buffers.partial)
                elif v0 > 0:
                    accumulator.mul_(rescale[:, None])
                csr_matmul_(accumulator, *entries, weight)
            all_dropped.mul_(rescale).add_(dropped)
            if packed is not None:
                item = start // shape.rows * packed.per_block.shape[0] + len(per_block)
                kept = None if dense else Entries(*entries)
                pack_entries(kept, packed.store, packed.table, item)
                per_block.append(torch.stack((sums[0], dropped)))
        statistics, g = finish(label, *sums, accumulator)
        share = torch.where(sums[1] > 0, all_dropped / sums[1], 0.0)
        where = operands.placed(start, stop)
        out.write(where, torch.cat((statistics, share[None])), g)
        if packed is not None:
            packed.per_block[:, :, where] = torch.stack(per_block)
    return kept_count
