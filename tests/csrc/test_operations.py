"""Every C++ tile operation against its plain-torch form and against float64."""

from typing import NamedTuple

import pytest
import torch

from orpo_kernels import reference
from orpo_kernels.engine import tiles
from orpo_kernels.engine.budget import accumulation_dtype
from tests.csrc.forms import EPS32, needs_extension, no_labels, plain
from tests.helpers import assert_logit_sums, problem

pytestmark = needs_extension

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16


class Case(NamedTuple):
    """A tile, its transform, and why it is here."""

    reason: str
    shape: tuple[int, int]
    dtype: torch.dtype
    bias: torch.dtype | None = None
    scale: float = 1.0
    softcap: float | None = None
    sets: int = 1
    padding: tuple[int, int] = (0, 0)  # columns of the wider matrix before and behind the tile
    out: torch.dtype | None = None
    transposed_labels: bool = False


CASES = [
    Case("one logit", (1, 1), F32),
    Case("one column: as a rule the label, and nothing beside it", (5, 1), BF16),
    Case("no rows", (0, 7), BF16),
    Case("an odd width: the last half has no partner in its word", (3, 7), BF16),
    Case("the same for the other 16-bit format", (3, 7), F16),
    Case("a prime width beyond a vector of every instruction set", (4, 1009), BF16),
    Case("one more than a chunk: the second has one column", (3, 2049), F32),
    Case("two chunks and a remainder: the sum so far is rescaled", (3, 5003), F16),
    Case("more rows than one task of the thread pool takes", (70, 2500), BF16, sets=2),
    Case("float64 has loops of its own", (4, 2051), F64),
    Case("float64 with every option", (4, 2051), F64, F64, 0.7, 5.0, 2),
    Case("bias, in the dtype of the tile", (5, 2049), BF16, BF16),
    Case("bias in float32, tile in half", (5, 2049), F16, F32),
    Case("bias in float64, tile in float32", (5, 100), F32, F64),
    Case("scale alone: no bias, no cap", (5, 2049), BF16, None, 0.3),
    Case("cap alone, mostly saturated", (5, 2049), BF16, None, 1.0, 0.5),
    Case("cap alone, mostly linear", (5, 2049), F32, None, 1.0, 50.0),
    Case("everything at once", (9, 4099), BF16, F32, 1.7, 3.0, 2),
    Case("everything at once, half", (9, 4099), F16, F16, 1.7, 3.0, 2),
    Case("rows apart, starting at an odd element", (5, 1001), BF16, padding=(3, 6)),
    Case("rows apart, with a transform", (5, 1001), F32, F32, 0.5, padding=(1, 0)),
    Case("rounded into bf16: what a GPU of float32 logits would ask", (5, 2049), F32, out=BF16),
    Case("rounded into half", (5, 2049), F32, F32, 0.5, 5.0, out=F16),
    Case("from one 16-bit format to the other", (5, 99), BF16, out=F16),
    Case("widened: out need not be narrower", (5, 99), F16, out=F32),
    Case("no label set", (5, 300), BF16, sets=0),
    Case("three label sets: the schema does not stop at two", (5, 300), BF16, sets=3),
    Case("a negative scale: its sign reaches the gradient", (5, 300), F32, None, -1.5),
    Case("a row of Llama 3", (2, 128_256), BF16),
    Case("labels strided by set", (6, 300), F32, sets=2, transposed_labels=True),
]


def tile_of(case):
    """Logits, bias, labels: of its first column, its last, elsewhere, and absent (-1)."""
    (rows, columns), (before, behind) = case.shape, case.padding
    given = problem(
        rows, 32, columns, case.dtype, bias=case.bias or False, sets=case.sets, first_column=11
    )
    wide = torch.nn.functional.pad(given.tile, (before, behind))
    labels = given.labels
    labels[:, 2::3] = -1
    labels[-1:, -1:] = 10 + columns
    if case.transposed_labels:
        labels = labels.t().contiguous().t()
    return wide[:, before : before + columns], given.bias, labels


def truth(case, tile, bias, labels):
    """z without the label columns, and its slope in the raw logit, in float64."""
    wide = None if bias is None else bias.double()
    return reference.tile_logits(tile.double(), wide, labels, 11, case.scale, case.softcap)


