"""One fused call: what the override of the head does while the model's own forward runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from orpo_kernels.constants import IGNORE_INDEX
from orpo_kernels.engine.mean_logits import mean_logits, row_mean_logits
from orpo_kernels.guard import DensityGuard
from orpo_kernels.integrations.decoder import RowsCall
from orpo_kernels.integrations.follower import followed
from orpo_kernels.integrations.head import HeadTerms, LogitTransform, OutputHead
from orpo_kernels.integrations.selfcheck import SelfCheck
from orpo_kernels.layout import BatchLayout
from orpo_kernels.linear_logps import certified_logps
from orpo_kernels.loss import ORPOLoss
from orpo_kernels.options import Certificate, LogpsOptions, check_choice
from orpo_kernels.pairing import Pairing, tail_groups

if TYPE_CHECKING:
    from orpo_kernels.integrations.override import ForwardOverride

ALL_POSITIONS = "all"
"""Of `mean_logits`: the last position is counted too, though it predicts no token."""


@dataclass(frozen=True)
class FuseOptions:
    """What `fuse_head` was asked for, checked; and what `gradient="auto"` has seen so far.

    Raises:
        TypeError: a value of another type.
        ValueError: a value out of range.
    """

    loss: ORPOLoss | None
    workspace_bytes: int | None
    gradient: str
    eps: float | None
    compute_dtype: torch.dtype | None
    mean_logits: bool | str
    check: bool
    narrow_head: bool = True
    layout: BatchLayout = field(default_factory=BatchLayout)
    guard: DensityGuard = field(default_factory=DensityGuard, compare=False)

    def __post_init__(self) -> None:
        check_choice("mean_logits", self.mean_logits, (False, True, ALL_POSITIONS))  # type: ignore[arg-type]
        if self.mean_logits == ALL_POSITIONS and self.layout.name != "padded":
            raise ValueError(
                f"mean_logits={ALL_POSITIONS!r} is for padded batches, got the layout "
                f"{self.layout.name!r}; leave mean_logits at True"
            )
        LogpsOptions(
            gradient=self.gradient, eps=self.eps, compute_dtype=self.compute_dtype,
            workspace_bytes=self.workspace_bytes,
        )  # fmt: skip

    def next_gradient(self) -> str:
        """How the gradient of the next call is to be taken; a call without one asks no guard."""
        if self.gradient == "auto" and torch.is_grad_enabled():
            return "exact" if self.guard.gradient() == "exact" else "auto"
        return self.gradient


class HeadCall:
    """One fused call of `owner`'s model: scores the hidden states its head is given."""

    def __init__(
        self,
        owner: ForwardOverride,
        options: FuseOptions,
        head: OutputHead,
        labels: Tensor,
        nll_labels: Tensor | None,
        transform: LogitTransform,
        readings: tuple[LogitTransform, ...] = (),
        *,
        in_rows: RowsCall | None = None,
    ) -> None:
        """`labels` (B, T) are shifted; `readings` of the logit transform are to be checked."""
        self.owner, self.head = owner, head
        self.labels, self.nll_labels = labels, nll_labels
        self.transform = transform
        self.in_rows = in_rows
        self.results: dict[str, Tensor] = {}
        self.certificate: Certificate | None = None
        self.check: SelfCheck | None = None
        self._options, self._readings = options, readings

    def forward(
        self, own: Callable[[Tensor], Tensor], hidden: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Score hidden (B, T, H) and return empty logits (B, T, 0); `own` is the head's forward."""
        self._validate(hidden, [*(type(each).__name__ for each in args), *kwargs])
        hidden = self.head.as_multiplied(hidden.to(self.head.linear.weight.device))
        terms, target = self.head.terms(hidden), self.labels.device
        sets = self.labels if self.nll_labels is None else (self.labels, self.nll_labels)
        groups = None
        if self._options.loss is not None:  # which takes chosen sequences first
            groups = tail_groups(self.labels, Pairing(None, self.labels.shape[0]))
        logps, self.certificate = self._score(
            hidden, terms, sets, self.transform, self._options.compute_dtype, groups
        )
        if self._options.gradient == "auto" and self.certificate is not None:
            self._options.guard.record(self.certificate)
        if isinstance(logps, tuple):
            self.results["nll_token_logps"], logps = logps[1].to(target), logps[0]
        self.results["token_logps"] = logps.to(target)
        if self._options.mean_logits:
            with torch.no_grad():
                self.results["mean_logits"] = self._mean_logits(hidden, terms).to(target)
        # A copy: compilers cannot rebuild an empty view, and FSDP warns of any view.
        empty = logps[..., None][..., :0].to(hidden).clone()
        self.results["logits"] = empty.detach()
        if self._readings and hidden.numel() > 0:
            tokens = _two_tokens(hidden, self.labels)
            self.check = SelfCheck(own, tokens, list(self._readings), self._score_rows)
            followed(empty, self.check.logits)
        return empty

    def tie(self, logits: Tensor) -> None:
        """Let the log-probs depend on `logits`, what the model made of the head's output, by + 0.

        FSDP and ZeRO-3 gather the head's weight for the backward when a gradient reaches the output
        of the head, so one has to.
        """
        zero = logits.flatten()[:0].sum(dtype=torch.float32)
        for name in ("token_logps", "nll_token_logps"):
            if name in self.results:
                self.results[name] = self.results[name] + zero.to(self.results[name].device)

    def _validate(self, hidden: Tensor, extra: list[str]) -> None:
        if extra:
            raise NotImplementedError(
                f"the output head was called with {extra} besides hidden states (adapter_names?): "
                "unsupported by the fused head; leave them out when labels are passed"
            )
        if self.results:
            raise NotImplementedError(
                "the model called its output head twice in one forward; the fused head supports one"
            )
        for name, labels in (("labels", self.labels), ("nll_labels", self.nll_labels)):
            if labels is not None and labels.shape != hidden.shape[:-1]:
                raise ValueError(
                    f"{name} must be (B, T) = {tuple(hidden.shape[:-1])}, like the hidden states, "
                    f"got {tuple(labels.shape)}; pad labels like input_ids"
                )

    def _mean_logits(self, hidden: Tensor, terms: HeadTerms) -> Tensor:
        last = None if self._options.mean_logits == ALL_POSITIONS else -1

        def mean(hidden: Tensor, low_rank: tuple[Tensor, Tensor] | None) -> Tensor:
            hidden_r, weight_r = low_rank or (None, None)
            means: Tensor = _mean_logits(
                hidden[:, :last], terms.weight, terms.bias,
                None if hidden_r is None else hidden_r[:, :last], weight_r,
                *self.transform, self._options.workspace_bytes,
            )  # fmt: skip
            return means

        means = mean(hidden, terms.low_rank)
        if self.in_rows is None:
            return means
        # Rows have no padding: its hidden states are zeros here, its logits the bias alone.
        of_padding: Tensor | float = 0.0
        if terms.bias is not None:
            of_padding = mean(hidden.new_zeros(1, 2, hidden.shape[-1]), None)
        return self.in_rows.token_means(means, of_padding)

    def _score(
        self,
        hidden: Tensor,
        terms: HeadTerms,
        labels: Tensor | tuple[Tensor, Tensor],
        transform: LogitTransform,
        compute_dtype: torch.dtype | None,
        groups: Tensor | None,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Certificate | None]:
        options = LogpsOptions(
            low_rank=terms.low_rank,
            gradient=self._options.next_gradient(),
            eps=self._options.eps,
            tail_groups=groups,
            compute_dtype=compute_dtype,
            workspace_bytes=self._options.workspace_bytes,
            **transform._asdict(),
        )
        return certified_logps(hidden, terms.weight, labels, terms.bias, options)

    def _score_rows(self, hidden: Tensor, labels: Tensor, transform: LogitTransform) -> Tensor:
        # In the head's own dtype: the check is about the transform, not about a chosen rounding.
        logps, _ = self._score(hidden, self.head.terms(hidden), labels, transform, None, None)
        return logps if isinstance(logps, Tensor) else logps[0]


# One node in the graph of a compiler, which would unroll the loops over blocks of the vocabulary.
@torch.library.custom_op("orpo_kernels::head_mean_logits", mutates_args=())
def _mean_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden_r: Tensor | None,
    weight_r: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    workspace_bytes: int | None,
) -> Tensor:
    """(B,) float32 over the T positions of hidden (B, T, H)."""
    options: dict[str, Any] = {
        "logit_scale": logit_scale, "softcap": softcap, "workspace_bytes": workspace_bytes,
    }  # fmt: skip
    if hidden_r is None or weight_r is None:
        return mean_logits(hidden, weight, bias, **options)
    rows = row_mean_logits(hidden, weight, bias, low_rank=(hidden_r, weight_r), **options)
    return rows.sum(1) / max(1, rows.shape[1])


@_mean_logits.register_fake
def _(hidden: Tensor, *_: Any) -> Tensor:
    return hidden.new_empty(hidden.shape[0], dtype=torch.float32)


def _two_tokens(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (1 or 2, H) and labels of the first scored tokens, else of the first token."""
    where = (labels != IGNORE_INDEX).nonzero()[:2]
    # Never put off: ranks that disagreed on whether to check would wait for each other.
    rows, positions = (where if where.numel() else where.new_zeros(1, 2)).unbind(-1)
    tokens = hidden.detach()[rows.to(hidden.device), positions.to(hidden.device)]
    return tokens, labels[rows, positions].clamp(min=0).to(hidden.device)
