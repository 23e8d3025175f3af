"""The large entries of a rounded tile: taken out, redone from the inputs, multiplied as a list.

Both forms: what the CPU dispatches to (C++ where it is built) and plain torch.
"""

import math
from typing import NamedTuple

import pytest
import torch

from orpo_kernels import reference
from orpo_kernels.engine import tiles
from orpo_kernels.engine.budget import accumulation_dtype
from orpo_kernels.engine.tiles.collect import Entries, restore_
from tests.csrc.forms import FORMS, needs_extension
from tests.helpers import problem

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
FIRST_COLUMN, SHARE = 11, 2.0**-6


class Case(NamedTuple):
    """A tile, its transform, and why it is here."""

    reason: str
    shape: tuple[int, int, int]  # R, C, H
    dtype: torch.dtype = BF16
    bias: bool = False
    scale: float = 1.0
    softcap: float | None = None
    sets: int = 1


CASES = [
    Case("one column, which is a label", (5, 1, 8)),
    Case("odd widths: the last half of a word, of a row of the weight", (7, 1003, 33)),
    Case("more columns than a chunk, more rows than a task", (70, 2500, 16), sets=2),
    Case("half", (9, 3001, 24), F16),
    Case("float32", (9, 3001, 24), F32),
    Case("float64", (9, 2051, 24), F64),
    Case("scale", (9, 2051, 24), scale=0.5),
    Case("bias and softcap", (9, 2051, 24), bias=True, softcap=12.0),
    Case("everything", (9, 2051, 24), F16, True, 1.3, 15.0, 2),
]


def tile_of(case):
    """hidden, weight, their logits as a GEMM rounds them, bias, labels."""
    rows, columns, width = case.shape
    given = problem(
        rows, width, columns, case.dtype, bias=case.bias and torch.float32, sets=case.sets,
        first_column=FIRST_COLUMN,
    )  # fmt: skip
    return given.hidden, given.weight, given.tile, given.bias, given.labels


def collect(form, case, tile, bias, labels, state, inputs=(None, None), **changed):
    """`(rescale, (offsets, columns, values))`; the state is (row_max, sum_exp, others)."""
    wide = {"share": SHARE, "most": 256, "online": True, "store": True, **changed}
    rescale, *entries = form(
        tiles.softmax_collect_, tile, bias, labels, FIRST_COLUMN, *state, *inputs,
        wide["share"], wide["most"], case.scale, case.softcap, wide["online"], wide["store"],
    )  # fmt: skip
    return rescale, entries


def dense(entries, shape):
    tile = torch.zeros(shape, dtype=F64)
    restore_(tile, Entries(*entries))
    return tile


def fresh(case):
    wide = accumulation_dtype(case.dtype)
    return torch.full((case.shape[0],), torch.finfo(wide).min, dtype=wide), torch.zeros(
        case.shape[0], dtype=wide
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.reason)
def test_one_tile(case, form):
    hidden, weight, tile, bias, labels = tile_of(case)
    wide_bias = None if bias is None else bias.double()
    options = (labels, FIRST_COLUMN, case.scale, case.softcap)
    z, slope = reference.tile_logits(tile.double(), wide_bias, *options)
    true_z, true_slope = reference.tile_logits(
        hidden.double() @ weight.double().t(), wide_bias, *options
    )
    row_max, sum_exp = fresh(case)
    # Of the mass elsewhere something is known already: it counts for what is large.
    others = torch.linspace(-3.0, 3.0, case.shape[0], dtype=row_max.dtype)
    written = tile.clone()
    rescale, entries = collect(
        form, case, written, bias, labels, (row_max, sum_exp, others), (hidden, weight)
    )
    some = ~torch.isinf(z).all(1)
    assert not rescale[some].any()  # there was no tile before
    torch.testing.assert_close(row_max[some].double(), z.amax(1)[some], rtol=1e-6, atol=1e-6)
    level = row_max.double()[:, None]
    e, redone = torch.exp(z - level), torch.exp(true_z - level)
    limit = SHARE * (e.sum(1) + torch.exp(others.double() - row_max.double()))[:, None]
    value = e * slope
    large = value > limit
    # Rounding decides about an entry within its error of the limit.
    sure = (value / limit - 1).abs() > 4 * max(torch.finfo(case.dtype).eps, 1e-6)
    found = dense(entries, z.shape)
    assert torch.equal((found != 0)[sure], large[sure])
    assert large.any()
    taken = found != 0
    torch.testing.assert_close(
        found[taken], (redone * true_slope)[taken], rtol=2e-5, atol=0, check_dtype=False
    )
    eps = max(torch.finfo(case.dtype).eps, 1e-5)
    rest = torch.where(taken, 0.0, value)
    torch.testing.assert_close(written.double(), rest, rtol=eps, atol=1e-7)
    assert not written[taken].any()
    total = torch.where(taken, redone, e).sum(1)
    # What stays is summed as it was rounded.
    torch.testing.assert_close(sum_exp.double(), total, rtol=eps / 8 + 2e-6, atol=1e-30)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("store", [True, False])
