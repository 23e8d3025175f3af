"""What a check of the self-test measures, and the limits it is held to.

Inputs are drawn, rounded to the dtype under test, and given to the op on the device and to
`orpo_kernels.reference` in float64 on the CPU. Errors and limits are relative to the largest true
value. Two limits serve most checks:

- `rounded_once`: float32 arithmetic and one rounding, element by element:
  eps(dtype) |truth| + 4 eps(float32) max |truth|.
- `like_torch`: GEMMs on rounded operands: at most twice the error (largest, and RMS) of torch's
  materialised log_softmax in the same dtype on the same device, + eps(dtype), float32: 16 eps.

The others are stated where they are used. The first finds a fault in 1 % of the vocabulary in every
dtype; the second is for what is wrong by more than rounding.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

EPS32 = torch.finfo(torch.float32).eps


class Figure(NamedTuple):
    """One measured error, its limit, and what it is the error of."""

    what: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the limit."""
        return self.error <= self.limit

    @property
    def used(self) -> float:
        """Share of the limit that is used; orders figures by how bad they are."""
        if not self.passed:
            return float("inf")
        return self.error / self.limit if self.limit > 0 else 0.0


class Setting(NamedTuple):
    """Where and in which dtype a check runs."""

    device: torch.device
    dtype: torch.dtype
    threads: int = 1

    def generator(self) -> torch.Generator:
        """On the CPU, always from the same seed: every device and dtype gets the same draws."""
        return torch.Generator("cpu").manual_seed(20240312)

    def put(self, tensor: Tensor) -> Tensor:
        """In the dtype under test, on the device."""
        return tensor.to(self.dtype).to(self.device)

    @contextmanager
    def all_threads(self) -> Iterator[None]:
        """Within, torch has all its threads, as in training; outside, one."""
        torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_num_threads(1)

    @property
    def eps(self) -> float:
        """Rounding step of the dtype; in float32, of a short sum."""
        return max(torch.finfo(self.dtype).eps, 16 * EPS32)


class Case(NamedTuple):
    """One cell of the table: an op in one configuration, for one dtype."""

    op: str
    name: str
    setting: Setting
    check: Callable[..., Iterator[Figure]]
    arguments: tuple[Any, ...] = ()

    def run(self) -> list[Figure]:
        """The figures of the check."""
        return list(self.check(self.setting, *self.arguments))


def exact(tensor: Tensor) -> Tensor:
    """Detached, in float64 on the CPU."""
    return tensor.detach().cpu().double()


def gradients_of(
    outputs: Sequence[Tensor], coefficients: Sequence[Tensor], leaves: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Of the leaves, of the sum of coefficients times outputs.

    As with the coefficients as `grad_outputs`, for which torch imports sympy first, in 0.15 s.
    """
    terms = [(a * x).sum() for a, x in zip(coefficients, outputs, strict=True)]
    return torch.autograd.grad(torch.stack(terms).sum(), leaves)


def largest(tensor: Tensor) -> float:
    """Largest magnitude."""
    return cast(float, tensor.detach().abs().amax().item())


def relative_errors(actual: Tensor, truth: Tensor) -> tuple[float, float]:
    """Largest and RMS error, relative to the largest and the RMS true value."""
    error, truth = exact(actual) - truth.detach(), truth.detach()
    # Where the truth is 0 everywhere the error is absolute.
    biggest, rms = largest(truth) or 1.0, float(truth.square().mean().sqrt()) or 1.0
    return largest(error) / biggest, float(error.square().mean().sqrt()) / rms


def rounded_once(
    what: str,
    actual: Tensor,
    truth: Tensor,
    exponent: float = 0.0,
    summands: Tensor | None = None,
) -> Figure:
    """The element nearest to its limit, or furthest beyond it.

    Args:
        what: name of the result.
        actual: the result.
        truth: float64, on the CPU.
        exponent: size of the arguments of exp, when they are rounded: exp(z) is off by eps |z|.
        summands: sums of the magnitudes of what is added in float32, in any order; 4 eps(float32)
            is then of the largest of these, instead of the largest true value.

    Returns:
        The figure.
    """
    info = torch.finfo(actual.dtype)
    error, size = (exact(actual) - truth).abs(), truth.abs()
    scale = size.amax().clamp(min=1e-30)
    added = scale if summands is None else largest(summands)
    limit = (info.eps + exponent * EPS32) * size + 4 * EPS32 * added
    limit += info.smallest_normal * info.eps  # one subnormal step
    worst = int(torch.where(error.isnan(), torch.inf, error / limit).argmax())
    return Figure(what, float(error.view(-1)[worst] / scale), float(limit.view(-1)[worst] / scale))


def like_torch(
    what: str, actual: Tensor, truth: Tensor, eager: Tensor, dtype: torch.dtype
) -> Figure:
    """Largest or RMS error against torch's own, whichever is nearer to its limit."""
    allowance = 16 * EPS32 if dtype == torch.float32 else torch.finfo(dtype).eps
    errors = zip(relative_errors(actual, truth), relative_errors(eager, truth), strict=True)
    figures = [Figure(what, ours, 2 * theirs + allowance) for ours, theirs in errors]
    return max(figures, key=lambda figure: figure.used)
