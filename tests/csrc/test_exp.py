"""exp and tanh of `csrc/exp.h`, through the operations that use them, against float64."""

import pytest
import torch

from orpo_kernels.engine import tiles
from tests.csrc.forms import exponentials, needs_extension, no_labels, ulps

pytestmark = needs_extension

# 400,003 points: a prime, so that every lane of a vector and the remainder meet every range.
POINTS = 400_003


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (-87.0, 0.0),  # normal results: what a softmax asks for
        (-104.0, -87.0),  # subnormal results, and the last that round to 0
        (-1.0, 0.0),  # near 1, where the polynomial alone decides
        (0.0, 71.0),  # above the reference: label columns, which are overwritten
    ],
)
def test_exp_within_two_ulps(low, high):
    x = torch.linspace(low, high, POINTS)
    assert ulps(exponentials(x), torch.exp(x.double())).max() <= 2.0


def test_exp_at_the_ends():
    tiny = 1.17549435e-38
    x = torch.tensor([0.0, -0.0, -103.9, -104.1, -200.0, -3.0e38, -torch.inf, -tiny, torch.nan])
    found = exponentials(x)
    assert found[:2].tolist() == [1.0, 1.0]
    assert found[2] == 2.0**-149  # the smallest subnormal: nothing is flushed
    assert found[3:7].tolist() == [0.0] * 4
    assert found[7] == 1.0
    assert found[8].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_to_nearest_even(dtype):
    # Every result of exp on the range, subnormal halves among them, narrowed as torch narrows it.
    x = torch.linspace(-104.0, 11.0, POINTS)
    assert torch.equal(exponentials(x, dtype), exponentials(x).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widens_every_number(dtype):
    # All 65,536 patterns, as the only row of a tile of width 1: max z is the number itself.
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).view(-1, 1)
    found, *_ = tiles.softmax_stats(x, None, no_labels(len(x)), 0, 1.0, None)
    wide = x[:, 0].float().clamp(min=torch.finfo(torch.float32).min)
    number = ~wide.isnan()
    assert torch.equal(found[number], wide[number])


def _tanh(z, softcap):
    """Capped value and slope of single logits, each from the operation that returns it."""
    tile = z.view(-1, 1).clone()
    labels = no_labels(len(z))
    value, *_ = tiles.softmax_stats(tile, None, labels, 0, 1.0, softcap)
    tiles.softmax_grad_(tile, None, labels, 0, value, 1.0, softcap)
    return value, tile[:, 0]


@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_tanh_and_its_slope(softcap):
    # Beyond 9 softcaps tanh is 1 in float32 while its slope is not yet 0.
    u = torch.cat([torch.linspace(-20.0, 20.0, 100_003), torch.logspace(-30, -1, 1_000)])
    z = u * softcap
    value, slope = _tanh(z, softcap)
    exact = (z / softcap).double()
    assert ulps(value / softcap, torch.tanh(exact)).max() <= 4.0
    # u is rounded before exp(-2 u): its relative error is 2 |u| eps.
    truth = torch.cosh(exact).pow(-2)
    error = (slope.double() - truth).abs() / truth
    assert (error <= (8 + 4 * exact.abs()) * torch.finfo(torch.float32).eps).all()


def test_tanh_saturates_and_keeps_its_sign():
    z = torch.tensor([1e4, -1e4, torch.inf, -torch.inf, 0.0, -0.0])
    value, slope = _tanh(z, 5.0)
    assert value.tolist() == [5.0, -5.0, 5.0, -5.0, 0.0, 0.0]
    assert slope.tolist() == [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
