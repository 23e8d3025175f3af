"""Row kernels in the strict interpreter against float64: dtypes, options, every edge of a row."""

import mmap

import numpy as np
import pytest
import torch

from orpo_kernels import reference
from orpo_kernels.engine import scoring, tiles
from orpo_kernels.engine.problem import Problem, Transform
from orpo_kernels.kernels import tuning
from orpo_kernels.kernels.choose_rows import choose_rows
from tests.helpers import assert_accurate, assert_logit_sums
from tests.kernels.interpreted.plugin import launches

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows, columns, row stride), each with the reason it is here.
SHAPES = [
    pytest.param(1, 1, 1, id="one logit"),
    pytest.param(3, 7, 7, id="shorter than a vector: no body"),
    pytest.param(2, 9000, 9000, id="splits, a ragged last block, rows on vector boundaries"),
    pytest.param(5, 9003, 9003, id="every row starts elsewhere in a vector, and has a remnant"),
    pytest.param(2, 4099, 8195, id="rows of a wider matrix, odd stride"),
    pytest.param(3, 4096, 4104, id="one whole block, padded rows"),
    pytest.param(25, 70, 70, id="more rows than processors: one program each"),
]
OPTIONS = [
    pytest.param(1.0, None, False, id="plain"),
    pytest.param(0.3, None, True, id="scale and bias"),
    pytest.param(1.7, 2.0, True, id="scale, bias and softcap"),
    pytest.param(-0.5, 30.0, False, id="negative scale and softcap"),
]


def tile(rows, columns, stride, dtype):
    """Logits in memory that ends with the last of them, and starts with the first."""
    storage = torch.full(((rows - 1) * stride + columns,), torch.nan).to(dtype)
    logits = storage.as_strided((rows, columns), (stride, 1))
    logits.copy_(torch.randn(rows, columns) * 4)
    return logits


