"""What a fused model returns: the model's own output type, with log-probs and the loss on it.

Outputs are taken apart and built again on their way to the user: by DDP and FSDP, by accelerate
when it gathers, pads or casts, by `Trainer.predict`, by pickle and `copy.deepcopy`. All of them
rebuild dictionaries of tensors and none of them every NamedTuple, so an output holds the terms of
the loss as such a dictionary, `orpo_terms`, and shows them as `ORPOOutput` under `orpo`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field, make_dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from orpo_kernels.integrations.call import HeadCall
from orpo_kernels.loss import ORPOLoss
from orpo_kernels.loss_output import ORPOOutput
from orpo_kernels.options import Certificate
from orpo_kernels.pair_batch import pair_output

_FIELDS = ("token_logps", "nll_token_logps", "mean_logits", "orpo_terms", "layout_terms")
_PER_PAIR = (
    "chosen_logps", "rejected_logps", "log_odds_ratio", "chosen_rewards", "rejected_rewards",
    "pair_mask",
)  # fmt: skip
_SPARSE = "sparse_"
_COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")  # the second is JetMoe's


class _FusedFields:
    """The part that fused outputs of every model have in common."""

    _unfused_type: ClassVar[type[ModelOutput]]
    orpo_terms: Mapping[str, Tensor] | None

    @property
    def orpo(self) -> ORPOOutput | None:
        """The terms of the loss; None if the head was fused without one."""
        terms = self.orpo_terms
        if terms is None:
            return None
        names = [name for name in ORPOOutput._fields if name in terms]
        values: dict[str, Any] = {
            n: terms[n] if n in _PER_PAIR else terms[n].squeeze(0) for n in names
        }
        if _SPARSE + Certificate._fields[0] not in terms:
            return ORPOOutput(**values)
        left_out = (terms[_SPARSE + name].squeeze(0) for name in Certificate._fields)
        return ORPOOutput(**values, sparse=Certificate(*left_out))

    def __reduce__(self) -> tuple[Any, ...]:
        # The type is made at run time: pickle would look for it by name.
        return _rebuilt, (self._unfused_type, dict(self.items()))  # type: ignore[attr-defined]


def fused_output(
    model: nn.Module,
    output: ModelOutput,
    call: HeadCall,
    loss: ORPOLoss | None,
    *,
    in_pairs: bool,
    num_nll_tokens: Tensor | int | None,
    num_pairs: Tensor | int | None,
) -> ModelOutput:
    """The model's output with what `call` computed, as a subclass of its own type.

    `in_pairs`: what there is of each sequence, (2P, ...), is returned as (P, 2, ...).
    """
    results = pair_output(call.results) if in_pairs else call.results
    fields: dict[str, Any] = {**output, **results}
    if call.in_rows is not None:
        fields["layout_terms"] = call.in_rows.terms
    if loss is not None:
        orpo = loss.from_logps(
            call.results["token_logps"],
            call.labels,
            call.results.get("nll_token_logps"),
            call.nll_labels,
            num_nll_tokens=num_nll_tokens,
            num_pairs=num_pairs,
        )._replace(sparse=call.certificate)
        fields["orpo_terms"], fields["loss"] = _orpo_terms(orpo), orpo.loss
        aux_loss = fields.get("aux_loss")
        if isinstance(aux_loss, Tensor):
            share = router_aux_loss_coef(model)
            if num_pairs is not None:  # this micro-batch's share of the step's
                pairs = orpo.pair_mask.sum()
                share = share * pairs / torch.as_tensor(num_pairs, device=pairs.device).clamp(min=1)
            fields["loss"] = orpo.loss + share * aux_loss.to(orpo.loss.device)
    return _fused_type(type(output))(**fields)  # type: ignore[no-any-return]


def router_aux_loss_coef(model: nn.Module) -> Any:
    """The model's own coefficient, where its class or config keeps it."""
    config = getattr(model, "config", None)
    for source in (model, config, getattr(config, "text_config", None)):
        for name in _COEFFICIENTS:
            value = getattr(source, name, None)
            if value is not None:
                return float(value)
    return 0.0


def _orpo_terms(orpo: ORPOOutput) -> dict[str, Tensor]:
    """The terms as a flat dictionary; scalars as (1,), which gathering can slice and concatenate.

    Args:
        orpo: the terms of P pairs.

    Returns:
        (P,) or (1,) tensors by the names of `ORPOOutput`, and of its certificate with "sparse_"
        before them.
    """
    terms = orpo._asdict()
    sparse = terms.pop("sparse")
    if sparse is not None:
        terms |= {_SPARSE + name: value for name, value in sparse._asdict().items()}
    return {name: term if name in _PER_PAIR else term[None] for name, term in terms.items()}


_TYPES: dict[type[ModelOutput], type[ModelOutput]] = {}


# Called while a graph is traced: a compiler can neither make a type nor watch a table of types.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _fused_type(base: type[ModelOutput]) -> type[ModelOutput]:
    """`base` with the fields of a fused call."""
    if base not in _TYPES:
        fields = [(name, Any, field(default=None)) for name in _FIELDS]
        made = make_dataclass(
            f"Fused{base.__name__}",
            fields,
            bases=(_FusedFields, base),
            namespace={"_unfused_type": base, "__module__": __name__},
        )
        _TYPES.setdefault(base, made)  # another thread's first call may have been faster
    return _TYPES[base]


def _rebuilt(base: type[ModelOutput], values: dict[str, Any]) -> ModelOutput:
    return _fused_type(base)(**values)  # type: ignore[no-any-return]
