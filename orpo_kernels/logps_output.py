"""What `linear_logps` computes beside log-probs, for who asks: lse and mean logits of each row.

    lse_t = z_t[y_t] - logp_t

The log-probs are there and the label's logit is one dot, so the log-sum-exp of a row, and its
gradient, softmax(z_t) times the head, cost a row of the head each and no pass over the vocabulary.
"""

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import Tensor

from orpo_kernels import reference
from orpo_kernels.engine.mean_logits import row_mean_logits
from orpo_kernels.linear_logps import certified_logps
from orpo_kernels.options import (
    Certificate,
    LogpsKeywords,
    LogpsOptions,
    check_flag,
    choose_compute_dtype,
    refuse_unknown,
    spelled_out,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LogpsOutput(NamedTuple):
    """Result of `linear_logps_output`; what was not asked for is None.

    Attributes:
        logps: (...) float32, nats, or a tuple of two, as `linear_logps` returns it; differentiable.
        lse: (...) float32, nats, `log sum exp z_t`, differentiable: for a z-loss, or an entropy. 0
            where no label set scores the row.
        mean_logits: (...) float32, mean of z_t over the vocabulary, of every row; no graph.
        certificate: what a sparse gradient left out; None if it is exact, or there is none.
    """

    logps: Tensor | tuple[Tensor, Tensor]
    lse: Tensor | None = None
    mean_logits: Tensor | None = None
    certificate: Certificate | None = None


@spelled_out(LogpsKeywords)
def linear_logps_output(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | tuple[Tensor, Tensor],
    bias: Tensor | None = None,
    *,
    lse: bool = False,
    mean_logits: bool = False,
    **options: "Unpack[LogpsKeywords]",
) -> LogpsOutput:
    """`linear_logps`, and what else the same pass over the vocabulary knows.

    Args:
        hidden: as in `linear_logps`, and so are `weight`, `labels` and `bias`.
        weight: (V, H).
        labels: (...), or two such tensors.
        bias: (V,).
        lse: whether to return the log-sum-exp of each scored row.
        mean_logits: whether to return the mean of each row's logits. Without a softcap next to
            nothing; with one, a pass over the vocabulary.
        **options: of `linear_logps`.

    Returns:
        `LogpsOutput`.

    Raises:
        TypeError: an unknown option, and what `linear_logps` raises.
        ValueError: as `linear_logps`.

    Note:
        `lse` takes, until its backward, float32 buffers like the scored rows of `hidden`, and in it
        one like `weight` where that is trained.
    """
    refuse_unknown(linear_logps_output, options, LogpsKeywords)
    check_flag("lse", lse)
    check_flag("mean_logits", mean_logits)
    asked = LogpsOptions(**options)
    logps, certificate = certified_logps(hidden, weight, labels, bias, asked)
    lses = means = None
    if lse:
        lses = _row_lse(hidden, weight, labels, bias, logps, asked)
    if mean_logits:
        means = row_mean_logits(
            hidden, weight, bias, low_rank=asked.low_rank, logit_scale=asked.logit_scale,
            softcap=asked.softcap, workspace_bytes=asked.workspace_bytes,
        ).to(hidden.device)  # fmt: skip
    return LogpsOutput(logps, lses, means, certificate)


def _row_lse(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | tuple[Tensor, Tensor],
    bias: Tensor | None,
    logps: Tensor | tuple[Tensor, Tensor],
    options: LogpsOptions,
) -> Tensor:
    """(...) log-sum-exp of each row that a label set scores, of checked operands."""
    if isinstance(labels, tuple) and isinstance(logps, tuple):
        first = labels[0] != options.ignore_index
        labels = torch.where(first, labels[0], labels[1].to(labels[0]))
        logps = torch.where(first.to(logps[0].device), logps[0], logps[1])
    return _lse_of(hidden, weight, cast(Tensor, labels), bias, cast(Tensor, logps), options)


def _lse_of(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    logps: Tensor,
    options: LogpsOptions,
) -> Tensor:
    rows = (labels != options.ignore_index).to(hidden.device)
    index, device = labels.to(hidden.device)[rows], weight.device
    dtype = choose_compute_dtype(hidden, weight, options.compute_dtype)
    parts = [(hidden, weight)] if options.low_rank is None else [(hidden, weight), options.low_rank]

    def wide(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).to(logps.dtype)

    with torch.amp.autocast(device.type, enabled=False):
        entries = index.to(device)
        terms = [
            (wide(part[rows].to(device)) * wide(head[entries])).sum(-1) for part, head in parts
        ]
        dots = torch.stack(terms).sum(0)
        if bias is not None:
            dots = dots + bias[entries].to(logps.dtype)
        z, _ = reference.transform(dots, options.logit_scale, options.softcap)
        lse = z.to(hidden.device) - logps[rows]
    return torch.zeros_like(logps).index_put((rows,), lse)
