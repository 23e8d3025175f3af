"""How far sparse gradients are from the true ones: what `sparse/test_accuracy.py` judges.

    python -m tests.engine.sparse_accuracy

prints the table of docs/sparse.md. To judge one more implementation, add it to `METHODS`: a
function of (hidden, weight, labels, a, groups, eps) that returns (dhidden, dweight) of
`sum a_t logp_t`, with the limits of the form of the definition that it implements. Errors are
relative to float64 on the same numbers.
"""

import functools
import itertools
import math
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from orpo_kernels import reference
from tests.engine.softmax_profile import HEADS, Problem, Profile, load, names, problem

Gradients = tuple[Tensor, Tensor]
Function = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Gradients]
Rows = Callable[[Tensor, Tensor, float], Tensor]

FAST, DEFAULT, FINE = EPS = (2.0**-10, 2.0**-12, 2.0**-14)


class Errors(NamedTuple):
    """Relative errors, Frobenius norms.

    `bias` is that of the sum of dhidden over the rows of a group, the worse of the two: errors of
    single rows average out over a step, this one does not. `rare` is that of the rows of dweight
    whose token no row has as label or gives more than eps.
    """

    dhidden: float
    bias: float
    dweight: float
    rare: float = math.inf


class Method(NamedTuple):
    """A way to compute the gradients, and what it must reach: by head, by eps."""

    function: Function
    limits: dict[str, dict[float, Errors]]
    uses_eps: bool = True


class Truth(NamedTuple):
    """The gradients in float64, and of each token the largest of its entries (label: 1)."""

    dhidden: Tensor
    dweight: Tensor
    largest: Tensor


def truth(inputs: Problem) -> Truth:
    """By autograd through the whole logits."""
    hidden, weight = (x.double().requires_grad_() for x in (inputs.hidden, inputs.weight))
    logps = reference.linear_logps(hidden, weight, inputs.labels)
    dhidden, dweight = torch.autograd.grad(logps, (hidden, weight), inputs.a.double())
    p = torch.softmax(inputs.hidden.float() @ inputs.weight.float().t(), 1)
    return Truth(dhidden, dweight, p.amax(0).index_fill(0, inputs.labels, 1.0))


def measure(method: Method, inputs: Problem, true: Truth, eps: float) -> Errors:
    """The errors of a method."""
    dhidden, dweight = method.function(*inputs, eps)
    sums = (
        (found.double()[inputs.groups == group].sum(0) for found in (dhidden, true.dhidden))
        for group in range(2)
    )
    rare = true.largest <= eps
    return Errors(
        _relative(dhidden, true.dhidden),
        max(_relative(*both) for both in sums),
        _relative(dweight, true.dweight),
        _relative(dweight[rare], true.dweight[rare]),
    )


def _relative(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())


def approximating(rows: Rows) -> Function:
    """The function that puts `rows(entries, groups, eps)` in the place of the softmax entries."""

    def function(
        hidden: Tensor, weight: Tensor, labels: Tensor, a: Tensor, groups: Tensor, eps: float
    ) -> Gradients:
        entries = torch.softmax(hidden @ weight.t(), 1).scatter_(1, labels[:, None], 0.0)
        share = entries.sum(1, keepdim=True)  # 1 - p_y: the label is exact
        gradient = -rows(entries, groups, eps)
        gradient.scatter_add_(1, labels[:, None], share).mul_(a[:, None])
        return gradient @ weight, gradient.t() @ hidden

    return function


def _dense(entries: Tensor, groups: Tensor, eps: float) -> Tensor:
    return entries.bfloat16().to(entries.dtype)


def _drop_entries(entries: Tensor, groups: Tensor, eps: float) -> Tensor:
    return entries.where(entries > eps, 0.0)


def _drop_columns(entries: Tensor, groups: Tensor, eps: float) -> Tensor:
    ones = torch.ones_like(entries[:, :1])
    return reference.softmax_compact(entries, ones, groups, eps=eps, block=64).kept


def _drop_tiles(entries: Tensor, order: Tensor, eps: float) -> Tensor:
    """Tiles of 128 x 128 without an entry over eps, columns in descending `order`, are skipped."""
    columns = order.argsort(descending=True)
    ordered = entries[:, columns]
    for rows in ordered.split(128):
        for tile in rows.split(128, dim=1):
            if not (tile > eps).any():
                tile.zero_()
    return torch.empty_like(entries).index_copy_(1, columns, ordered)


def _drop_tiles_by_logit(entries: Tensor, groups: Tensor, eps: float) -> Tensor:
    """What Apple CCE skips."""
    return _drop_tiles(entries, entries.log().clamp(min=-80.0).mean(0), eps)


def _drop_tiles_by_probability(entries: Tensor, groups: Tensor, eps: float) -> Tensor:
    return _drop_tiles(entries, entries.mean(0), eps)


