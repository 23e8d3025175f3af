"""The public keywords: what they are, their defaults, and what is refused before anything runs.

Every entry (`linear_logps`, `orpo_loss`, `ORPOLoss`, `fuse_head`, `ORPOConfig`, the command line)
checks its arguments with the functions of this file, so that one mistake has one message. The names
and types stand in the typed dictionaries, the defaults in `LogpsOptions`; an entry takes them as
`**options: "Unpack[...]"`, which type checkers read, and shows them by `spelled_out`.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from orpo_kernels.constants import FINE_EPS, IGNORE_INDEX, LARGEST_EPS
from orpo_kernels.engine.gemm import operand_dtype

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
GRADIENTS = ("exact", "sparse", "auto")

Function = TypeVar("Function", bound=Callable[..., Any])


class LogpsSettings(TypedDict, total=False):
    """The keywords of `linear_logps` that stay the same from batch to batch."""

    logit_scale: float
    softcap: float | None
    ignore_index: int
    gradient: str
    eps: float | None
    compute_dtype: torch.dtype | None
    workspace_bytes: int | None


class LogpsKeywords(LogpsSettings, total=False):
    """All keywords of `linear_logps`, which documents them."""

    tail_groups: Tensor | None
    low_rank: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class LogpsOptions:
    """The keywords of `linear_logps`, checked.

    Raises:
        TypeError: a value of another type.
        ValueError: a value out of range.
    """

    logit_scale: float = 1.0
    softcap: float | None = None
    ignore_index: int = IGNORE_INDEX
    gradient: str = "exact"
    eps: float | None = None
    tail_groups: Tensor | None = None
    compute_dtype: torch.dtype | None = None
    workspace_bytes: int | None = None
    low_rank: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        check_choice("gradient", self.gradient, GRADIENTS)
        _check_finite("logit_scale", self.logit_scale)
        if self.gradient == "sparse" and not self.logit_scale > 0:
            raise ValueError(
                f"gradient='sparse' needs a positive logit_scale, got {self.logit_scale}; "
                "use gradient='exact'"
            )
        if self.softcap is not None:
            _check_number("softcap", self.softcap)
            if not 0 < self.softcap < math.inf:
                raise ValueError(
                    f"softcap must be positive and finite, got {self.softcap}; None means no cap"
                )
        check_integer("ignore_index", self.ignore_index)
        check_eps("eps", self.eps)
        check_workspace_bytes(self.workspace_bytes)
        if self.compute_dtype is not None and self.compute_dtype not in FLOATING:
            raise TypeError(
                f"compute_dtype must be floating point, e.g. torch.bfloat16, got "
                f"{self.compute_dtype!r}"
            )
        if self.low_rank is not None:
            _check_pair("low_rank", self.low_rank)

    def eps_of(self, vocabulary: int, *, trains: bool) -> float:
        """The threshold of a head of so many entries, given or the default: a probability."""
        if self.eps is not None:
            return float(self.eps)
        return LARGEST_EPS if trains else min(LARGEST_EPS, FINE_EPS / vocabulary)

    def threshold(self, vocabulary: int, *, trains: bool) -> float:
        """The same for entries `p d` of the gradient on the raw logits: d has the scale in it."""
        return self.eps_of(vocabulary, trains=trains) * float(self.logit_scale)

    def is_sparse(self, dtype: torch.dtype) -> bool:
        """Whether the sparse strategy is taken with GEMMs in `dtype`."""
        if self.gradient == "auto":
            return dtype.itemsize == 2 and self.logit_scale > 0
        return self.gradient == "sparse"


class Certificate(NamedTuple):
    """What the sparse gradient left out, over the scored rows. 0-dim float32 tensors, no graph.

    Attributes:
        kept_share: kept entries, of rows x vocabulary.
        tail_mass: mean over rows of m_t / logit_scale, the probability mass given back by its
            average.
        tail_mass_max: its maximum.
        residual_rms: mean over rows of the root of eps times that of the row, a bound of the root
            of the sum of squares of the probabilities that are not kept.
        residual_rms_max: its maximum.
    """

    kept_share: Tensor
    tail_mass: Tensor
    tail_mass_max: Tensor
    residual_rms: Tensor
    residual_rms_max: Tensor


def spelled_out(keywords: type) -> Callable[[Function], Function]:
    """Let `inspect.signature` and `help` show the names behind `**options` of a function.

    Args:
        keywords: the typed dictionary of the names and types; the defaults are those of
            `LogpsOptions`, None for what it has not.

    Returns:
        A decorator that returns the function itself.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        named = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=getattr(LogpsOptions, name, None),
                annotation=annotation,
            )
            for name, annotation in keywords.__annotations__.items()
        ]
        function.__signature__ = signature.replace(parameters=[*own, *named])  # type: ignore[attr-defined]
        return function

    return decorate


