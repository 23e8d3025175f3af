"""The weight gradient of the sparse strategy; the formulae are those of `sparse`.

One vocabulary block at a time, summed in float32: the tail's rank-1 term first, then the kept
entries of every row chunk, or where these are not in the store the recomputed tile, whose rows have
no tail in this block; the labels' entries last. On a CPU, where one chunk has all rows, a row of
the gradient is summed in cache and written once.
"""

import torch
from torch import Tensor

from orpo_kernels.engine.chunks import plan_backward, shaped, spans
from orpo_kernels.engine.selection import is_capturing
from orpo_kernels.engine.sparse import Packed, Sizing, Tail, even_plan
from orpo_kernels.engine.tiles import column_sums, compact_weight_gradient
from orpo_kernels.engine.weight_gradient import WeightGradient, present

_BLOCK_BYTES_CPU = 2**23  # a float32 block of dW that stays in cache from its first to last term


class SparseWeightGradient(WeightGradient):
    """dW and db from the kept entries, one vocabulary block at a time, rounded once."""

    _taken: tuple[tuple[int, int], Tensor] | None = None

    def sparse_run(
        self,
        dweights: list[Tensor | None],
        dbias: Tensor | None,
        packed: Packed,
        tail: Tail,
        sized: Sizing,
        budget: int,
    ) -> None:
        """Fills the gradients that are not None.

        Args:
            dweights: per weight part (V, H_i), any floating dtype, or None.
            dbias: (V,) or None.
            packed: from the forward; `blocks` of the scored rows only, (blocks, 2, M).
            tail: from the forward.
            sized: as the forward's.
            budget: bytes the workspace may take.
        """
        self.parts = tuple(i for i, dweight in enumerate(dweights) if dweight is not None)
        widths = [self.head.columns.parts[i].shape[1] for i in self.parts]
        plan = plan_backward(
            self.sizes, budget, sum(widths), recompute=True, reserved=sized.reserved_bytes
        )
        buffers = self._buffers(plan, sum(widths), None)
        chunks = list(spans(self.sizes.rows, even_plan(sized.plan, self.sizes.rows).rows))
        stored = stored_tiles(packed, len(chunks), sized.blocks)
        factors = self.softmax * torch.exp(packed.blocks[:, 0] - self.statistics[0])
        q, u = tail.mean(), self._tail_rows(packed, stored, tail, factors, chunks)
        results = present(dweights)
        once = self.sizes.on_cpu and len(chunks) == len(results) == 1
        for b, (b0, b1) in enumerate(spans(self.sizes.vocabulary, sized.plan.columns)):
            self.direct = results[0] if once and stored[0][b] else None
            if self.direct is not None:
                bias_block = self._write_kept(
                    self.direct[b0:b1], packed, b, factors[b], (q[:, b0:b1], u)
                )
                self._write(self.direct[b0:b1], bias_block, (b0, b1), dweights, dbias, plan.rows)
                continue
            step = plan.columns
            if all(each[b] for each in stored) and self.sizes.device.type == "cpu":
                step = max(64, min(step, _BLOCK_BYTES_CPU // (4 * max(1, sum(widths)))))
            for v0, v1 in ((b0 + i, b0 + j) for i, j in spans(b1 - b0, step)):
                block = shaped(buffers["block"], v1 - v0, sum(widths))
                bias_block = buffers["bias"][: v1 - v0]
                torch.mm(q[:, v0:v1].t(), u[:, 1:], out=block)
                torch.mv(q[:, v0:v1].t(), u[:, 0], out=bias_block)
                for i, rows in enumerate(chunks):
                    if stored[i][b]:
                        item, columns = i * sized.blocks + b, (v0 - b0, v1 - b0)
                        self._add_kept(block, bias_block, packed, item, columns, factors[b], rows)
                    else:
                        self._add_dense(block, bias_block, buffers, (v0, v1), rows, plan.rows)
                self._write(block, bias_block, (v0, v1), dweights, dbias, plan.rows)

    def _tail_rows(
        self,
        packed: Packed,
        stored: list[list[bool]],
        tail: Tail,
        factors: Tensor,
        chunks: list[tuple[int, int]],
    ) -> Tensor:
        """Minus the sum over the rows of each group of `a m`, and of `a m h`: (G, 1 + H)."""
        width = sum(self.rows.parts[i].shape[-1] for i in self.parts)
        sums = tail.sums.new_zeros((tail.sums.shape[0], 1 + width))
        for i, (start, stop) in enumerate(chunks if packed.store.shape[0] > 0 else []):
            dropped = packed.blocks[:, 1, start:stop] * factors[:, start:stop]
            mass = torch.zeros_like(factors[0, start:stop])
            for there, each in zip(stored[i], dropped, strict=True):
                if there:  # a mask would have to be copied to the device, which waits for it
                    mass += each
            hidden = self.rows.take(start, stop, self.parts) if self.parts else None
            for group, row in enumerate(sums):
                of_group = torch.where(tail.groups[start:stop] == group, mass, 0.0)
                row[0] -= of_group.sum()
                if hidden is not None:
                    row[1:] -= column_sums(hidden, of_group)
        return sums

    def _write_kept(
        self,
        out: Tensor,
        packed: Packed,
        item: int,
        factors: Tensor,
        tail: tuple[Tensor, Tensor],
    ) -> Tensor:
        """The entries of the only chunk, all in the store, and the tail; the block of the bias."""
        q, u = tail
        entries = (packed.store, packed.table, item, 0)
        compact_weight_gradient(
            out, *entries, factors * self.unit, self._rows_of(0, self.sizes.rows), q,
            u[:, 1:] * self.unit,
        )  # fmt: skip
        bias_block = torch.mv(q.t(), u[:, 0])
        if self.head.bias is not None:
            ones = torch.ones_like(factors)[:, None]
            compact_weight_gradient(bias_block[:, None], *entries, factors, ones)
        return bias_block

    def _add_kept(
        self,
        block: Tensor,
        bias_block: Tensor,
        packed: Packed,
        item: int,
        columns: tuple[int, int],
        factors: Tensor,
        rows: tuple[int, int],
    ) -> None:
        coefficients = factors[slice(*rows)]
        entries = (packed.store, packed.table, item, columns[0], coefficients)
        if self.head.bias is not None:
            compact_weight_gradient(
                bias_block[:, None], *entries, torch.ones_like(coefficients)[:, None]
            )
        if self.parts:
            compact_weight_gradient(block, *entries, self._rows_of(*rows))

    def _rows_of(self, start: int, stop: int) -> Tensor:
        """Hidden states of a chunk; the last chunk's are kept for the next vocabulary block."""
        if self._taken is None or self._taken[0] != (start, stop):
            self._taken = ((start, stop), self.rows.take(start, stop, self.parts))
        return self._taken[1]

    def _add_dense(
        self,
        block: Tensor,
        bias_block: Tensor,
        buffers: dict[str, Tensor],
        columns: tuple[int, int],
        rows: tuple[int, int],
        step: int,
    ) -> None:
        for i, j in spans(rows[1] - rows[0], step):
            start, stop = rows[0] + i, rows[0] + j
            probs = self._probs((start, stop), columns, None, buffers)
            if self.head.bias is not None:
                bias_block -= column_sums(probs, self.softmax[start:stop])
            self._add(block, probs, buffers["partial"], (start, stop))


def stored_tiles(packed: Packed, chunks: int, blocks: int) -> list[list[bool]]:
    """By chunk and block, whether its kept entries are in the store; waits for the device."""
    if packed.store.shape[0] == 0 or is_capturing(packed.store.device):
        return [[False] * blocks] * chunks
    fits: list[bool] = (packed.table[: chunks * blocks, 1] >= 0).tolist()
    return [fits[i * blocks : (i + 1) * blocks] for i in range(chunks)]