def labels_of(sets, rows, columns, first):
    labels = torch.randint(0, first + 2 * columns, (sets, rows))
    labels[0, 0] = first  # the first column, in the head of its row
    labels[0, -1] = first + columns - 1
    labels[-1, rows // 2] = -1
    return labels


@pytest.mark.parametrize(("scale", "softcap", "with_bias"), OPTIONS)
@pytest.mark.parametrize(("rows", "columns", "stride"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_stats_and_gradient(rows, columns, stride, dtype, scale, softcap, with_bias):
    sets = 1 + (columns % 2)
    logits = tile(rows, columns, stride, dtype)
    bias = torch.randn(columns).to(dtype) if with_bias else None
    labels = labels_of(sets, rows, columns, 11)
    wide = None if bias is None else bias.double()
    z, slope = reference.tile_logits(logits.double(), wide, labels, 11, scale, softcap)
    before = len(launches)
    args = (logits, bias, labels, 11, scale, softcap)
    row_max, sum_exp, logit_sum = tiles.softmax_stats(*args, with_logit_sum=True)
    *same, not_asked = tiles.softmax_stats(*args)
    # The maximum in any blocks; sums are of smaller ones when a third figure is kept.
    assert torch.equal(same[0], row_max)
    torch.testing.assert_close(same[1], sum_exp, rtol=1e-6, atol=0)
    assert not_asked.shape == (0,)
    assert_logit_sums(logit_sum, logits, bias, scale, softcap)
    some = ~torch.isinf(z).all(1)
    if some.any():
        assert_accurate(row_max[some], z.amax(1)[some])
    truth = torch.exp(z[some] - row_max[some].double()[:, None]).sum(1)
    torch.testing.assert_close(sum_exp[some].double(), truth, rtol=3e-6, atol=0)
    assert not sum_exp[~some].any()

    level = row_max + 0.5
    true = reference.softmax_grad(z, slope, level.double())
    # Strides alike, and rows of out that start elsewhere in a vector.
    for out_dtype, extra in ((torch.float32, 0), (torch.bfloat16, 0), (torch.float16, 3)):
        out = tile(rows, columns, stride + extra, out_dtype)
        tiles.softmax_grad_(logits, bias, labels, 11, level, scale, softcap, out)
        close(out, true)
    tiles.softmax_grad_(logits, bias, labels, 11, level, scale, softcap)
    close(logits, true)
    assert launches[before:] == 2 * ["softmax_stats"] + 4 * ["softmax_grad"]


def close(found, true):
    # Relative to float32's exp of a rounded difference, |z - reference| eps; then one rounding.
    eps = torch.finfo(found.dtype).eps / 2 + 1e-5
    tiny = 6e-8 if found.dtype == torch.float16 else 1e-15  # half of float16's smallest step
    torch.testing.assert_close(found.double(), true, rtol=eps, atol=tiny)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_column_sums(dtype):
    # Ragged in both directions, split over rows; then a strided view whose rows are aligned.
    wide = torch.randn(131, 1608).to(dtype)
    for view in (wide[:, :1501], wide[2:, 8:1032], torch.randn(9, 33).to(dtype)):
        weights = torch.randn(view.shape[0])
        found = tiles.column_sums(view, weights)
        truth = reference.column_sums(view.double(), weights.double())
        torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-5)
        assert torch.equal(tiles.column_sums(view, torch.stack((weights, weights)))[1], found)


def test_rows_beyond_2_31_elements():
    # The third row starts past what int32 can count; nobody touches the memory between the rows.
    columns, stride = 1000, 2**30 + 5
    memory = mmap.mmap(-1, 2 * (2 * stride + columns), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    storage = torch.from_numpy(np.frombuffer(memory, np.int16)).view(torch.bfloat16)
    logits = storage.as_strided((3, columns), (stride, 1))
    logits.copy_(torch.randn(3, columns))
    truth, labels, weights = logits.double(), labels_of(1, 3, columns, 0), torch.randn(3)
    sums = tiles.column_sums(logits, weights)
    assert_accurate(sums, reference.column_sums(truth, weights.double()))
    z, slope = reference.tile_logits(truth, None, labels, 0, 1.0, None)
    row_max, *_ = tiles.softmax_stats(logits, None, labels, 0, 1.0, None)
    assert_accurate(row_max, z.amax(1))
    tiles.softmax_grad_(logits, None, labels, 0, row_max, 1.0, None)
    close(logits, reference.softmax_grad(z, slope, row_max.double()))


def test_extremes():
    logits = torch.zeros(4, 5000)
    logits[0] = -torch.inf  # every token masked out by the model
    logits[1] -= 1e4  # far from 0: only differences matter
    logits[2, 4000] = 80.0
    logits[3, 17] = torch.nan
    none = torch.full((1, 4), -1)
    row_max, sum_exp, _ = tiles.softmax_stats(logits, None, none, 0, 1.0, None)
    assert row_max.tolist()[:3] == [torch.finfo(torch.float32).min, -1e4, 80.0]
    assert sum_exp.tolist()[:2] == [0.0, 5000.0]
    assert sum_exp[2] == 1.0
    assert torch.isnan(sum_exp[3])


def test_same_bits_in_any_order():
    # Programs run in another order each time; partials are combined in one.
    logits, none = tile(2, 20000, 20000, torch.bfloat16), torch.full((2, 2), -1)
    first = tiles.softmax_stats(logits, None, none, 0, 1.0, None, with_logit_sum=True)
    for _ in range(3):
        again = tiles.softmax_stats(logits, None, none, 0, 1.0, None, with_logit_sum=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_without_a_kernel_the_plain_form():
    before = len(launches)
    three, none = torch.full((3, 4), -1), torch.full((1, 4), -1)
    tiles.softmax_stats(torch.randn(4, 9).double(), None, none, 0, 1.0, None)
    tiles.softmax_stats(torch.randn(4, 9), None, three, 0, 1.0, None)
    tiles.softmax_stats(torch.randn(9, 4).t(), None, none, 0, 1.0, None)
    tiles.softmax_stats(torch.randn(0, 9), None, none[:, :0], 0, 1.0, None)
    assert len(launches) == before


def test_smaller_row_when_resources_run_out(monkeypatch):
    key = ("softmax_stats", "datacenter", torch.float32)
    tried = []

    def run(row, device):
        tried.append(row)
        if row == tuning.TABLE[key][0]:
            raise tuning.OutOfResources(300000, 101376, "shared memory")
        return row

    monkeypatch.setattr(tuning, "_first_row", {})
    with pytest.warns(RuntimeWarning, match="does not fit this device"):
        tuning.launch(key[0], key[2], torch.device("cpu"), run)
    # Remembered, and said once (warnings are errors in this file's run).
    assert tuning.launch(key[0], key[2], torch.device("cpu"), run) == tuning.TABLE[key][1]
    assert tried == [tuning.TABLE[key][i] for i in (0, 1, 1)]


def problem_of(labels, groups):
    return Problem(
        torch.zeros(labels.shape[1], 8), torch.zeros(50, 8), labels, None, None, None, Transform(),
        -100, torch.float32, None, False, groups,
    )  # fmt: skip


def chosen(labels, groups):
    problem = problem_of(labels, groups)
    scored = scoring.score(labels, -100, 50, groups)
    return scored, scoring.select(problem, scored)


# Two blocks of 64 positions and 3 of a third; 70 blocks, whose counts are summed in two steps.
@pytest.mark.parametrize("count", [131, 4470])
@pytest.mark.parametrize("sets", [1, 2])
@pytest.mark.parametrize("with_groups", [False, True])
def test_score_and_choose_rows(monkeypatch, sets, with_groups, count):
    monkeypatch.setitem(
        tuning.TABLE, ("score_rows", "datacenter", torch.int64), (tuning.Row(64, 4),)
    )
    # Each set ignores some, the sets agree on some; of the second block nothing is scored.
    labels = torch.randint(0, 50, (sets, count))
    labels[:, ::3] = 7
    labels[0, ::4], labels[-1, ::5], labels[:, 64:128] = -100, -100, -100
    groups = torch.randint(0, 2, (count,)) if with_groups else None
    before = len(launches)
    found, rows = chosen(labels, groups)
    assert launches[before:] == ["score_rows", "choose_rows"]
    with monkeypatch.context() as plain:
        plain.setattr(scoring, "runs_triton", lambda device, dtype: False)
        expected, expected_rows = chosen(labels, groups)
    assert torch.equal(found.masks, expected.masks)
    assert torch.equal(rows.places, expected_rows.places)
    # Of the others too: a first product takes rows before it is known how many are scored.
    second = found.labels.second
    places = choose_rows(found.labels.first, second, groups, found.counts).places
    others = (found.labels.first < 0).nonzero()[:, 0]
    assert torch.equal(places, torch.cat((expected_rows.places, others.flip(0))))
    for one, other in ((found.labels, expected.labels), (rows.labels, expected_rows.labels)):
        assert torch.equal(one.first, other.first)
        assert (one.second is None) == (sets == 1)
        if sets == 2:
            assert torch.equal(one.second, other.second)
    if with_groups:
        assert torch.equal(rows.groups, groups[expected_rows.places])


@pytest.mark.parametrize("at", [0, 130])  # of the first block and of the ragged last one
def test_what_is_no_label_or_group_is_refused_after_the_wait(monkeypatch, at):
    monkeypatch.setitem(
        tuning.TABLE, ("score_rows", "datacenter", torch.int64), (tuning.Row(64, 4),)
    )
    groups = torch.zeros(131, dtype=torch.int64)
    for bad in (50, -1):
        labels = torch.full((2, 131), 3)
        labels[-1, at] = bad
        with pytest.raises(ValueError, match=f"got {bad}; is the tokenizer larger"):
            chosen(labels, groups)
    groups[at] = 2
    with pytest.raises(ValueError, match="tail_groups must be 0 or 1"):
        chosen(torch.full((1, 131), 3), groups)