def precision(case):
    """Relative error of exp(z - reference): the difference, here below 40, is rounded."""
    return 1e-13 if case.dtype == F64 else 40 * EPS32


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_softmax_stats(case):
    tile, bias, labels = tile_of(case)
    z, _ = truth(case, tile, bias, labels)
    args = (tile, bias, labels, 11, case.scale, case.softcap, True)
    found, torch_form = tiles.softmax_stats(*args), plain(tiles.softmax_stats, *args)
    accuracy = precision(case)
    for each, other in zip(found[:2], torch_form[:2], strict=True):
        assert each.dtype == other.dtype
        torch.testing.assert_close(each, other, rtol=2 * accuracy, atol=accuracy)
    for form in (found, torch_form):
        assert form[2].dtype == found[0].dtype
        assert_logit_sums(form[2], tile, bias, case.scale, case.softcap)
    row_max, sum_exp, _ = found
    *same, not_asked = tiles.softmax_stats(*args[:-1])
    assert all(torch.equal(a, b) for a, b in zip(same, (row_max, sum_exp), strict=True))
    assert not_asked.shape == (0,)
    some = (~torch.isinf(z)).any(1)  # elsewhere only labels: a maximum of nothing
    torch.testing.assert_close(row_max[some].double(), z.amax(1)[some], rtol=accuracy, atol=1e-6)
    exact = torch.exp(z[some] - row_max[some].double()[:, None]).sum(1)
    torch.testing.assert_close(sum_exp[some].double(), exact, rtol=accuracy + 2e-6, atol=0)
    assert not sum_exp[~some].any()
    assert (row_max[~some] == torch.finfo(row_max.dtype).min).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_softmax_grad(case):
    tile, bias, labels = tile_of(case)
    z, slope = truth(case, tile, bias, labels)
    level = (z.amax(1).clamp(min=0) + 0.5).to(accumulation_dtype(case.dtype))
    exact = reference.softmax_grad(z, slope, level.double())
    results = []
    for form in (tiles.softmax_grad_, lambda *args: plain(tiles.softmax_grad_, *args)):
        x = torch.empty_strided(tile.shape, tile.stride(), dtype=tile.dtype).copy_(tile)
        out = None if case.out is None else torch.empty_like(x, dtype=case.out)
        form(x, bias, labels, 11, level, case.scale, case.softcap, out)
        results.append(x if out is None else out)
        assert out is None or torch.equal(x, tile)
    info = torch.finfo(results[0].dtype)
    tolerance = precision(case) + (0.0 if info.dtype == "float64" else info.eps)
    subnormal = info.smallest_normal * info.eps
    torch.testing.assert_close(*results, rtol=tolerance, atol=subnormal + 1e-37)
    torch.testing.assert_close(results[0].double(), exact, rtol=tolerance, atol=subnormal + 1e-37)
    assert not results[0][torch.isinf(z)].any()


def test_softmax_grad_writes_nothing_beside_the_tile():
    # Halves are written in pairs: the partner of the last one belongs to someone else.
    for dtype in (BF16, F16):
        wide = torch.randn(4, 40).to(dtype)
        before = wide.clone()
        args = (no_labels(4), 0, torch.zeros(4), 1.0, None)
        tiles.softmax_grad_(wide[:, 3:20], None, *args)
        assert torch.equal(wide[:, :3], before[:, :3])
        assert torch.equal(wide[:, 20:], before[:, 20:])


COLUMN_SUMS = [
    ("one element", (1, 1), F32, F32, 0),
    ("no rows: sums of nothing are 0", (0, 9), BF16, F32, 0),
    ("no columns", (3, 0), BF16, F32, 0),
    ("one more row than a partial sum has", (65, 33), BF16, F32, 0),
    ("many rows, and a last chunk of one column", (300, 2049), F16, F32, 0),
    ("more rows than a task takes", (2100, 33), BF16, F32, 0),
    ("a slice of a kept E: rows apart, odd start", (70, 1003), BF16, F32, 3),
    ("float64 throughout", (70, 1003), F64, F64, 0),
    ("a float32 tile summed in float64", (70, 1003), F32, F64, 1),
]