def refuse_unknown(function: Callable[..., Any], given: Mapping[str, Any], keywords: type) -> None:
    """Refuse names among `**given` of a function that its typed dictionary does not have.

    Args:
        function: the entry, whose signature says what else it takes.
        given: what arrived as `**given`.
        keywords: the typed dictionary.

    Raises:
        TypeError: naming the nearest argument.
    """
    for name in given:
        if name not in keywords.__annotations__:
            parameters = inspect.signature(function).parameters
            raise TypeError(
                f"{function.__qualname__.removesuffix('.__init__')} has no argument {name!r}"
                f"{did_you_mean(name, parameters)}; it takes {', '.join(parameters)}"
            )


# What other stacks call the same thing, where no spelling distance would find it.
ELSEWHERE = {
    "alpha": "beta",
    "lambda": "beta",
    "lam": "beta",
    "orpo_alpha": "beta",
    "pref_beta": "beta",
    "rl_beta": "beta",
}


def did_you_mean(name: str, known: Iterable[str], elsewhere: Mapping[str, str] = ELSEWHERE) -> str:
    """`"; did you mean 'x'?"`, x the nearest of `known`, or nothing if none is near.

    `elsewhere` has names that are near in meaning.
    """
    choices, other = list(known), elsewhere.get(name)
    near = [other] if other in choices else difflib.get_close_matches(name, choices, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def check_choice(name: str, value: object, choices: tuple[str | None, ...]) -> None:
    """Refuse a value that is not among the choices.

    Raises:
        ValueError: naming them, and the nearest.
    """
    if value not in choices:
        names = [choice for choice in choices if choice is not None]
        near = did_you_mean(value, names) if isinstance(value, str) else ""
        raise ValueError(f"{name} must be one of {choices}, got {value!r}{near}")


def check_beta(beta: object) -> None:
    """Refuse a weight of the odds-ratio term that is no finite number >= 0.

    Raises:
        TypeError: not a number.
        ValueError: negative, infinite or NaN.
    """
    if not 0 <= _check_number("beta", beta) < math.inf:
        raise ValueError(
            f"beta must be a finite number >= 0, got {beta!r}; 0.1 is the usual value, 0 trains on "
            "the chosen answers alone"
        )


def check_eps(name: str, eps: object) -> None:
    """Refuse a threshold of the sparse gradient that is neither None nor a probability.

    Raises:
        TypeError: not a number.
        ValueError: outside [0, 1].
    """
    if eps is not None and not 0 <= _check_number(name, eps) <= 1:
        raise ValueError(f"{name} must be a probability, from 0 to 1, got {eps!r}")


def check_workspace_bytes(workspace_bytes: object) -> None:
    """Refuse a budget that is neither None nor a positive whole number of bytes.

    Raises:
        TypeError: not an integer.
        ValueError: below 1.
    """
    if workspace_bytes is not None:
        check_integer("workspace_bytes", workspace_bytes, least=1)


def check_integer(name: str, value: object, least: int | None = None) -> None:
    """Refuse what is not an integer, or is one below `least`.

    Raises:
        TypeError: not an integer; True and 1.0 are none.
        ValueError: too small.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, got {_described(value)}; write int(...)")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False.

    Raises:
        TypeError: so it is.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_described(value)}")


def _check_finite(name: str, value: object) -> None:
    # Not math.isfinite: Dynamo cannot trace it on a number that is an input.
    if not -math.inf < _check_number(name, value) < math.inf:
        raise ValueError(f"{name} must be finite, got {value!r}")


def _check_number(name: str, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {_described(value)}; write float(...)")
    return value


def _check_pair(name: str, value: object) -> None:
    tensors = [isinstance(each, Tensor) for each in value] if isinstance(value, tuple) else []
    if tensors != [True, True]:
        raise TypeError(f"{name} must be a tuple of two tensors, got {type(value).__name__}")


def _described(value: object) -> str:
    return f"a {type(value).__name__}" if isinstance(value, Tensor) else repr(value)


def validate_labels(name: str, labels: object) -> None:
    """Refuse labels, or ids, that are not a tensor of integers, before anything is cast.

    Args:
        name: what the message calls them.
        labels: any shape.

    Raises:
        TypeError: not a tensor, or a mask, or floating point.
    """
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be an integer tensor, got {type(labels).__name__}")
    if labels.dtype == torch.bool:
        raise TypeError(
            f"{name} must be integer token ids, got a mask (torch.bool); write "
            "torch.where(mask, input_ids, -100)"
        )
    if labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{name} must be integer, got {labels.dtype}; write .long()")


def validate_operands(
    hidden: Tensor,
    weight: Tensor,
    label_sets: tuple[Tensor, ...],
    bias: Tensor | None,
    options: LogpsOptions,
) -> None:
    """Refuse dtypes and shapes that `linear_logps` cannot take."""
    low_rank = options.low_rank
    low = {} if low_rank is None else {"low_rank[0]": low_rank[0], "low_rank[1]": low_rank[1]}
    floating = {"hidden": hidden, "weight": weight, "bias": bias, **low}
    for name, tensor in floating.items():
        if tensor is not None and tensor.dtype not in FLOATING:
            hint = "; dequantise the head first" if name == "weight" else ""
            raise TypeError(
                f"{name} must be floating point, 16 to 64 bits, got {tensor.dtype}{hint}"
            )
    if weight.ndim != 2 or hidden.ndim < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            "hidden must be (..., H) and weight (V, H), got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}; weight is not transposed"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be (V,) = ({weight.shape[0]},), got {tuple(bias.shape)}")
    if low_rank is not None:
        expected = (*hidden.shape[:-1], low_rank[1].shape[-1])
        if low_rank[0].shape != expected or low_rank[1].shape[:-1] != weight.shape[:1]:
            raise ValueError(
                "low_rank must be (hidden_r (..., r), weight_r (V, r)), got "
                f"{tuple(low_rank[0].shape)} and {tuple(low_rank[1].shape)}"
            )
    _validate_label_sets(hidden, label_sets)
    if options.tail_groups is not None:
        _validate_groups(options.tail_groups, label_sets[0])


def _validate_label_sets(hidden: Tensor, label_sets: tuple[Tensor, ...]) -> None:
    if len(label_sets) not in (1, 2):
        raise ValueError(f"labels must be a tensor or a tuple of two, got {len(label_sets)}")
    for labels in label_sets:
        if not isinstance(labels, Tensor):
            raise TypeError(
                f"labels must be a tensor or a tuple of two, got {type(labels).__name__}"
            )
        validate_labels("labels", labels)
        if labels.shape != hidden.shape[:-1]:
            raise ValueError(
                f"labels must have the shape of hidden without H, {tuple(hidden.shape[:-1])}, got "
                f"{tuple(labels.shape)}; labels are shifted: labels[t] is scored from hidden[t]"
            )


def _validate_groups(groups: Tensor, labels: Tensor) -> None:
    if not isinstance(groups, Tensor) or groups.is_floating_point() or groups.is_complex():
        given = groups.dtype if isinstance(groups, Tensor) else type(groups).__name__
        raise TypeError(f"tail_groups must be integer, 0 or 1, got {given}")
    if groups.shape != labels.shape:
        raise ValueError(
            f"tail_groups must have the shape of labels, {tuple(labels.shape)}, got "
            f"{tuple(groups.shape)}"
        )


def refuse_forward_mode(*tensors: Tensor | None) -> None:
    """Refuse inputs with a tangent: an op without forward-mode formula gives a tangent of 0."""
    if getattr(forward_ad, "_current_level", -1) < 0:
        return
    for tensor in tensors:
        if tensor is None:
            continue
        dual = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
        if dual.tangent is not None:
            raise NotImplementedError("linear_logps has no forward-mode derivative; use backward")


def choose_compute_dtype(hidden: Tensor, weight: Tensor, asked: torch.dtype | None) -> torch.dtype:
    """Dtype of the GEMM operands: what is asked for, autocast's, or the promoted one.

    Float32 in place of a dtype that the device multiplies more slowly.
    """
    kind = weight.device.type
    dtype = asked
    if dtype is None:
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        if torch.is_autocast_enabled(kind) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
    return operand_dtype(weight.device, dtype)
