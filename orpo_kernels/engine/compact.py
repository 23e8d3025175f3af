"""Tile operations of the sparse gradient: one schema each, and their plain-torch form.

    E_rv = exp(z_rv - reference_r) * d_rv, 0 in the label columns; as in `tiles.softmax_grad_`

    softmax_compact          keeps the entries E > eps * total, sums the others by column   1 read
    compact_matmul           accumulator <- accumulator + kept E @ weight
    compact_pack             kept entries -> a byte buffer that lives until the backward
    compact_weight_gradient  block <- block - kept E^T (coefficients * hidden)  (C++ on a CPU)

What `softmax_compact` returns is the backend's own form of the kept entries, but for the first
three tensors: the sum of the kept E of each row, as rounded, (R,); with a softcap the sum of all E
of each row, (R,), else empty; and how many entries are kept, (1,) int64. A backend may keep more
than it has to. At most `capacity` are kept: of a tile with more the empty list is returned, and the
tile and `tail` stay as they were. None: however many there are; on a GPU with tensor cores they
then go over the logits, as slots (`kernels/softmax_compact.py`), and the tile must have the room.

`total` is what is known so far of the sum of exp(z - reference) over the vocabulary, and `tail`
(G, C) receives the dropped E / total of the rows of each group, `groups` (R,) int64 in [0, G).

`compact_pack` fills row `item` of `table` (items, 2) int64: its first byte in `store` and how many
bytes it takes, negative where the rest of the store is too small or `kept` is the empty list. Items
are packed in order, one call each, 0 first. `compact_weight_gradient` reads one that is there, for
the columns `first_column` on of its tile; `coefficients` (R,) and `hidden` (R, H) are of its rows.
With `tail` (G, C) and `tail_rows` (G, H) the block, of any floating dtype, is not added to but
written: `tail^T tail_rows` takes the place of what it held.

The plain form keeps compressed rows: offsets (R + 1) and columns, int32, and values in the dtype
of the arithmetic. It looks at counts on the host, which waits for a device that is not the CPU.
What a CPU keeps of a tile, `softmax_compact_online_` (`engine/collect.py`), is in this form.
"""

import torch
from torch import Tensor

from orpo_kernels.engine.tiles import accumulation_dtype, softmax_grad_, strip_bytes
from orpo_kernels.kernels import register_tile_operation

_ALIGNMENT = 16
_ENTRIES = 2**16  # looked at together where only their columns and rows are

torch.library.define(
    "orpo_kernels::softmax_compact",
    "(Tensor(a!) logits, Tensor? bias, Tensor labels, int first_column, Tensor reference, "
    "Tensor total, float eps, float logit_scale, float? softcap, Tensor groups, Tensor(b!) tail, "
    "int? capacity) -> Tensor[]",
)
torch.library.define(
    "orpo_kernels::compact_matmul", "(Tensor(a!) accumulator, Tensor[] kept, Tensor weight) -> ()"
)
torch.library.define(
    "orpo_kernels::compact_pack",
    "(Tensor[] kept, Tensor(a!) store, Tensor(b!) table, int item) -> ()",
)

OPERATIONS = ("softmax_compact", "compact_matmul")
"""Those of a GPU's kernels, where kept entries are slots."""

softmax_compact = torch.ops.orpo_kernels.softmax_compact
compact_matmul = torch.ops.orpo_kernels.compact_matmul
compact_pack = torch.ops.orpo_kernels.compact_pack


