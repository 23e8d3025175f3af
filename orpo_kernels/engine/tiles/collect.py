"""One operation finishes a tile: its statistics, its exponentials, and the large entries redone.

A 16-bit GEMM on a CPU rounds its logits: 1e-2 of the gradient, almost all of it in the few entries
that are large, and a log-sum-exp that is too high on average. Those entries are taken out of the
tile, their logits recomputed as float32 dot products, and added to the sums in float32; what stays
in the tile is small, and its rounding averages out.

The entries of a tile are a list per row, `Entries`.

`softmax_collect_` with `online`: row_max and sum_exp (R,), of the tiles before, become those of
this one too; a limit of `share` times what is known of the sum, `exp(others - row_max)` included,
says which entries are large, the `most` largest at most. Without `online` they are the final ones,
and stay. E = exp(z - row_max) dz/dtile replaces the tile if `store`, 0 for the entries in the list.
The values of the list are E too, from `hidden` and `weight` where they are given. Returned first:
exp(row_max before - row_max), what the sums of the tiles before are multiplied by.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels.constants import MOST_MOVED
from orpo_kernels.engine.tiles.plain import add_at_, exponentials, merge, rows_at_once, transformed
from orpo_kernels.engine.tiles.schemas import softmax_stats


class Entries(NamedTuple):
    """Entries of a tile as compressed rows (CSR)."""

    offsets: Tensor  # (R + 1,) int64
    columns: Tensor  # (M,) int32, within the tile
    values: Tensor  # (M,)


def restore_(tile: Tensor, entries: Entries) -> None:
    """Writes the entries into the tile, rounded to its dtype."""
    offsets, columns, values = entries
    tile[_rows(offsets), columns.long()] = values.to(tile.dtype)


def _rows(offsets: Tensor) -> Tensor:
    index = torch.arange(offsets.numel() - 1, device=offsets.device)
    return index.repeat_interleave(offsets.diff())


def softmax_collect_(  # noqa: PLR0913 - as the schema
    logits: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    first_column: int,
    row_max: Tensor,
    sum_exp: Tensor,
    others: Tensor | None,
    hidden: Tensor | None,
    weight: Tensor | None,
    share: float,
    most: int,
    logit_scale: float,
    softcap: float | None,
    online: bool,
    store: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `tiles/schemas.py`, and above."""
    tile = (logits, bias, labels, first_column)
    stats = softmax_stats(*tile, logit_scale, softcap)
    reference, total, known = known_sums(stats, (row_max, sum_exp), others, online=online)
    rescale = torch.exp(row_max - reference)
    limit = share * known
    counts, lists = [], []
    options = (logit_scale, softcap)
    for i, j, e, slope in exponentials(*tile, reference, *options):
        entry = e if slope is None else e * slope
        rows, columns = _large(entry, limit[i:j], most if share < torch.inf else 0)
        values = entry[rows, columns]
        if store:
            logits[i:j] = entry.index_put((rows, columns), values.new_zeros(()))
        if hidden is not None and weight is not None:
            dots = _dots(hidden[i:j], weight, rows, columns, e.dtype)
            z, d = transformed(dots, bias, columns, *options)
            rounded = e[rows, columns]
            redone = torch.exp(z - reference[i:j][rows])
            redone = redone.clamp(rounded / MOST_MOVED, rounded * MOST_MOVED)
            add_at_(total[i:j], rows, redone - rounded)
            values = redone * d
        counts.append(torch.bincount(rows, minlength=j - i))
        lists.append((columns.int(), values))
    if online:
        row_max.copy_(reference)
        sum_exp.mul_(rescale).add_(total)
    if not lists:
        lists.append((labels.new_empty(0, dtype=torch.int32), row_max.new_empty(0)))
    offsets = torch.cat([labels.new_zeros(1), *counts]).cumsum(0)
    columns, values = (torch.cat(each) for each in zip(*lists, strict=True))
    return rescale, offsets, columns, values


def known_sums(
    stats: tuple[Tensor, Tensor, Tensor], sums: tuple[Tensor, Tensor], others: Tensor | None, *,
    online: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of a tile's statistics and the sums before it: reference, the tile's sum, all that is known.

    Not online the sums are final: the reference is theirs, and no sum of the tile is asked for.
    """
    block_max, total, _ = stats
    reference, known = sums
    if online:
        reference, known, _, total = merge(*sums, block_max, total)
    if others is not None:
        known = known + torch.exp((others - reference).clamp(max=60.0))
    return reference, total, known


def _large(entry: Tensor, limit: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of what is above the limit, in order; of too many the largest."""
    if most == 0:  # none is asked for: nothing that a device would have to be waited for
        return limit.new_empty((2, 0), dtype=torch.int64).unbind(0)  # type: ignore[return-value]
    if entry.shape[1] > most:
        limit = torch.maximum(limit, entry.topk(most + 1, 1).values[:, -1])
    rows, columns = (entry > limit[:, None]).nonzero().unbind(1)
    return rows, columns


def _dots(
    hidden: Tensor, weight: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype
) -> Tensor:
    step = rows_at_once(weight)
    pairs = zip(torch.split(rows, step), torch.split(columns, step), strict=True)
    return torch.cat([(hidden[r].to(dtype) * weight[c].to(dtype)).sum(1) for r, c in pairs])


def csr_matmul_(
    accumulator: Tensor, offsets: Tensor, columns: Tensor, values: Tensor, weight: Tensor
) -> None:
    """See `tiles/schemas.py`."""
    step = rows_at_once(weight)
    lists = (_rows(offsets), columns, values)
    for r, c, value in zip(*(torch.split(each, step) for each in lists), strict=True):
        add_at_(accumulator, r, value[:, None] * weight[c.long()].to(accumulator.dtype))
