"""Refine the top: the large entries of a rounded tile, redone in float32 from the inputs.

A 16-bit GEMM on a CPU rounds its logits: 1e-2 of the gradient, almost all of it in the few entries
that are large, and a log-sum-exp that is too high on average. Those entries are taken out of the
tile, their logits recomputed as float32 dot products, and added to the sums in float32; what stays
in the tile is small, and its rounding averages out.

Schemas in `engine/tiles.py`; here the plain-torch form. The entries of a tile are a list per row
(CSR): `offsets` (R + 1,) int64, `columns` (M,) int32 within the tile, `values` (M,).

`softmax_collect_` with `online`: row_max and sum_exp (R,), of the tiles before, become those of
this one too; a limit of `share` times what is known of the sum, `exp(others - row_max)` included,
says which entries are large, the `most` largest at most. Without `online` they are the final ones,
and stay. E = exp(z - row_max) dz/dtile replaces the tile if `store`, 0 for the entries in the list.
The values of the list are E too, from `hidden` and `weight` where they are given. Returned first:
exp(row_max before - row_max), what the sums of the tiles before are multiplied by.

`softmax_compact_online_` is the same step of the sparse gradient: in the list is every entry over
`eps` times what is known, and `tail` (G, C) receives E / known of all the others, by the `groups`
(R,) of the rows in [0, G). Returned last: their sums per row, (R,). Where more than `capacity`
entries a row, on average over 64 rows, would be in the list, it does what `softmax_collect_` does
with `share` and `most`, online and stored; `tail` stays as it was, and (0,) is returned last.
"""

import torch
from torch import Tensor

from orpo_kernels.engine.tiles import exponentials, softmax_stats, strip_bytes, transformed

LARGE = 2.0**-10  # about 40 entries of a row of a trained model; the rest rounds to 4e-5
MOST = 256  # of a row of a tile; a row with more has none that matters alone
_TASK_ROWS = 64

Entries = tuple[Tensor, Tensor, Tensor]


def restore(tile: Tensor, entries: Entries) -> None:
    """Writes the entries into the tile, rounded to its dtype."""
    offsets, columns, values = entries
    tile[_rows(offsets), columns.long()] = values.to(tile.dtype)


def _rows(offsets: Tensor) -> Tensor:
    index = torch.arange(offsets.numel() - 1, device=offsets.device)
    return index.repeat_interleave(offsets.diff())


def _softmax_collect_(  # noqa: PLR0913 - as the schema
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
    tile = (logits, bias, labels, first_column)
    stats = softmax_stats(*tile, logit_scale, softcap)
    reference, total, known = _known(stats, (row_max, sum_exp), others, online=online)
    rescale = torch.exp(row_max - reference)
    limit = share * known
    counts, lists = [], []
    options = (logit_scale, softcap)
    for i, j, e, slope in exponentials(*tile, reference, *options):
        entry = e if slope is None else e * slope
        rows, columns = _large(entry, limit[i:j], most)
        values = entry[rows, columns]
        if store:
            logits[i:j] = entry.index_put((rows, columns), values.new_zeros(()))
        if hidden is not None and weight is not None:
            dots = _dots(hidden[i:j], weight, rows, columns, e.dtype)
            z, d = transformed(dots, bias, columns, *options)
            redone = torch.exp(z - reference[i:j][rows])
            total[i:j].index_add_(0, rows, redone - e[rows, columns])
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


torch.library.impl("orpo_kernels::softmax_collect_", "CompositeExplicitAutograd", _softmax_collect_)


@torch.library.impl("orpo_kernels::softmax_compact_online_", "CompositeExplicitAutograd")
def _softmax_compact_online_(  # noqa: PLR0913 - as the schema
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
    tile, options = (logits, bias, labels, first_column), (logit_scale, softcap)
    stats = softmax_stats(*tile, *options)
    reference, _, known = _known(stats, (row_max, sum_exp), others, online=True)
    counts = torch.zeros_like(groups)
    for i, j, e, slope in exponentials(*tile, reference, *options):
        entry = e if slope is None else e * slope
        counts[i:j] = (entry > (eps * known[i:j])[:, None]).sum(1)
    tasks = torch.split(counts, _TASK_ROWS)
    full = any(int(rows.sum()) > capacity * rows.shape[0] for rows in tasks)
    limits = (share, most) if full else (eps, logits.shape[1])
    lists = _softmax_collect_(
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


def _known(
    stats: tuple[Tensor, Tensor, Tensor], sums: tuple[Tensor, Tensor], others: Tensor | None, *,
    online: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Of a tile's statistics and the sums before it: reference, the tile's sum, all that is known.

    Not online the sums are final: the reference is theirs, and no sum of the tile is asked for.
    """
    block_max, total, _ = stats
    reference, known = sums
    if online:
        reference = torch.maximum(reference, block_max)
        total = total * torch.exp(block_max - reference)
        known = known * torch.exp(sums[0] - reference) + total
    if others is not None:
        known = known + torch.exp((others - reference).clamp(max=60.0))
    return reference, total, known


def _large(entry: Tensor, limit: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of what is above the limit, in order; of too many the largest."""
    if entry.shape[1] > most:
        limit = torch.maximum(limit, entry.topk(most + 1, 1).values[:, -1])
    rows, columns = (entry > limit[:, None]).nonzero().unbind(1)
    return rows, columns


def _dots(
    hidden: Tensor, weight: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype
) -> Tensor:
    step = _entries_at_once(weight, dtype)
    pairs = zip(torch.split(rows, step), torch.split(columns, step), strict=True)
    return torch.cat([(hidden[r].to(dtype) * weight[c].to(dtype)).sum(1) for r, c in pairs])


def _entries_at_once(weight: Tensor, dtype: torch.dtype) -> int:
    return max(1, strip_bytes(weight.device) // (4 * max(1, weight.shape[1]) * dtype.itemsize))


@torch.library.impl("orpo_kernels::csr_matmul_", "CompositeExplicitAutograd")
def _csr_matmul_(
    accumulator: Tensor, offsets: Tensor, columns: Tensor, values: Tensor, weight: Tensor
) -> None:
    step = _entries_at_once(weight, accumulator.dtype)
    lists = (_rows(offsets), columns, values)
    for r, c, value in zip(*(torch.split(each, step) for each in lists), strict=True):
        accumulator.index_add_(0, r, value[:, None] * weight[c.long()].to(accumulator.dtype))
