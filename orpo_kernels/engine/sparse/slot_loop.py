"""The sparse forward of a GPU: kept entries are slots, in the memory of their own tile's logits.

As `engine/triton_loop.py`, but that in place of E the kept columns of every 64 rows go over the
logits, and meet only their own rows of the head. Whatever the density, no tile goes another way.

A trainable head packs segments of the slots into a store. Of a chunk all of them fit or none do,
which the device decides and the host learns in the backward, without a wait of its own.
"""

import torch
from torch import Tensor

from orpo_kernels.constants import COMPACT_ROWS
from orpo_kernels.engine.budget import Sizes, spans
from orpo_kernels.engine.gemm import matmul_into, tile_of
from orpo_kernels.engine.operands import Operands
from orpo_kernels.engine.sparse.plan import SparsePlan, slot_pitch
from orpo_kernels.engine.sparse.tail import Packed, Tail
from orpo_kernels.engine.tile_loop import Results, empty_sums, finish
from orpo_kernels.engine.tiles.plain import merge
from orpo_kernels.kernels import launcher
from orpo_kernels.kernels.segment_store import SegmentStore, segment_store

KEPT_ROUNDING = 2.0**-8
"""Of a slot's entry, relative: bfloat16, to nearest."""

_MAX_EXPONENT = 80.0  # exp of it is finite in float32


def forward(
    operands: Operands, plan: SparsePlan, tail: Tail, packed: Packed | None, out: Results
) -> Tensor:
    """Fills the results, and adds what is dropped to `tail.sums`, as `tile_loop.forward`."""
    softmax_stats = launcher("softmax_stats", "softmax_stats")
    softmax_compact = launcher("softmax_compact", "softmax_compact")
    slot_matmul = launcher("gather_matmul", "slot_matmul")
    rows, head, labels, sizes, _ = operands
    shape = plan.tile.even(sizes.rows)
    buffer = labels.first.new_empty(
        shape.rows * slot_pitch(shape.columns), dtype=sizes.product_dtype
    )
    store = None if packed is None else opened_store(packed, sizes, shape.rows)
    kept_count = labels.first.new_zeros(1)
    for start, stop in spans(sizes.rows, shape.rows):
        hidden, row_labels = rows.take(start, stop), labels.stacked(start, stop)
        label = head.label_terms(hidden, row_labels)
        label_lse, (row_max, sum_exp) = label.lse(row_labels), empty_sums(hidden)
        all_dropped = torch.zeros_like(row_max)
        per_block: list[Tensor] = []
        accumulator = torch.zeros_like(hidden, dtype=row_max.dtype) if out.wants_g else None
        for v0, v1 in spans(sizes.vocabulary, shape.columns):
            weight = head.block(v0, v1)
            tile = tile_of(buffer, stop - start, v1 - v0, slot_pitch(v1 - v0))
            matmul_into(tile, hidden, weight.t())
            arguments = (tile, head.block_bias(v0, v1), row_labels, v0)
            block_max, block_sum, _ = softmax_stats(*arguments, *head.transform)
            row_max, sum_exp, rescale, block_sum = merge(row_max, sum_exp, block_max, block_sum)
            beside = torch.exp((label_lse - row_max).clamp(max=_MAX_EXPONENT))
            slots = softmax_compact(
                *arguments, row_max, sum_exp + beside, tail.eps, *head.transform,
                tail.groups[start:stop], tail.sums[:, v0:v1],
            )  # fmt: skip
            if accumulator is not None:
                accumulator.mul_(rescale[:, None])
                slot_matmul(accumulator, slots, weight)
            kept_count += slots.entries
            scale, softcap = head.transform
            dropped = (block_sum * scale if softcap is None else slots.row_sum) - slots.mass
            all_dropped.mul_(rescale).add_(dropped)
            if store is not None:
                # m_t of dW is what the segments leave out, a little more than the slots do.
                chunk = start // shape.rows
                mass = launcher("row_segments", "pack_segments")(
                    store, slots, chunk, start // COMPACT_ROWS, start
                )
                per_block.append(torch.stack((row_max, dropped + (slots.mass - mass))))
        statistics, g = finish(label, row_max, sum_exp, accumulator)
        share = torch.where(sum_exp > 0, all_dropped / sum_exp, 0.0)
        where = operands.placed(start, stop)
        out.write(where, torch.cat((statistics, share[None])), g)
        if packed is not None:
            packed.per_block[:, :, where] = torch.stack(per_block)
    if packed is not None and store is not None:
        _close_store(store, packed)
    return kept_count


def store_of(packed: Packed, sizes: Sizes, chunk_rows: int) -> SegmentStore:
    """The store of a call, whose chunks have `chunk_rows` rows."""
    chunks = -(-sizes.rows // chunk_rows)
    return segment_store(packed.store, sizes.rows, sizes.vocabulary, chunks)


def opened_store(packed: Packed, sizes: Sizes, chunk_rows: int) -> SegmentStore:
    """The same, with nothing in it."""
    store = store_of(packed, sizes, chunk_rows)
    store.used[:1].zero_()
    return store


def _close_store(store: SegmentStore, packed: Packed) -> None:
    """Says in the table which chunks are in the store."""
    starts, sizes = store.used[:-1], store.used.diff()
    here = packed.table[: sizes.shape[0]]
    here[:, 0] = starts
    here[:, 1] = torch.where(store.overflow > 0, -1, sizes)
