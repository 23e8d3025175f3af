"""Checks of `linear_logps`, by path through the engine, and of what holds for any input."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orpo_kernels import reference
from orpo_kernels.constants import IGNORE_INDEX
from orpo_kernels.engine.budget import TooSmallError
from orpo_kernels.linear_logps import linear_logps
from orpo_kernels.selftest.figures import (
    Case,
    Figure,
    Setting,
    exact,
    gradients_of,
    largest,
    like_torch,
)

# V = 2,053 is a prime, of three blocks in the smallest workspace. A tenth of the rows is unscored.
ROWS, HIDDEN, VOCABULARY = 40, 48, 2053
WIDE = 8209  # the first prime over the 8,192 columns that a program of a GPU holds
WHOLE = 2048  # as most vocabularies are: in whole tiles of every kernel


class Variant(NamedTuple):
    """What a check of linear_logps asks for."""

    name: str
    trains: tuple[bool, bool] = (True, True)  # hidden, head
    label_sets: int = 1
    softcap: float | None = None
    logit_scale: float = 1.0
    bias: bool = False
    rank: int = 0
    vocabulary: int | None = None  # another than that of most
    rows: int = ROWS
    workspace_bytes: int | None = None  # where they are not enough, the fewest that are
    gaps: bool = False  # rows that no label set scores, of two
    peaked: bool = (
        False  # four times the logits, of a head with a mean: what is lost of a tail shows
    )
    evaluates: bool = False  # without a gradient too, where a GPU multiplies and sums in one kernel


TRAINS = Variant("trainable head")  # a CPU keeps E; for what a GPU does then see `kept.py`
# Of so few bytes the plan for a GPU makes 3 blocks of the vocabulary, where half the rows would get
# one, and 17 to 33 of everything.
IN_BLOCKS = Variant(
    "trainable head, recomputed in blocks", bias=True, workspace_bytes=2**15, rows=80
)
VARIANTS = (
    Variant("frozen head", trains=(True, False), evaluates=True),
    Variant("frozen hidden states", trains=(False, True), bias=True),
    TRAINS,
    # What a GPU does of most heads: their tiles have all columns.
    Variant("trainable head, whole rows", bias=True, vocabulary=WIDE, rows=20),
    IN_BLOCKS,
    Variant("softcap, scale, bias", softcap=4.0, logit_scale=0.7, bias=True),
    # As in a padded batch: the kernels are then those of the loss's checks too.
    Variant("two label sets", label_sets=2, gaps=True),
    # Columns in whole vectors, as of most adapters; 4 are in none, with every other option.
    Variant("low-rank part, frozen head", trains=(True, False), rank=8),
    Variant(
        "all of it, in blocks", label_sets=2, softcap=4.0, logit_scale=0.7, bias=True, rank=4,
        workspace_bytes=2**16,
    ),
)  # fmt: skip


class Problem(NamedTuple):
    """Inputs of linear_logps; gradients are asked of the leaves that require them."""

    leaves: dict[str, Tensor]
    labels: tuple[Tensor, ...]
    coefficients: tuple[Tensor, ...]
    options: dict[str, Any]

    def true(self) -> "Problem":
        """The same numbers in float64 on the CPU."""
        leaves = {
            name: exact(leaf).requires_grad_(leaf.requires_grad)
            for name, leaf in self.leaves.items()
        }
        labels = tuple(each.cpu() for each in self.labels)
        return Problem(leaves, labels, tuple(exact(a) for a in self.coefficients), self.options)

    def logps(self, function: Callable[..., Any], **extra: Any) -> tuple[Tensor, ...]:
        """Log-probs of each label set."""
        low_rank = None
        if "hidden_r" in self.leaves:
            low_rank = (self.leaves["hidden_r"], self.leaves["weight_r"])
        found: tuple[Tensor, ...] = function(
            self.leaves["hidden"], self.leaves["weight"], self.labels, self.leaves.get("bias"),
            low_rank=low_rank, **self.options, **extra,
        )  # fmt: skip
        return found

    def evaluate(self, function: Callable[..., Any], **extra: Any) -> dict[str, Tensor]:
        """Log-probs of each label set and the gradients of the leaves that have one."""
        logps = self.logps(function, **extra)
        trained = {name: leaf for name, leaf in self.leaves.items() if leaf.requires_grad}
        gradients = gradients_of(logps, self.coefficients, list(trained.values()))
        results = {f"log-probs {i + 1}": each.detach() for i, each in enumerate(logps)}
        return results | {f"d{name}": each for name, each in zip(trained, gradients, strict=True)}


def cases(setting: Setting) -> Iterator[Case]:
    """linear_logps and its invariants, in one dtype."""
    for variant in VARIANTS:
        yield Case("linear_logps", variant.name, setting, _linear_logps, (variant,))
    yield Case("linear_logps", "log-probs <= 0, gradients sum to 0", setting, _sums)
    yield Case("linear_logps", "bitwise repeatable", setting, _repeatable)


def problem(setting: Setting, variant: Variant) -> Problem:
    """Trained-like: half the labels are likely, two are nearly certain."""
    generator = setting.generator()

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    N, V = variant.rows, variant.vocabulary or VOCABULARY
    weight, hidden = draw(V, HIDDEN) / HIDDEN**0.5, 1.5 * draw(N, HIDDEN)
    labels = [torch.randint(0, V, (N,), generator=generator) for _ in range(2)]
    labels[0][::2] = (hidden @ weight.T).argmax(1)[::2]
    hidden[:2] = 8.0 * weight[labels[0][:2]]
    if variant.peaked:
        hidden, weight = 4.0 * hidden, weight + draw(HIDDEN) / HIDDEN**0.5
    labels[1] = torch.where(torch.rand(N, generator=generator) < 0.5, labels[0], labels[1])
    for i, each in enumerate(labels):
        each[i + 3 :: 10] = IGNORE_INDEX
    if variant.gaps:
        labels[1][3::20] = IGNORE_INDEX
    trains_hidden, trains_head = variant.trains
    leaves = {
        "hidden": setting.put(hidden).requires_grad_(trains_hidden),
        "weight": setting.put(weight).requires_grad_(trains_head),
    }
    if variant.bias:
        leaves["bias"] = setting.put(draw(V)).requires_grad_(trains_head)
    if variant.rank:
        leaves["hidden_r"] = setting.put(draw(N, variant.rank)).requires_grad_()
        leaves["weight_r"] = setting.put(0.1 * draw(V, variant.rank)).requires_grad_()
    return Problem(
        leaves,
        tuple(each.to(setting.device) for each in labels[: variant.label_sets]),
        tuple(draw(N).to(setting.device) for _ in range(variant.label_sets)),
        {"softcap": variant.softcap, "logit_scale": variant.logit_scale},
    )


def definition(
    hidden: Tensor, weight: Tensor, labels: Sequence[Tensor], bias: Tensor | None, **options: Any
) -> tuple[Tensor, ...]:
    """Log-probs of each label set, as `reference` has them."""
    return reference.linear_logps(
        hidden, weight, torch.stack(tuple(labels)), bias, **options
    ).unbind()


def materialised(
    hidden: Tensor, weight: Tensor, labels: Sequence[Tensor], bias: Tensor | None, **options: Any
) -> tuple[Tensor, ...]:
    """What a training loop does without this package: GEMM in the dtype, log_softmax in float32."""
    logps = torch.log_softmax(reference.logits(hidden, weight, bias, **options).float(), -1)
    picked = [logps.gather(1, each.clamp(min=0)[:, None])[:, 0] for each in labels]
    return tuple(x * (each != IGNORE_INDEX) for x, each in zip(picked, labels, strict=True))


def ours(
    hidden: Tensor, weight: Tensor, labels: tuple[Tensor, ...], *rest: Any, **options: Any
) -> tuple[Tensor, ...]:
    """Log-probs of each label set, from `linear_logps`."""
    if len(labels) == 2:
        return tuple(linear_logps(hidden, weight, (labels[0], labels[1]), *rest, **options))
    logps = linear_logps(hidden, weight, labels[0], *rest, **options)
    return logps if isinstance(logps, tuple) else (logps,)


def _results(here: Problem, variant: Variant) -> dict[str, Tensor]:
    if variant.workspace_bytes is None:
        return here.evaluate(ours)
    try:
        return here.evaluate(ours, workspace_bytes=variant.workspace_bytes)
    except TooSmallError as error:
        # The smallest power of two that is enough: nearly as many tiles as there can be.
        return here.evaluate(ours, workspace_bytes=1 << (error.least - 1).bit_length())


def _linear_logps(setting: Setting, variant: Variant) -> Iterator[Figure]:
    here = problem(setting, variant)
    truth = here.true().evaluate(definition)
    eager = here.evaluate(materialised)
    for what, actual in _results(here, variant).items():
        yield like_torch(what, actual, truth[what], eager[what], setting.dtype)
    if variant.evaluates:
        with torch.no_grad():
            (logps,) = here.logps(ours)
        true, its = (each["log-probs 1"] for each in (truth, eager))
        yield like_torch("log-probs without a gradient", logps, true, its, setting.dtype)


def _sums(setting: Setting) -> Iterator[Figure]:
    here = problem(setting, IN_BLOCKS)
    with torch.no_grad():
        here.leaves["weight"][:, 0] = 1.0  # then dhidden[:, 0] = a_t sum_v dz_tv = 0
    results = _results(here, IN_BLOCKS)
    yield Figure("largest log-prob", max(0.0, float(results["log-probs 1"].amax())), 0.0)
    # Each probability is rounded by itself; measured 1.1 eps (bf16, fp16) and 5e-7 (float32).
    dhidden, dbias = exact(results["dhidden"]), exact(results["dbias"])
    error = largest(dhidden[:, 0]) / largest(dhidden[:, 1:])
    yield Figure("sum of a row's dlogits", error, 4 * setting.eps)
    error = abs(float(dbias.sum())) / float(dbias.abs().sum())
    yield Figure("sum of dbias", error, 4 * setting.eps)


def _repeatable(setting: Setting) -> Iterator[Figure]:
    with setting.all_threads():  # threads that race would differ
        here = problem(setting, TRAINS)
        at_once = [_results(here, TRAINS) for _ in range(2)]
    here = problem(setting, IN_BLOCKS)
    blocks = [_results(here, IN_BLOCKS) for _ in range(2)]
    for first, second in (at_once, blocks):
        for what, once in first.items():
            # NaN counts as equal here: the other checks find it.
            differ = (once != second[what]) & ~(once.isnan() & second[what].isnan())
            yield Figure(f"elements of {what} that differ", float(differ.sum()), 0.0)