@pytest.mark.parametrize(
    ("shape", "dtype", "wide", "offset"),
    [case[1:] for case in COLUMN_SUMS],
    ids=[case[0] for case in COLUMN_SUMS],
)
@pytest.mark.parametrize("stride", [1, 2])  # coefficients need not be contiguous
def test_column_sums(shape, dtype, wide, offset, stride):
    tile = torch.randn(shape[0], shape[1] + 2 * offset).to(dtype)[:, offset : offset + shape[1]]
    coefficients = torch.randn(shape[0] * stride).to(wide)[::stride]
    found = tiles.column_sums(tile, coefficients)
    assert found.dtype == wide
    accuracy = 1e-13 if wide == F64 else 16 * EPS32
    terms = tile.double() * coefficients.double()[:, None]
    error = (found.double() - terms.sum(0)).abs()
    assert (error <= accuracy * terms.abs().sum(0)).all()
    other = plain(tiles.column_sums, tile, coefficients)
    limit = 2 * accuracy * terms.abs().sum(0)
    assert ((found.double() - other.double()).abs() <= limit).all()
    # Several rows of coefficients, of a wider matrix: each as it would be alone.
    several = torch.randn(3, shape[0] * stride + 1).to(wide)[:2, : shape[0] * stride : stride]
    alone = torch.stack([tiles.column_sums(tile, each) for each in several])
    assert torch.equal(tiles.column_sums(tile, several), alone)
    torch.testing.assert_close(
        plain(tiles.column_sums, tile, several), alone, rtol=1e-4, atol=1e-5 * shape[0] ** 0.5
    )


ACCUMULATE = [
    ("one element", (1, 1), F32, BF16),
    ("no rows", (0, 9), F32, BF16),
    ("no columns", (3, 0), F32, BF16),
    ("odd width", (5, 1003), F32, BF16),
    ("half", (5, 1003), F32, F16),
    ("more rows than a task takes, or a strip of the torch form", (600, 1024), F32, BF16),
    ("partial as wide as the sum", (5, 1003), F32, F32),
    ("float64", (5, 1003), F64, F64),
    ("float32 into float64", (5, 1003), F64, F32),
]  # fmt: skip


@pytest.mark.parametrize("alpha", [1.0, -1.0, 0.37])  # forward, weight gradient, no special number
@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize(
    ("shape", "dtype", "partial_dtype"),
    [case[1:] for case in ACCUMULATE],
    ids=[case[0] for case in ACCUMULATE],
)
def test_accumulate(shape, dtype, partial_dtype, rescaled, alpha):
    before, partial = torch.randn(shape, dtype=dtype), torch.randn(shape).to(partial_dtype)
    # Every second of a (2 R,) vector: rescale need not be contiguous. 0: an empty sum so far.
    rescale = torch.rand(2 * shape[0], dtype=dtype)[::2] if rescaled else None
    if rescaled:
        rescale[:1] = 0
    kept = before if rescale is None else before * rescale[:, None]
    exact = before.double() if rescale is None else before.double() * rescale.double()[:, None]
    exact = exact + alpha * partial.double()
    scale = kept.double().abs() + abs(alpha) * partial.double().abs()
    for form in (tiles.accumulate_, lambda *args: plain(tiles.accumulate_, *args)):
        sums = before.clone()
        form(sums, partial, rescale, alpha)
        assert ((sums.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * scale).all()


BAD = [
    ("labels must be", lambda x: tiles.softmax_stats(x, None, no_labels(3), 0, 1.0, None)),
    ("bias must be", lambda x: tiles.softmax_stats(x, x[0, :2], no_labels(4), 0, 1.0, None)),
    ("logits must have contiguous rows",
     lambda x: tiles.softmax_stats(x.t(), None, no_labels(6), 0, 1.0, None)),
    ("logits must be float32",
     lambda x: tiles.softmax_stats(x.int(), None, no_labels(4), 0, 1.0, None)),
    ("reference must be",
     lambda x: tiles.softmax_grad_(x, None, no_labels(4), 0, torch.zeros(3), 1.0, None)),
    ("out must be", lambda x: tiles.softmax_grad_(
        x, None, no_labels(4), 0, torch.zeros(4), 1.0, None, torch.zeros(4, 5))),
    ("coefficients must be", lambda x: tiles.column_sums(x, torch.zeros(3))),
    ("coefficients must be float32", lambda x: tiles.column_sums(x, torch.zeros(4).bfloat16())),
    ("partial must be", lambda x: tiles.accumulate_(x, torch.zeros(4, 5), None)),
    ("rescale must be", lambda x: tiles.accumulate_(x, x.clone(), torch.zeros(3))),
    ("accumulator must be float32", lambda x: tiles.accumulate_(x.half(), x, None)),
]  # fmt: skip


@pytest.mark.parametrize(("message", "call"), BAD, ids=[message for message, _ in BAD])
def test_refuses_what_it_would_read_out_of_bounds(message, call):
    with pytest.raises(RuntimeError, match=message):
        call(torch.zeros(4, 6))
