"""The ORPO loss: composition over the token log-probs and the pair term.

    loss = nll + beta * mean over pairs of or_loss
    nll  = mean of -logp over the NLL tokens of the chosen answers ("token"), or the mean over pairs
           of each one's mean ("pair")

Stacked sequences, chosen first: sequence i is paired with sequence P + i. A pair with a side that
has no scored token contributes exactly 0, its NLL included, and is counted in `skipped_pairs`.

Source: arXiv 2403.07691, equations 5 to 7.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from orpo_kernels.constants import IGNORE_INDEX
from orpo_kernels.linear_logps import certified_logps
from orpo_kernels.loss_output import ORPOOutput
from orpo_kernels.options import (
    LogpsKeywords,
    LogpsOptions,
    LogpsSettings,
    check_choice,
    refuse_unknown,
    spelled_out,
    validate_labels,
)
from orpo_kernels.pair_loss import pair_loss
from orpo_kernels.pairing import (
    BatchKeywords,
    CallKeywords,
    Pairing,
    Weighting,
    as_int64,
    check_log_probs,
    check_nll_labels,
    chosen_only,
    count_on,
    pairing_of,
    tail_groups,
)
from orpo_kernels.presets import NLL_SCOPES, PRESETS
from orpo_kernels.sequence_mean import sequence_mean

if TYPE_CHECKING:
    from typing_extensions import Unpack


@spelled_out(LogpsKeywords)
def orpo_loss(  # noqa: PLR0913 - the public signature
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    nll_labels: Tensor | None = None,
    beta: float = 0.1,
    nll: bool = True,
    nll_reduction: str = "token",
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    num_nll_tokens: Tensor | int | None = None,
    num_pairs: Tensor | int | None = None,
    **options: "Unpack[LogpsKeywords]",
) -> ORPOOutput:
    """The ORPO loss of preference pairs, from hidden states, without logits.

    Args:
        hidden: (2P, T, H), chosen first; or packed (N, H) with `sequence_ids`. Floating.
        weight: (V, H) floating, the output projection.
        labels: (2P, T) or (N,) integer, already shifted: `labels[s, t]` is scored from
            `hidden[s, t]`. The tokens of the odds ratio; `ignore_index` elsewhere.
        bias: (V,) floating.
        nll_labels: like `labels`, or its chosen half (P, T): the tokens of the NLL, when they are
            others (TRL scores prompt + completion). Rejected rows are ignored. Default: `labels`.
        beta: weight of the odds-ratio term (the paper's lambda).
        nll: whether the NLL is a part of the loss. False: the loss is `beta * or_loss`, and
            `nll_loss` is reported only.
        nll_reduction: "token" (mean over NLL tokens) or "pair" (mean over pairs of their means).
        sequence_ids: (N,) integer in [0, 2P) when packed; sequence i is paired with P + i.
        num_sequences: 2P; needed when packed, where the ids cannot tell it: a sequence without a
            token, the last one say, has no id, and its pair would be another.
        num_nll_tokens: what the NLL is divided by, default this batch's count. Give the count over
            all micro-batches (see `count_terms`) and their gradients sum to the large batch's.
        num_pairs: the same for the pair term, and for the NLL when `nll_reduction="pair"`.
        **options: of `linear_logps`, which documents them. Here `tail_groups` are by default two,
            the chosen sequences and the rejected ones.

    Returns:
        `ORPOOutput`.

    Raises:
        ValueError: an odd number of sequences, packed ones without `num_sequences`, shapes that do
            not match, a value out of range, and what `linear_logps` raises.
        TypeError: an unknown option, labels or ids that are not integer, and what `linear_logps`
            raises.

    Note:
        Peak memory beyond inputs and gradients: `workspace_bytes`, whatever T and V. Deterministic.

    Source:
        arXiv 2403.07691, equations 5 to 7.
    """
    refuse_unknown(orpo_loss, options, LogpsKeywords)
    scoring = LogpsOptions(**options)
    weighting = Weighting(beta, nll_reduction, num_nll_tokens, num_pairs, nll)
    others = None if nll_labels is labels else nll_labels
    labels = as_int64("labels", labels)
    pairing = pairing_of(labels, sequence_ids, num_sequences)
    if scoring.tail_groups is None and scoring.gradient != "exact":
        scoring = replace(scoring, tail_groups=tail_groups(labels, pairing))
    label_sets: Tensor | tuple[Tensor, Tensor] = labels
    if others is not None:
        others = check_nll_labels(others, labels, pairing)
        others = chosen_only(others, labels, pairing, scoring.ignore_index)
        label_sets = (labels, others)
    logps, certificate = certified_logps(hidden, weight, label_sets, bias, scoring)
    token_logps, nll_token_logps = logps if isinstance(logps, tuple) else (logps, None)
    second = None if nll_token_logps is None or others is None else (nll_token_logps, others)
    output = _output(token_logps, labels, second, scoring.ignore_index, pairing, weighting)
    return output._replace(sparse=certificate)


def orpo_loss_from_logps(  # noqa: PLR0913 - as orpo_loss
    token_logps: Tensor,
    labels: Tensor,
    nll_token_logps: Tensor | None = None,
    nll_labels: Tensor | None = None,
    *,
    beta: float = 0.1,
    nll: bool = True,
    nll_reduction: str = "token",
    ignore_index: int = IGNORE_INDEX,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
    num_nll_tokens: Tensor | int | None = None,
    num_pairs: Tensor | int | None = None,
) -> ORPOOutput:
    """The ORPO loss when the token log-probs are already there (the fused head computes them).

    Args:
        token_logps: (2P, T) or packed (N,) floating, log-probs of `labels`, nats.
        labels: same shape; says which tokens count, the ids do not matter.
        nll_token_logps: same shape, log-probs of `nll_labels`; default: `token_logps`.
        nll_labels: same shape; default: `labels`.
        beta: as in `orpo_loss`, and so are the other arguments.
        nll: as in `orpo_loss`.
        nll_reduction: as in `orpo_loss`.
        ignore_index: label of positions that do not count.
        sequence_ids: as in `orpo_loss`.
        num_sequences: as in `orpo_loss`.
        num_nll_tokens: as in `orpo_loss`.
        num_pairs: as in `orpo_loss`.

    Returns:
        `ORPOOutput`.

    Raises:
        TypeError: labels or ids that are not integer, log-probs that are not floating point.
        ValueError: an odd number of sequences, packed ones without `num_sequences`, shapes that do
            not match, a value out of range.
    """
    weighting = Weighting(beta, nll_reduction, num_nll_tokens, num_pairs, nll)
    if (nll_token_logps is None) != (nll_labels is None):
        raise ValueError("nll_token_logps and nll_labels go together: give both, or neither")
    labels = as_int64("labels", labels)
    pairing = pairing_of(labels, sequence_ids, num_sequences)
    check_log_probs("token_logps", token_logps, labels)
    second = None
    if nll_token_logps is not None and nll_labels is not None:
        second = (nll_token_logps, check_nll_labels(nll_labels, labels, pairing))
        check_log_probs("nll_token_logps", nll_token_logps, labels)
    return _output(token_logps, labels, second, ignore_index, pairing, weighting)


def _output(
    token_logps: Tensor,
    labels: Tensor,
    second: tuple[Tensor, Tensor] | None,
    ignore_index: int,
    pairing: Pairing,
    weighting: Weighting,
) -> ORPOOutput:
    """The loss of checked log-probs and labels; `second` are the NLL's if they are others."""
    dtype = torch.promote_types(token_logps.dtype, torch.float32)
    if second is not None:
        dtype = torch.promote_types(dtype, second[0].dtype)
        second = (second[0].to(dtype), second[1])
    mean, count = sequence_mean(
        token_logps.to(dtype), labels, second, ignore_index=ignore_index, **pairing._asdict()
    )
    found = pair_loss(
        mean, count, beta=weighting.beta, by_token=weighting.nll_reduction == "token",
        nll=weighting.nll,
        num_nll_tokens=count_on(mean.device, weighting.num_nll_tokens),
        num_pairs=count_on(mean.device, weighting.num_pairs),
    )  # fmt: skip
    chosen, rejected = mean[0].detach().chunk(2)
    chosen_rewards, rejected_rewards = found.rewards.chunk(2)
    nll_loss, or_loss = found.parts.unbind()
    skipped_pairs, clamped_logps, nll_tokens = found.counts.unbind()
    return ORPOOutput(
        loss=found.loss,
        nll_loss=nll_loss,
        or_loss=or_loss,
        chosen_logps=chosen,
        rejected_logps=rejected,
        log_odds_ratio=found.log_odds_ratio,
        chosen_rewards=chosen_rewards,
        rejected_rewards=rejected_rewards,
        skipped_pairs=skipped_pairs,
        clamped_logps=clamped_logps,
        pair_mask=found.pair_mask,
        num_nll_tokens=nll_tokens,
    )


def count_terms(
    labels: Tensor,
    nll_labels: Tensor | None = None,
    *,
    ignore_index: int = IGNORE_INDEX,
    sequence_ids: Tensor | None = None,
    num_sequences: int | None = None,
) -> tuple[Tensor, Tensor]:
    """What the loss of this batch divides by: sum these over micro-batches for exact accumulation.

    Args:
        labels: (2P, T) or packed (N,), already shifted.
        nll_labels: as in `orpo_loss`.
        ignore_index: label of positions that are not scored.
        sequence_ids: as in `orpo_loss`.
        num_sequences: as in `orpo_loss`.

    Returns:
        num_nll_tokens and num_pairs, 0-dim int64; pairs with an empty side are in neither.

    Raises:
        ValueError: as `orpo_loss`.
    """
    validate_labels("labels", labels)
    zeros = torch.zeros(labels.shape, device=labels.device)
    output = orpo_loss_from_logps(
        zeros, labels, None if nll_labels is None else zeros, nll_labels,
        ignore_index=ignore_index, sequence_ids=sequence_ids, num_sequences=num_sequences,
    )  # fmt: skip
    return output.num_nll_tokens, output.pair_mask.sum()


class ORPOLoss(nn.Module):
    """`orpo_loss` as a module: the options once, tensors per call.

    Args:
        beta: weight of the odds-ratio term.
        nll_reduction: "token" or "pair".
        nll_scope: which tokens of the chosen sequence the NLL scores, whatever a batch brings.
            "completion": those of `labels`; `nll_labels` are not needed, nor used.
            "prompt+completion": those of `nll_labels`; a batch without is refused. None: those of
            `nll_labels` in a batch that has them, else those of `labels`.
        nll: as in `orpo_loss`.
        **options: of `linear_logps`, which documents them; its tensors are arguments of a call.

    Raises:
        TypeError: an unknown option, or a value of another type.
        ValueError: a value out of range.
    """

    @spelled_out(LogpsSettings)
    def __init__(
        self,
        beta: float = 0.1,
        nll_reduction: str = "token",
        nll_scope: str | None = None,
        nll: bool = True,
        **options: "Unpack[LogpsSettings]",
    ) -> None:
        super().__init__()
        refuse_unknown(type(self), options, LogpsSettings)
        LogpsOptions(**options)  # these two refuse what is out of range
        Weighting(beta, nll_reduction, nll=nll)
        check_choice("nll_scope", nll_scope, (None, *NLL_SCOPES))
        self.beta = beta
        self.nll_reduction = nll_reduction
        self.nll_scope = nll_scope
        self.nll = nll
        self.options = options

    @classmethod
    @spelled_out(LogpsSettings)
    def from_preset(
        cls, name: str, beta: float = 0.1, **options: "Unpack[LogpsSettings]"
    ) -> "ORPOLoss":
        """The loss of a stack in `PRESETS`, with its reduction and its scope of the NLL.

        Raises:
            TypeError: as the class.
            ValueError: an unknown name, labels only a collator can make ("xfactlab"), and so on.
        """
        check_choice("preset", name, tuple(PRESETS))
        refuse_unknown(cls.from_preset, options, LogpsSettings)
        preset = PRESETS[name]
        if preset.nll_scope not in NLL_SCOPES or preset.odds_scope != "completion":
            raise ValueError(
                f"the preset {name!r} is a matter of the labels, which the loss cannot tell from "
                f"others: make them with PreferenceCollator(nll_scope={preset.nll_scope!r}, "
                f"odds_scope={preset.odds_scope!r}) and take ORPOLoss(beta, "
                f"{preset.nll_reduction!r}, 'prompt+completion'); ORPOConfig(preset={name!r}) does"
            )
        return cls(beta, preset.nll_reduction, preset.nll_scope, **options)

    def nll_labels_of(self, nll_labels: Tensor | None) -> Tensor | None:
        """The labels of the NLL that have to be scored beside `labels`, of a batch's `nll_labels`.

        Args:
            nll_labels: (2P, T) or (N,), or None where the batch has none.

        Returns:
            The same, or None where `labels` are all the NLL needs.

        Raises:
            ValueError: the prompt's tokens are to be scored, and the batch does not have them.
        """
        if self.nll_scope == "completion":
            return None
        if self.nll_scope is not None and nll_labels is None:
            raise ValueError(
                f"the NLL of nll_scope={self.nll_scope!r} needs nll_labels, the tokens of the "
                "chosen prompt and answer: labels have the answer's only. PreferenceCollator makes "
                "them unless its nll_scope is 'completion'; for the answers alone that is the "
                "loss's nll_scope too, as in the preset 'llamafactory'"
            )
        return nll_labels

    @spelled_out(CallKeywords)
    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        nll_labels: Tensor | None = None,
        **batch: "Unpack[CallKeywords]",
    ) -> ORPOOutput:
        """See `orpo_loss`."""
        refuse_unknown(self.forward, batch, CallKeywords)
        return orpo_loss(
            hidden, weight, labels, bias, nll_labels=self.nll_labels_of(nll_labels),
            beta=self.beta, nll=self.nll, nll_reduction=self.nll_reduction, **batch, **self.options,
        )  # fmt: skip

    @spelled_out(BatchKeywords)
    def from_logps(
        self,
        token_logps: Tensor,
        labels: Tensor,
        nll_token_logps: Tensor | None = None,
        nll_labels: Tensor | None = None,
        **batch: "Unpack[BatchKeywords]",
    ) -> ORPOOutput:
        """See `orpo_loss_from_logps`."""
        refuse_unknown(self.from_logps, batch, BatchKeywords)
        needed = self.nll_labels_of(nll_labels)
        if nll_labels is not needed:
            nll_token_logps = None
        return orpo_loss_from_logps(
            token_logps, labels, nll_token_logps, needed,
            beta=self.beta, nll=self.nll, nll_reduction=self.nll_reduction,
            ignore_index=self.options.get("ignore_index", IGNORE_INDEX), **batch,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The options, for `print(model)`."""
        others = {"nll_scope": (self.nll_scope, None), "nll": (self.nll, True)}
        named = {name: value for name, (value, usual) in others.items() if value != usual}
        options = {"beta": self.beta, "nll_reduction": self.nll_reduction, **named, **self.options}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())
