"""One look at a tile for the sparse gradient: what is listed, what is summed by column, or neither.

Both forms: what the CPU dispatches to (C++ where it is built) and plain torch.
"""

import math

import pytest
import torch

from orpo_kernels import reference
from orpo_kernels.engine import tiles
from tests.csrc.forms import FORMS, needs_extension
from tests.engine.tiles.test_collect import (
    BF16,
    CASES,
    F32,
    FIRST_COLUMN,
    SHARE,
    Case,
    collect,
    dense,
    fresh,
    tile_of,
)

EPS = 2.0**-7


def compact(form, case, tile, bias, labels, state, inputs, tail, **changed):
    """`(rescale, (offsets, columns, values), dropped)`; the state is (row_max, sum_exp, others)."""
    wide = {"eps": EPS, "share": SHARE, "most": 256, "capacity": 10**6, **changed}
    rescale, *entries, dropped = form(
        tiles.softmax_compact_online_, tile, bias, labels, FIRST_COLUMN, *state, *inputs,
        wide["eps"], wide["share"], wide["most"], case.scale, case.softcap,
        groups_of(case), tail, wide["capacity"],
    )  # fmt: skip
    return rescale, entries, dropped


def groups_of(case):
    """0, 1 and of no group, in turn."""
    return torch.arange(case.shape[0]) % 3 - (torch.arange(case.shape[0]) % 3 == 2) * 3


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
    others = torch.linspace(-3.0, 3.0, case.shape[0], dtype=row_max.dtype)
    tail = torch.ones(2, 2 * case.shape[1], dtype=row_max.dtype)[:, : case.shape[1]]
    rescale, entries, dropped = compact(
        form, case, tile.clone(), bias, labels, (row_max, sum_exp, others), (hidden, weight), tail
    )
    some = ~torch.isinf(z).all(1)
    assert not rescale[some].any()
    torch.testing.assert_close(row_max[some].double(), z.amax(1)[some], rtol=1e-6, atol=1e-6)
    level = row_max.double()[:, None]
    e, redone = torch.exp(z - level), torch.exp(true_z - level)
    known = e.sum(1, keepdim=True) + torch.exp(others.double() - row_max.double())[:, None]
    value, found = e * slope, dense(entries, z.shape)
    taken = found != 0
    rounding = max(torch.finfo(case.dtype).eps, 1e-6)
    sure = (value / (EPS * known) - 1).abs() > 4 * rounding
    assert torch.equal(taken[sure], (value > EPS * known)[sure])
    assert taken.any()
    torch.testing.assert_close(
        found[taken], (redone * true_slope)[taken], rtol=2e-5, atol=0, check_dtype=False
    )
    rest = torch.where(taken, 0.0, value)
    torch.testing.assert_close(dropped.double(), rest.sum(1), rtol=rounding + 2e-6, atol=1e-9)
    shares = rest / known
    for group in range(2):
        expected = 1.0 + shares[groups_of(case) == group].sum(0)
        torch.testing.assert_close(tail[group].double(), expected, rtol=rounding, atol=1e-6)
    total = torch.where(taken, redone, e).sum(1)
    torch.testing.assert_close(sum_exp.double(), total, rtol=rounding / 8 + 2e-6, atol=1e-30)


# Every group of 64 rows over the capacity; and only the second, of six rows, which decides for all.
@pytest.mark.parametrize("only_last", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("softcap", [None, 12.0])
def test_over_the_capacity_it_is_the_exact_step(form, softcap, only_last):
    case = Case("full", (70, 2500, 16), BF16, softcap is not None, 1.0, softcap)
    hidden, weight, tile, bias, labels = tile_of(case)
    capacity = 0
    if only_last:
        tile[:64] = 0.0  # uniform: nothing over eps
        hidden[:64] = 0.0
    tail = torch.ones(2, 2500)
    results = []
    for sparse in (True, False):
        written, state = tile.clone(), (*fresh(case), None)
        if sparse:
            rescale, entries, dropped = compact(
                form, case, written, bias, labels, state, (hidden, weight), tail, capacity=capacity
            )
            assert dropped.shape == (0,)
        else:
            rescale, entries = collect(
                form, case, written, bias, labels, state, (hidden, weight), share=SHARE
            )
        assert entries[2].numel() > 0
        results.append((written, *state[:2], rescale, *entries))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert bool((tail == 1).all())


@pytest.mark.parametrize("form", FORMS)
def test_at_the_capacity_nothing_is_refused(form):
    # Two rows of 64: 100 entries of one row are 50 a row.
    case = Case("capacity", (2, 1000, 8), F32)
    logits = torch.zeros(2, 1000)
    logits[0, :100] = 9.0
    labels, tail = torch.full((1, 2), -1), torch.zeros(2, 1000)
    for capacity, refused in ((50, False), (49, True)):
        _, entries, dropped = compact(
            form, case, logits.clone(), None, labels, (*fresh(case), None), (None, None), tail,
            capacity=capacity, share=math.inf,
        )  # fmt: skip
        assert (dropped.numel() == 0) == refused
        assert entries[2].numel() == (0 if refused else 100)


@needs_extension
def test_the_number_of_threads_does_not_matter():
    case = Case("threads", (300, 4000, 16))
    hidden, weight, tile, _, labels = tile_of(case)
    results, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            state, tail = fresh(case), torch.zeros(2, 4000)
            rescale, entries, dropped = compact(
                lambda op, *args: op(*args), case, tile.clone(), None, labels, (*state, None),
                (hidden, weight), tail,
            )  # fmt: skip
            results.append((*state, tail, rescale, *entries, dropped))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_extension
def test_refuses_what_does_not_fit():
    case = Case("", (4, 10, 8), F32)
    hidden, weight, tile, _, labels = tile_of(case)
    state, tail = (*fresh(case), None), torch.zeros(2, 10)

    def call(inputs=(None, None), tail=tail):
        return compact(lambda op, *args: op(*args), case, tile, None, labels, state, inputs, tail)

    with pytest.raises(RuntimeError, match="hidden must be"):
        call((hidden[:3], weight))
    with pytest.raises(RuntimeError, match="go together"):
        call((hidden, None))
    with pytest.raises(RuntimeError, match=r"tail must be \(G, C\) = \(1 or 2"):
        call(tail=torch.zeros(2, 9))
    with pytest.raises(RuntimeError, match=r"tail must be \(G, C\) = \(1 or 2"):
        call(tail=torch.zeros(3, 10))
    with pytest.raises(RuntimeError, match="must be Float"):
        call(tail=tail.double())