def _dropped_mass(entries: Tensor, groups: Tensor, eps: float) -> Tensor:
    """The mass of a row is what it dropped, instead of what its rounded kept entries lack."""
    ones = torch.ones_like(entries[:, :1])
    kept, mask, tail = reference.softmax_compact(
        entries, ones, groups, eps=eps, block=64, rounding=torch.bfloat16
    )
    mass = entries.masked_fill(mask, 0.0).sum(1, keepdim=True)
    return kept + mass * (tail / tail.sum(1, keepdim=True))[groups]


def definition(block: int, rounding: torch.dtype | None, columns: int | None = None) -> Function:
    """`reference.sparse_gradients`."""

    def function(
        hidden: Tensor, weight: Tensor, labels: Tensor, a: Tensor, groups: Tensor, eps: float
    ) -> Gradients:
        found = reference.sparse_gradients(
            hidden, weight, (labels,), (a,),
            eps=eps, groups=groups, block=block, columns=columns, rounding=rounding,
        )  # fmt: skip
        return found.dhidden, found.dweight

    return function


def _limits(*by_eps: tuple[float, float, float]) -> dict[float, Errors]:
    return {eps: Errors(*figures) for eps, figures in zip(EPS, by_eps, strict=True)}


# The table of docs/sparse.md and a tenth: the rows and the noise of the head move the last digit.
COLUMNS = {
    "i.i.d.": _limits((2.8e-3, 9e-4, 2.6e-3), (1e-3, 5e-4, 9.2e-4), (4.2e-4, 4e-4, 4e-4)),
    "common mean": _limits((2.8e-3, 9e-4, 2.6e-3), (1e-3, 5e-4, 9.2e-4), (4.2e-4, 4e-4, 4e-4)),
    "tilted": _limits((6.7e-3, 2e-3, 2.6e-3), (2.8e-3, 8e-4, 9.2e-4), (8.9e-4, 5e-4, 4e-4)),
}
ENTRIES = {
    "i.i.d.": _limits((4.3e-3, 2e-3, 3.9e-3), (1.65e-3, 1e-3, 1.4e-3), (6.5e-4, 5e-4, 5e-4)),
    "common mean": _limits((4.3e-3, 2e-3, 3.9e-3), (1.6e-3, 1e-3, 1.4e-3), (6.1e-4, 5e-4, 5e-4)),
    "tilted": _limits((1.25e-2, 3e-3, 3.9e-3), (6.2e-3, 2e-3, 1.4e-3), (2.3e-3, 1e-3, 5e-4)),
}
# Blocks of 8,192 columns, each by the sum of exponentials so far: the tail is not quite the mean
# of what is dropped, which shows in the bias where tails differ most.
ONE_LOOK = ENTRIES | {
    "tilted": _limits((1.25e-2, 7e-3, 3.9e-3), (6.2e-3, 3.6e-3, 1.4e-3), (2.3e-3, 1.3e-3, 5e-4))
}
# Without limits: what the others do, to compare with.
METHODS = {
    "dense, bf16": Method(approximating(_dense), {}, uses_eps=False),
    "drop entries": Method(approximating(_drop_entries), {}),
    "drop columns of 64 rows": Method(approximating(_drop_columns), {}),
    "drop tiles, by mean logit": Method(approximating(_drop_tiles_by_logit), {}),
    "drop tiles, by probability": Method(approximating(_drop_tiles_by_probability), {}),
    "columns of 64 rows, bf16, dropped mass": Method(approximating(_dropped_mass), {}),
    "columns of 64 rows, bf16": Method(definition(64, torch.bfloat16), COLUMNS),
    "entries, float32": Method(definition(1, None), ENTRIES),
    "entries, float32, one look": Method(definition(1, None, 8192), ONE_LOOK),
}


@functools.cache
def errors(name: str, head: str, title: str, eps: float) -> Errors:
    """Of `METHODS[title]` on rows `name`, `head`."""
    return measure(METHODS[title], *_prepared(name, head), eps)


@functools.cache
def _prepared(name: str, head: str) -> tuple[Problem, Truth]:
    inputs = problem(_profile(name), head)
    return inputs, truth(inputs)


@functools.lru_cache(maxsize=1)
def _profile(name: str) -> Profile:
    return load(name)


def main() -> int:
    """Print the table."""
    lines = ["| rows | head | | eps | dhidden | bias | dweight | rare |", "|---" * 8 + "|"]
    for name, head, (title, method) in itertools.product(names(), HEADS, METHODS.items()):
        for eps in EPS if method.uses_eps else EPS[:1]:
            found = errors(name, head, title, eps)
            power = f"2^{math.log2(eps):.0f}" if method.uses_eps else ""
            lines.append(
                f"| {name} | {head} | {title} | {power} | {found.dhidden:.2e} | "
                f"{100 * found.bias:.3f} % | {found.dweight:.2e} | {found.rare:.2f} |"
            )
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
