"""The definition of every op of the package, in plain torch: the oracle of tests and benchmarks.

Everything is written the obvious way, with the whole `(N, V)` logits and with autograd, in the
dtype of the inputs (use float64). Nothing here is shared with the production code, and the formulae
are deliberately other ones: a mistake, or a cancellation, in one shows in the other.

    z_t    = softcap(scale * (h_t W^T + b))          softcap(x) = c tanh(x / c)
    logp_t = log softmax(z_t)[y_t]
    logp(s) = mean of logp_t over the scored tokens of sequence s
    log_odds(x) = x - log(1 - e^x)
    or_loss = -log sigmoid(log_odds(chosen) - log_odds(rejected))
    loss = nll + beta * mean(or_loss)

The compensated sparse gradient has a definition of its own, `sparse_gradients`: it is not the
derivative of the loss, but close to it (docs/sparse.md says how close, and proves it).

Source: Hong, Lee, Thorne 2024, "ORPO: Monolithic Preference Optimization without Reference Model",
arXiv 2403.07691, equations 4 to 7.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels.constants import IGNORE_INDEX, MAX_MEAN_LOGP, SPLIT

GROUPS = 2  # rows share a tail with those whose coefficients have their sign: chosen, rejected


class ReferenceOutput(NamedTuple):
    """What `orpo_loss` returns here; every field carries its graph. Fields as in `ORPOOutput`."""

    loss: Tensor
    nll_loss: Tensor
    or_loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    log_odds_ratio: Tensor
    skipped_pairs: Tensor


def logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The transformed logits, `(..., V)`, in the dtype of the inputs."""
    z = hidden @ weight.transpose(0, 1)
    if low_rank is not None:
        z = z + low_rank[0] @ low_rank[1].transpose(0, 1)
    if bias is not None:
        z = z + bias
    return transform(z, logit_scale, softcap)[0]


