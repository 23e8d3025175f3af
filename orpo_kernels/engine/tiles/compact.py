"""The sparse gradient on a CPU and in plain torch: what of a tile is kept, and dW from it.

    softmax_compact_online_  E > eps * known: into the list; the others summed by column
    pack_entries             kept entries -> a byte buffer that lives until the backward
    compact_weight_gradient  block <- block - kept E^T (coefficients * hidden)

`softmax_compact_online_` is `softmax_collect_`, online and stored, with another list: of every
entry over `eps` times what is known, as `eps` is no less than `share` of it. `tail` (G, C) receives
E / known of all the others, by the `groups` (R,) of the rows in [0, G). Returned last: their sums
per row, (R,). Where more than `capacity` entries a row, on average over 64 rows, would be in the
list, it does what `softmax_collect_` does with `share` and `most`; `tail` stays as it was, and (0,)
is returned last.

`compact_weight_gradient` reads an item of the buffer for the columns `first_column` on of its tile;
`coefficients` (R,) and `hidden` (R, H) are of its rows. With `tail` (G, C) and `tail_rows` (G, H)
the block, of any floating dtype, is not added to but written: `tail^T tail_rows` takes the place of
what it held.
"""

import torch
from torch import Tensor

from orpo_kernels.engine.tiles.collect import Entries, known_sums, softmax_collect_
from orpo_kernels.engine.tiles.plain import add_at_, exponentials, rows_at_once
from orpo_kernels.engine.tiles.schemas import softmax_stats
from orpo_kernels.kernels.slot_store import aligned

_TASK_ROWS = 64
_ENTRIES = 2**16  # looked at together where only their columns and rows are


def softmax_compact_online_(  # noqa: PLR0913 - as the schema
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    first_column: int,
    row_max: Tensor,
    sum_exp: Tensor,
    others: Tensor | None,
    hidden: Tensor | None,
    weight: Tensor | None,
    eps: float,
    share: float,
    most: int,
    logit_scale: float,
    softcap: float | None,
    groups: Tensor,
    tail: Tensor,
    capacity: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `tiles/schemas.py`, and above."""
    tile, options = (logits, bias, labels, first_column), (logit_scale, softcap)
    stats = softmax_stats(*tile, *options)
    reference, _, known = known_sums(stats, (row_max, sum_exp), others, online=True)
    counts = torch.zeros_like(groups)
    for i, j, e, slope in exponentials(*tile, reference, *options):
        entry = e if slope is None else e * slope
        counts[i:j] = (entry > (eps * known[i:j])[:, None]).sum(1)
    tasks = torch.split(counts, _TASK_ROWS)
    full = any(int(rows.sum()) > capacity * rows.shape[0] for rows in tasks)
    limits = (share, most) if full else (eps, logits.shape[1])
    lists = softmax_collect_(
        *tile, row_max, sum_exp, others, hidden, weight, *limits, *options, True, True
    )
    dropped = row_max.new_empty(0 if full else row_max.shape[0])
    of_group = groups == torch.arange(tail.shape[0], device=groups.device)[:, None]
    shares = torch.where(of_group & (known > 0), 1.0 / known, 0.0)
    for start in range(0, dropped.shape[0], _TASK_ROWS):
        rows = slice(start, start + _TASK_ROWS)
        rest = logits[rows].to(dropped.dtype)
        dropped[rows] = rest.sum(1)
        tail.addmm_(shares[:, rows], rest)
    return *lists, dropped


def pack_entries(entries: Entries | None, store: Tensor, table: Tensor, item: int) -> None:
    """Fills row `item` of `table` (items, 2) int64: its first byte in `store`, how many it takes.

    The latter is -1 where the rest of the store is too small, and for a tile without entries of its
    own (None). Items are packed in order, one call each, 0 first.
    """
    end = 0
    if item > 0:
        start, size = (int(each) for each in table[item - 1])
        end = start + max(0, size)
    pieces = () if entries is None else (entries.offsets.int(), entries.columns, entries.values)
    sizes = [aligned(piece.numel() * piece.element_size()) for piece in pieces]
    fits = entries is not None and end + sum(sizes) <= store.shape[0]
    table[item, 0], table[item, 1] = end, sum(sizes) if fits else -1
    if not fits:
        return
    for piece, size in zip(pieces, sizes, strict=True):
        used = piece.numel() * piece.element_size()
        store[end : end + used].view(piece.dtype).copy_(piece)
        end += size


def compact_weight_gradient(  # noqa: PLR0913 - as its schema
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
    """See `tiles/schemas.py`, and above."""
    out = block
    if tail is not None and tail_rows is not None:
        block = torch.mm(tail.t(), tail_rows)
    offsets, columns, values = _unpack(store, table, item, coefficients)
    step = rows_at_once(hidden)
    for first in range(0, columns.shape[0], _ENTRIES):
        last = min(first + _ENTRIES, columns.shape[0])
        inside = columns[first:last] - first_column
        chosen = ((inside >= 0) & (inside < block.shape[0])).nonzero()[:, 0]
        rows = torch.searchsorted(offsets, chosen + first, right=True) - 1
        factors = values[first:last][chosen] * coefficients[rows]
        for i in range(0, chosen.shape[0], step):
            products = hidden.index_select(0, rows[i : i + step]).to(block.dtype)
            products *= -factors[i : i + step, None]
            add_at_(block, inside[chosen[i : i + step]].to(torch.int64), products)
    if tail is not None:
        out.copy_(block)


def _unpack(
    store: Tensor, table: Tensor, item: int, coefficients: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    start = int(table[item, 0])
    offsets_bytes = 4 * (coefficients.shape[0] + 1)
    offsets = store[start : start + offsets_bytes].view(torch.int32)
    entries, width = int(offsets[-1]), coefficients.element_size()
    start += aligned(offsets_bytes)
    columns = store[start : start + 4 * entries].view(torch.int32)
    start += aligned(4 * entries)
    return offsets, columns, store[start : start + width * entries].view(coefficients.dtype)