def test_tiles_in_turn_are_one_row(form, store):
    # Rising, falling and equal maxima: the sums before are rescaled, never the maximum lowered.
    case = Case("three tiles", (6, 3000, 16))
    _, _, tile, _, labels = tile_of(case)
    tile[0, :1000] += 3
    tile[1, 2000:] += 3
    row_max, sum_exp = fresh(case)
    sums = torch.zeros(6, 1)
    for v0 in range(0, 3000, 1000):
        block = tile[:, v0 : v0 + 1000].clone()
        state = (row_max, sum_exp, None)
        rescale, entries = collect(
            form, case, block, None, labels - v0, state, share=math.inf, store=store
        )
        assert entries[2].numel() == 0
        if store:
            sums = sums * rescale[:, None] + block.float().sum(1, keepdim=True)
    z, _ = reference.tile_logits(tile.double(), None, labels, FIRST_COLUMN, 1.0, None)
    true_max, true_sum = reference.softmax_stats(z)
    torch.testing.assert_close(row_max.double(), true_max)
    torch.testing.assert_close(sum_exp.double(), true_sum, rtol=1e-3, atol=0)
    if store:
        torch.testing.assert_close(sums[:, 0], sum_exp, rtol=1e-3, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_final_statistics_stay(form):
    # The backward: reference and total of the whole row are known, and larger than this tile's.
    case = Case("final", (9, 2051, 24))
    hidden, weight, tile, _, labels = tile_of(case)
    z, _ = reference.tile_logits(tile.double(), None, labels, FIRST_COLUMN, 1.0, None)
    row_max = (z.amax(1) + 0.5).float()
    sum_exp = 3 * torch.exp(z - row_max.double()[:, None]).sum(1).float()
    before = row_max.clone(), sum_exp.clone()
    written = tile.clone()
    state = (row_max, sum_exp, None)
    rescale, entries = collect(
        form, case, written, None, labels, state, (hidden, weight), online=False
    )
    assert torch.equal(row_max, before[0])
    assert torch.equal(sum_exp, before[1])
    assert (rescale == 1).all()
    truth, _ = reference.tile_logits(
        hidden.double() @ weight.double().t(), None, labels, FIRST_COLUMN, 1.0, None
    )
    restore_(written, Entries(*entries))
    e = torch.exp(truth - row_max.double()[:, None])
    torch.testing.assert_close(written.double().sum(1), e.sum(1), rtol=5e-3, atol=0)
    large = e > 1.1 * SHARE * sum_exp.double()[:, None]
    assert large.any()
    torch.testing.assert_close(written.double()[large], e[large], rtol=4e-3, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_without_inputs_the_entries_are_the_tiles(form):
    case = Case("not redone", (9, 2051, 24), F32)
    _, _, tile, _, labels = tile_of(case)
    whole, written = tile.clone(), tile.clone()
    for each, share in ((whole, math.inf), (written, SHARE)):
        _, entries = collect(form, case, each, None, labels, (*fresh(case), None), share=share)
    assert entries[2].numel() > 0
    restore_(written, Entries(*entries))
    torch.testing.assert_close(written, whole, rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_only_the_largest_of_too_many(form):
    case = Case("at most three", (4, 700, 16))
    _, _, tile, _, labels = tile_of(case)
    written = tile.clone()
    labels = torch.full_like(labels, -1)
    state = (*fresh(case), None)
    _, (offsets, columns, _) = collect(form, case, written, None, labels, state, share=1e-9, most=3)
    assert offsets.tolist() == [0, 3, 6, 9, 12]
    largest = tile.float().topk(3).indices.sort(1).values
    assert torch.equal(columns.view(4, 3).long(), largest)
    assert (written != 0).sum() == 4 * 697


@pytest.mark.parametrize("form", FORMS)
def test_csr_matmul(form):
    # An empty row first, in between and last; an odd width; both weight dtypes of a CPU.
    counts = torch.tensor([0, 5, 0, 300, 1, 0])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    columns = torch.randint(0, 50, (306,), dtype=torch.int32)
    for dtype, wide in ((BF16, F32), (F32, F32), (F64, F64)):
        values, weight = torch.randn(306, dtype=wide), torch.randn(50, 33).to(dtype)
        sums = torch.randn(6, 33, dtype=wide)
        truth = sums.double()
        tile = torch.zeros(6, 50, dtype=F64)
        rows = torch.arange(6).repeat_interleave(counts)
        tile.index_put_((rows, columns.long()), values.double(), accumulate=True)
        truth += tile @ weight.double()
        form(tiles.csr_matmul_, sums, offsets, columns, values, weight)
        torch.testing.assert_close(sums.double(), truth, rtol=1e-5, atol=1e-4)


@needs_extension
def test_the_number_of_threads_does_not_matter():
    case = Case("threads", (300, 4000, 16))
    hidden, weight, tile, _, labels = tile_of(case)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            written, state = tile.clone(), fresh(case)
            _, entries = collect(
                lambda op, *args: op(*args), case, written, None, labels, (*state, None),
                (hidden, weight),
            )  # fmt: skip
            sums = torch.zeros(300, 16)
            tiles.csr_matmul_(sums, *entries, weight)
            results.append((written, *state, *entries, sums))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_refuses_what_does_not_fit():
    case = Case("", (4, 10, 8))
    hidden, weight, tile, _, labels = tile_of(case)
    state = (*fresh(case), None)
    if tiles.native.cpu_backend() == "c++":
        for inputs in ((hidden[:3], weight), (hidden, weight[:, :4]), (hidden.float(), weight)):
            with pytest.raises(RuntimeError, match="hidden must be"):
                collect(lambda op, *args: op(*args), case, tile, None, labels, state, inputs)
        with pytest.raises(RuntimeError, match=r"columns must lie in \[0, C\)"):
            tiles.csr_matmul_(
                torch.zeros(1, 8), torch.tensor([0, 1]), torch.tensor([10], dtype=torch.int32),
                torch.ones(1), weight,
            )  # fmt: skip


@needs_extension
@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
def test_evaluation_has_the_bits_of_training(dtype):
    case = Case("not written", (40, 5001, 24), dtype)
    hidden, weight, tile, _, labels = tile_of(case)
    states = []
    for store in (True, False):
        row_max, sum_exp = fresh(case)
        for v0 in (0, 2500):
            block = tile[:, v0 : v0 + 2500].clone()
            collect(
                lambda op, *args: op(*args), case, block, None, labels - v0,
                (row_max, sum_exp, None), (hidden, weight[v0 : v0 + 2500]), store=store,
            )  # fmt: skip
        states.append((row_max, sum_exp))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