def _softmax_compact(  # noqa: PLR0913 - as its schema
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    first_column: int,
    reference: Tensor,
    total: Tensor,
    eps: float,
    logit_scale: float,
    softcap: float | None,
    groups: Tensor,
    tail: Tensor,
    capacity: int | None,
) -> list[Tensor]:
    dtype, (R, C) = accumulation_dtype(logits.dtype), logits.shape
    capacity = R * C if capacity is None else min(capacity, R * C)
    columns = logits.new_empty(capacity, dtype=torch.int32)
    values = logits.new_empty(capacity, dtype=dtype)
    counts = torch.zeros(R + 1, dtype=torch.int32, device=logits.device)
    kept_sum = logits.new_empty(R, dtype=dtype)
    row_sum = logits.new_empty(0 if softcap is None else R, dtype=dtype)
    dropped = torch.zeros_like(tail)
    one_hot = groups == torch.arange(tail.shape[0], device=groups.device)[:, None]  # (G, R)
    shares = torch.where(one_hot, torch.where(total > 0, 1.0 / total, 0.0), 0.0)
    filled = 0
    # Half a strip of E; the other half of the scratch is for the mask and the indices.
    step = max(1, strip_bytes(logits.device) // (8 * max(1, C * dtype.itemsize)))
    for i in range(0, R, step):
        j = min(i + step, R)
        E = logits.new_empty((j - i, C), dtype=dtype)
        softmax_grad_(
            logits[i:j], bias, labels[:, i:j], first_column, reference[i:j], logit_scale, softcap, E
        )
        if softcap is not None:
            torch.sum(E, 1, out=row_sum[i:j])
        threshold = (eps * total[i:j])[:, None]
        live = torch.gt(E, threshold)
        counts[i + 1 : j + 1] = live.sum(1)
        found = int(counts[i + 1 : j + 1].sum())
        if filled + found > capacity:
            return []
        where = live.view(-1).nonzero()[:, 0]
        torch.take(E, where, out=values[filled : filled + found])
        columns[filled : filled + found] = where.remainder_(C)
        dropped.addmm_(shares[:, i:j], E.masked_fill(live, 0.0))
        torch.sum(E.masked_fill_(live.logical_not_(), 0.0), 1, out=kept_sum[i:j])
        filled += found
    tail += dropped
    count = torch.full((1,), filled, dtype=torch.int64, device=logits.device)
    offsets = counts.cumsum(0, dtype=torch.int32)
    return [kept_sum, row_sum, count, offsets, columns[:filled], values[:filled]]


def _compact_matmul(accumulator: Tensor, kept: list[Tensor], weight: Tensor) -> None:
    offsets, columns, values = kept[3:]
    step = _gathered_entries(weight)
    for i in range(0, columns.shape[0], step):
        entries = slice(i, min(i + step, columns.shape[0]))
        products = weight.index_select(0, columns[entries]).to(accumulator.dtype)
        products *= values[entries, None]
        _add_rows(accumulator, _rows_of(offsets, entries), products)


@torch.library.impl("orpo_kernels::compact_pack", "CompositeExplicitAutograd")
def _compact_pack(kept: list[Tensor], store: Tensor, table: Tensor, item: int) -> None:
    end = 0
    if item > 0:
        start, size = (int(each) for each in table[item - 1])
        end = start + max(0, size)
    pieces = kept[3:]
    sizes = [_aligned(piece.numel() * piece.element_size()) for piece in pieces]
    fits = bool(kept) and end + sum(sizes) <= store.shape[0]
    table[item, 0], table[item, 1] = end, sum(sizes) if fits else -1
    if not fits:
        return
    for piece, size in zip(pieces, sizes, strict=True):
        used = piece.numel() * piece.element_size()
        store[end : end + used].view(piece.dtype).copy_(piece)
        end += size


@torch.library.impl("orpo_kernels::compact_weight_gradient", "CompositeExplicitAutograd")
def _compact_weight_gradient(  # noqa: PLR0913 - as its schema
    block: Tensor,
    store: Tensor,
    table: Tensor,
    item: int,
    first_column: int,
    coefficients: Tensor,
    hidden: Tensor,
    tail: Tensor | None = None,
    tail_rows: Tensor | None = None,
) -> None:
    out = block
    if tail is not None and tail_rows is not None:
        block = torch.mm(tail.t(), tail_rows)
    offsets, columns, values = _unpack(store, table, item, coefficients)
    step = _gathered_entries(hidden)
    for first in range(0, columns.shape[0], _ENTRIES):
        last = min(first + _ENTRIES, columns.shape[0])
        inside = columns[first:last] - first_column
        chosen = ((inside >= 0) & (inside < block.shape[0])).nonzero()[:, 0]
        rows = torch.searchsorted(offsets, chosen + first, right=True) - 1
        factors = values[first:last][chosen] * coefficients[rows]
        for i in range(0, chosen.shape[0], step):
            products = hidden.index_select(0, rows[i : i + step]).to(block.dtype)
            products *= -factors[i : i + step, None]
            _add_rows(block, inside[chosen[i : i + step]].to(torch.int64), products)
    if tail is not None:
        out.copy_(block)


def _unpack(
    store: Tensor, table: Tensor, item: int, coefficients: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    start = int(table[item, 0])
    offsets_bytes = 4 * (coefficients.shape[0] + 1)
    offsets = store[start : start + offsets_bytes].view(torch.int32)
    entries, width = int(offsets[-1]), coefficients.element_size()
    start += _aligned(offsets_bytes)
    columns = store[start : start + 4 * entries].view(torch.int32)
    start += _aligned(4 * entries)
    return offsets, columns, store[start : start + width * entries].view(coefficients.dtype)


def _gathered_entries(matrix: Tensor) -> int:
    """How many rows of `matrix` may be gathered and widened at once."""
    wide = accumulation_dtype(matrix.dtype).itemsize
    return max(1, strip_bytes(matrix.device) // (4 * wide * max(1, matrix.shape[1])))


def _rows_of(offsets: Tensor, entries: slice) -> Tensor:
    positions = torch.arange(entries.start, entries.stop, dtype=torch.int32, device=offsets.device)
    return torch.searchsorted(offsets, positions, right=True) - 1


def _add_rows(target: Tensor, index: Tensor, rows: Tensor) -> None:
    # Deterministic on both: serial on the CPU; sorted, without atomics, on a GPU.
    if target.device.type == "cpu":
        target.index_add_(0, index, rows)
    else:
        target.index_put_((index,), rows, accumulate=True)


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


for _name, _plain in (("softmax_compact", _softmax_compact), ("compact_matmul", _compact_matmul)):
    torch.library.impl(f"orpo_kernels::{_name}", "CompositeExplicitAutograd", _plain)
    register_tile_operation(_name, _plain)