def transform(z: Tensor, logit_scale: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Scale, then softcap, of raw logits (bias added), and the slope of the result in them."""
    z = logit_scale * z
    if softcap is None:
        return z, torch.full_like(z, logit_scale)
    return softcap * torch.tanh(z / softcap), logit_scale / torch.cosh(z / softcap).square()


def mean_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Mean of the logits of each sequence, `hidden (B, T, H) -> (B,)`."""
    return logits(hidden, weight, bias, logit_scale=logit_scale, softcap=softcap).mean((1, 2))


def tile_logits(
    tile: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    first_column: int,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Logits of a tile `(R, C)`, -inf in the columns of `labels (K, R)`, and their slope."""
    z, slope = transform(tile if bias is None else tile + bias, logit_scale, softcap)
    columns = torch.arange(first_column, first_column + tile.shape[1], device=tile.device)
    return z.masked_fill((labels[:, :, None] == columns).any(0), -torch.inf), slope


def softmax_stats(z: Tensor) -> tuple[Tensor, Tensor]:
    """`(R, C) -> (R,)` maximum and sum of `exp(z - maximum)`, of `tile_logits`."""
    return z.amax(1), torch.exp(z - z.amax(1, keepdim=True)).sum(1)


def logit_sum(
    tile: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None
) -> Tensor:
    """Sum over the columns of a tile `(R, C)` of its logits, `(R,)`: those of labels included."""
    return transform(tile if bias is None else tile + bias, logit_scale, softcap)[0].sum(1)


def softmax_grad(z: Tensor, slope: Tensor, reference: Tensor) -> Tensor:
    """`exp(z - reference) * slope`, `(R, C)`, of `tile_logits` and one `reference (R,)` a row."""
    return torch.exp(z - reference[:, None]) * slope


def column_sums(tile: Tensor, coefficients: Tensor) -> Tensor:
    """`(R, C), (R,) -> (C,)`."""
    return (tile * coefficients[:, None]).sum(0)


def accumulate(
    accumulator: Tensor, partial: Tensor, rescale: Tensor | None, alpha: float = 1.0
) -> Tensor:
    """`rescale * accumulator + alpha * partial`, `(R, H)`, with `rescale (R,)`."""
    kept = accumulator if rescale is None else rescale[:, None] * accumulator
    return kept + alpha * partial


def rounded(entries: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Rounded to `dtype`, if one is given, in their own."""
    return entries if dtype is None else entries.to(dtype).to(entries.dtype)


class Compact(NamedTuple):
    """Entries of a tile split in two. `kept (R, C)` rounded, 0 elsewhere; `mask (R, C)`: which.

    `tail (GROUPS, C)` is the sum of the others over the rows of each group, in units of `total`.
    """

    kept: Tensor
    mask: Tensor
    tail: Tensor


def softmax_compact(
    entries: Tensor, total: Tensor, groups: Tensor, *, eps: float, block: int = 1,
    rounding: torch.dtype | None = None, split: float = SPLIT,
) -> Compact:  # fmt: skip
    """Keeps a column in `block` consecutive rows if an entry of one is over `eps * total`.

    `entries (R, C)` of `softmax_grad`, `total (R, 1)` or (R, C), `groups (R,)` in [0, GROUPS).
    Where those over it add to more than `split`, the column is kept in two numbers of `rounding`.
    """
    share = entries / total
    over = torch.split(share.masked_fill(entries <= eps * total, 0.0), block)
    sums = torch.cat([rows.sum(0, keepdim=True).expand_as(rows) for rows in over])
    mask, stored = sums > 0, rounded(entries, rounding)
    stored = stored + rounded(entries - stored, rounding).masked_fill(sums <= split, 0.0)
    dropped = share.masked_fill(mask, 0.0)
    tail = torch.stack([dropped[groups == group].sum(0) for group in range(GROUPS)])
    return Compact(stored.masked_fill(~mask, 0.0), mask, tail)


class SparseSoftmax(NamedTuple):
    """A softmax gradient in the compensated sparse form: row t is `kept + mass * tail[group]`.

    `kept`, `mask (N, V)` as in `Compact`; `mass (N,)`; `tail (GROUPS, V)` of sum 1 (0: nothing was
    dropped). The certificate `residual (N,)` is at least the root of the sum of the squares of
    what the row dropped.
    """

    kept: Tensor
    mask: Tensor
    mass: Tensor
    tail: Tensor
    residual: Tensor


def sparse_softmax(
    entries: Tensor, groups: Tensor, *, eps: float, block: int = 1,
    rounding: torch.dtype | None = None, split: float = SPLIT, known: Tensor | None = None,
) -> SparseSoftmax:  # fmt: skip
    """The sparse form of `entries (N, V)`, `p d` with the label columns 0; row sums are kept.

    `known (N, V)` in (0, 1]: the share of the row's sum of exponentials that is in sight when the
    column is decided on; None: all. Options as in `softmax_compact`.
    """
    known = torch.ones_like(entries[:, :1]) if known is None else known
    compact = softmax_compact(
        entries, known, groups, eps=eps, block=block, rounding=rounding, split=split
    )
    kept_sum = compact.kept.sum(1)
    mass = entries.sum(1) - kept_sum
    sums = compact.tail.sum(1, keepdim=True)
    tail = torch.where(sums > 0, compact.tail / sums, 0.0)
    # A kept entry k stands for one in k +- k unit / (1 - unit): mass, which also balances the
    # rounding, may fall short of what was dropped by that, or be negative.
    unit = 0.0 if rounding is None else torch.finfo(rounding).eps / 2
    dropped_at_most = (mass + unit / (1 - unit) * kept_sum).clamp(min=0.0)
    return SparseSoftmax(compact.kept, compact.mask, mass, tail, torch.sqrt(eps * dropped_at_most))


class SparseGradients(NamedTuple):
    """`dhidden (N, H)`, `dweight (V, H)`, `dbias (V,)`, and the form of the scored rows."""

    dhidden: Tensor
    dweight: Tensor
    dbias: Tensor
    softmax: SparseSoftmax


def sparse_gradients(  # noqa: PLR0913 - as linear_logps
    hidden: Tensor,
    weight: Tensor,
    labels: tuple[Tensor, ...],
    coefficients: tuple[Tensor, ...],
    bias: Tensor | None = None,
    *,
    eps: float,
    groups: Tensor | None = None,
    block: int = 1,
    columns: int | None = None,
    looked: int | None = None,
    whole: Tensor | None = None,
    rounding: torch.dtype | None = None,
    head_mask: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> SparseGradients:
    """The compensated sparse gradients of `sum a_t logp_t`, of one label set or two.

    On raw logits, label columns are exact: `d_v sum_sets a (1[v = y] - p_v)`. All of a row, label
    columns too, then gets `-a (kept + mass * tail[group])`, a the sum over the sets, in place of
    `-a p_v d_v` elsewhere. The gradients are that matrix times `weight`, `hidden` and 1.

    Args:
        hidden: (N, H).
        weight: (V, H).
        labels: one or two of (N,); rows that no set scores are left out, of blocks of rows too.
        coefficients: as many, (N,): `d loss / d logp`.
        bias: (V,).
        eps: a probability: entries `p d` of at most this, times the scale in d, are dropped.
        groups: (N,) in [0, GROUPS): rows that share a tail; None: all of them.
        block: scored rows that share the set of kept columns.
        columns: width of the blocks of the vocabulary where one look at the logits must do: a block
            goes by the labels' probabilities and those up to its own end. None: by all.
        looked: with `columns`, the first block goes by so many of its own, others by those before.
        whole: (scored rows,) bool: rows that keep everything; blocks of them.
        rounding: dtype kept entries are rounded to, or None.
        head_mask: (scored rows, V) bool: what `dweight` and `dbias` keep of each row, where that is
            not what `dhidden` keeps; the tail stays.
        logit_scale: factor on the logits, positive.
        softcap: as in `linear_logps`.
        ignore_index: as in `linear_logps`.
    """
    masks = torch.stack([each != ignore_index for each in labels])
    rows = masks.any(0).nonzero()[:, 0]
    targets = torch.stack(labels).where(masks, -1)[:, rows]
    a = torch.stack(coefficients).where(masks, 0.0)[:, rows]
    group = torch.zeros_like(rows) if groups is None else groups[rows].long()
    raw = hidden[rows] @ weight.transpose(0, 1)
    z, slope = transform(raw if bias is None else raw + bias, logit_scale, softcap)
    p = torch.softmax(z, 1)
    is_label = (targets[:, :, None] == torch.arange(p.shape[1], device=p.device)).any(0)
    known = None
    if columns is not None:
        last = (torch.arange(p.shape[1]) // columns + (looked is None)).mul(columns) - 1
        last = torch.where(last < 0, min(looked or 0, columns) - 1, last).clamp(max=p.shape[1] - 1)
        others = p.masked_fill(is_label, 0.0)
        known = others.cumsum(1)[:, last] + (p - others).sum(1, keepdim=True)
    if whole is not None:
        known = torch.where(whole[:, None], 1e-300, torch.ones_like(p) if known is None else known)
    entries = (p * slope).masked_fill(is_label, 0.0)
    sparse = sparse_softmax(
        entries, group, eps=eps * logit_scale, block=block, rounding=rounding,
        split=SPLIT * logit_scale, known=known,
    )  # fmt: skip
    dlogits = (
        torch.zeros_like(z).scatter_add(1, targets.clamp(min=0).t(), a.t()) - a.sum(0)[:, None] * p
    )
    of_labels = (dlogits * slope).masked_fill(~is_label, 0.0)

    def gradient_of(kept: Tensor) -> Tensor:
        mass = (entries.sum(1) - kept.sum(1))[:, None]
        return of_labels - a.sum(0)[:, None] * (kept + mass * sparse.tail[group])

    draw = of_head = gradient_of(sparse.kept)
    if head_mask is not None:
        of_head = gradient_of(rounded(entries, rounding).masked_fill(~head_mask, 0.0))
    dhidden = torch.zeros_like(hidden).index_copy(0, rows, draw @ weight)
    dweight = of_head.transpose(0, 1) @ hidden[rows]
    return SparseGradients(dhidden, dweight, of_head.sum(0), sparse)


def linear_lse(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logit_scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`softmax_stats` of all logits, raw dots of `labels (K, R)` (0 for -1), sums of all logits."""
    tile = hidden @ weight.transpose(0, 1)
    z, _ = tile_logits(tile, bias, labels, 0, logit_scale, softcap)
    dots = torch.where(labels >= 0, tile.t().gather(0, labels.clamp(min=0)), 0.0)
    return *softmax_stats(z), dots, logit_sum(tile, bias, logit_scale, softcap)


def linear_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Log-prob of each label, `(...)`, 0 where ignored. `hidden (..., H)`, `weight (V, H)`.

    Of several label sets, `(K, ...)`, as many.
    """
    z = logits(hidden, weight, bias, logit_scale=logit_scale, softcap=softcap, low_rank=low_rank)
    scored = labels != ignore_index
    logps = F.log_softmax(z, dim=-1).expand(*labels.shape, -1)
    return logps.gather(-1, labels.where(scored, 0)[..., None])[..., 0].where(scored, 0.0)


def sequence_mean(token_logps: Tensor, labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Mean over the scored tokens of each row, `(B, T) -> (B,)`; 0 for a row with none."""
    scored = labels != ignore_index
    return (token_logps * scored).sum(-1) / scored.sum(-1).clamp(min=1)


def log_odds(logp: Tensor) -> Tensor:
    """`log(p / (1 - p))` of a log-prob, evaluated at most at `MAX_MEAN_LOGP` (gradient too)."""
    at_most = logp + (logp.clamp(max=MAX_MEAN_LOGP) - logp).detach()
    return at_most - torch.log1p(-torch.exp(at_most))


def odds_ratio_loss(chosen_logps: Tensor, rejected_logps: Tensor) -> tuple[Tensor, Tensor]:
    """`(P,), (P,) -> or_loss (P,) >= 0, log_odds_ratio (P,)`, in nats."""
    ratio = log_odds(chosen_logps) - log_odds(rejected_logps)
    return torch.logaddexp(torch.zeros_like(ratio), -ratio), ratio


def orpo_loss(  # noqa: PLR0913 - as orpo_kernels.orpo_loss
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    nll_labels: Tensor | None = None,
    beta: float = 0.1,
    nll_reduction: str = "token",
    num_nll_tokens: int | None = None,
    num_pairs: int | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> ReferenceOutput:
    """The ORPO loss of stacked pairs, `hidden (2P, T, H)`, `labels (2P, T)` shifted, chosen first.

    A pair with an empty side contributes exactly 0. One pair at a time, in a loop, on purpose.
    """
    pairs = labels.shape[0] // 2
    nll_labels = labels if nll_labels is None else nll_labels

    def logps(row: int, row_labels: Tensor) -> Tensor:
        return linear_logps(
            hidden[row], weight, row_labels, bias,
            logit_scale=logit_scale, softcap=softcap, ignore_index=ignore_index,
        )  # fmt: skip

    def mean(row: int) -> Tensor:
        return sequence_mean(logps(row, labels[row])[None], labels[row][None], ignore_index)[0]

    zero = (hidden.sum() + weight.sum()) * 0.0
    chosen = torch.stack([mean(row) for row in range(pairs)]) if pairs else zero.new_zeros(0)
    rejected = torch.stack([mean(pairs + row) for row in range(pairs)]) if pairs else chosen
    or_losses, ratio = odds_ratio_loss(chosen, rejected)
    nll_sum, or_sum, tokens, valid = zero, zero, 0, 0
    for row in range(pairs):
        if not all(bool((labels[side] != ignore_index).any()) for side in (row, pairs + row)):
            continue
        count = int((nll_labels[row] != ignore_index).sum())
        row_nll = -logps(row, nll_labels[row]).sum()
        nll_sum = nll_sum + (row_nll if nll_reduction == "token" else row_nll / max(count, 1))
        or_sum = or_sum + or_losses[row]
        tokens, valid = tokens + count, valid + 1
    pair_count = max(valid if num_pairs is None else num_pairs, 1)
    token_count = max(tokens if num_nll_tokens is None else num_nll_tokens, 1)
    nll = nll_sum / (token_count if nll_reduction == "token" else pair_count)
    or_mean = or_sum / pair_count
    return ReferenceOutput(
        nll + beta * or_mean, nll, or_mean, chosen, rejected, ratio, torch.tensor(pairs - valid)
    )
