"""The engine and the real launchers for GPUs that are not here: what they would launch compiles."""

import itertools
import random

import pytest
import torch

from orpo_kernels.engine import mean_logits, run, scoring, weight_gradient
from orpo_kernels.engine.run import ExactState
from orpo_kernels.loss import orpo_loss_from_logps
from orpo_kernels.ops import exact

pytest.importorskip("triton")

from orpo_kernels.kernels import (
    column_sums,
    dense_rows,
    gather_matmul,
    gather_slots,
    given_back,
    keep_slots,
    linear_lse,
    live_columns,
    odds_ratio,
    pack_slots,
    pair_loss,
    scan,
    sequence_mean,
    slot_products,
    softmax_grad,
    softmax_stats,
    sum_products,
    tail_rows,
)
from tests.kernels.dryrun import PROCESSORS, SHARED_LIMIT, dryrun, resources

BUDGET = 64 * 2**20


@pytest.fixture
def launchers(monkeypatch):
    """The launchers where dispatch would put them: fake tensors dispatch to fakes."""
    monkeypatch.setattr(mean_logits, "softmax_stats", softmax_stats.softmax_stats)
    monkeypatch.setattr(weight_gradient, "softmax_grad_", softmax_grad.softmax_grad_)
    monkeypatch.setattr(weight_gradient, "column_sums", column_sums.column_sums)
    monkeypatch.setattr(scoring, "is_capturing", lambda device: True)  # nonzero has no fake
    # Nor can a count be read that the forward left.
    monkeypatch.setattr(
        run, "select_again", lambda problem, scored, places: scoring.select(problem, scored)
    )


def cuda(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="cuda")


def forward_and_backward(rows, H, V, *, sets=1, bias=False, trains=True, budget=BUDGET):
    """The op's own two functions, as autograd calls them."""
    dtype = torch.bfloat16
    hidden, weight = cuda(rows, H, dtype=dtype), cuda(V, H, dtype=dtype)
    labels = cuda(sets, rows, dtype=torch.int64)
    bias = cuda(V, dtype=dtype) if bias else None
    inputs, options = (hidden, weight, labels, bias, None, None), (1.0, None, -100, dtype, budget)
    _, *state = exact.exact_linear_logps._init_fn(*inputs, *options, True, trains, True)
    state = ExactState(*state)
    if not trains:
        return
    dlogps = cuda(sets, rows, dtype=torch.float32)
    wanted = [True, bias is not None, False]
    left = (state.statistics, state.kept, state.places, state.number)
    exact.exact_linear_logps_dweight._init_fn(dlogps, *left, *inputs, *options, wanted)


@pytest.mark.parametrize("architecture", [80, 89, 90])
def test_shapes_of_real_heads(launchers, architecture):
    with dryrun(architecture) as log:
        # Llama 3, Qwen 2.5, Gemma, and a vocabulary and a hidden size no vector divides.
        for V, H in itertools.product((128256, 151936, 262144, 32003), (4096, 4097)):
            forward_and_backward(300, H, V, trains=False)
            forward_and_backward(300, H, V, bias=True, budget=32 * BUDGET)  # E kept
        forward_and_backward(300, 4097, 32003)  # and recomputed
    names = {launch.name for launch in log}
    assert {"_label_terms_kernel", "_finish_rows_kernel", "_weight_probs_kernel"} <= names
    for compiled in {id(each.compiled): each.compiled for each in log}.values():
        figures = resources(compiled)
        assert figures.spills == 0
        assert figures.shared_bytes <= SHARED_LIMIT[architecture]


def test_a_short_tile_fills_the_device():
    # R = 128 rows on 132 processors: split; R = 4096: a program per row, and none of them idle.
    with dryrun(90) as log:
        for rows in (128, 4096):
            tile, labels = cuda(rows, 128256), cuda(1, rows, dtype=torch.int64)
            softmax_stats.softmax_stats(tile, None, labels, 0, 1.0, None)
    grids = [each.grid[0] for each in log if each.name == "_softmax_stats_kernel"]
    assert 4 * 132 <= grids[0] <= 16 * 132
    assert grids[1] == 4096


@pytest.mark.parametrize("with_logit_sum", [False, True])
def test_the_warm_up_loads_what_a_captured_graph_may_need(with_logit_sum):
    # Nothing can be loaded during capture, where fewer rows may be split than were before.
    softmax_stats._load_combination.cache_clear()
    with dryrun(90) as log:
        for _ in range(2):
            tile, labels = cuda(4096, 32003), cuda(1, 4096, dtype=torch.int64)
            softmax_stats.softmax_stats(tile, None, labels, 0, 1.0, None, with_logit_sum)
        assert [each.name for each in log].count("_softmax_stats_combine_kernel") == 1
        tile, labels = cuda(8, 32003), cuda(1, 8, dtype=torch.int64)
        softmax_stats.softmax_stats(tile, None, labels, 0, 1.0, None, with_logit_sum)
    combined = [each.compiled for each in log if each.name == "_softmax_stats_combine_kernel"]
    assert len(combined) == 2
    assert combined[0] is combined[1]
    softmax_stats._load_combination.cache_clear()


def test_the_loss_waits_for_nothing():
    # Of a device that is not there nothing can be read: item(), nonzero and branches raise.
    with dryrun(90):
        labels, nll_labels = (cuda(8, 40, dtype=torch.int64) for _ in range(2))
        logps, nll_logps = (cuda(8, 40, dtype=torch.float32) for _ in range(2))
        out = orpo_loss_from_logps(logps, labels, nll_logps, nll_labels)
        with pytest.raises(RuntimeError):
            float(out.loss)


@pytest.mark.parametrize("architecture", [80, 89, 90])
def test_linear_lse_on_real_heads(architecture):
    # Llama 3, Qwen 2.5, Gemma, and an odd vocabulary; a hidden size no vector divides; one row,
    # a chunk, and a batch: neither is part of what is compiled.
    with dryrun(architecture) as log:
        for H in (4096, 4097):
            for V in (128256, 151936, 262144, 32003):
                for rows in (1, 300, 8192):
                    hidden, weight = cuda(rows, H), cuda(V, H)
                    labels = cuda(1, rows, dtype=torch.int64)
                    results = linear_lse.linear_lse(hidden, weight, None, labels, 1.0, None, False)
                    assert [each.numel() for each in results] == [rows, rows, rows, 0]
    compiled: dict[str, set[int]] = {}
    for launch in log:
        compiled.setdefault(launch.name, set()).add(id(launch.compiled))
    # Operands in vectors, and not.
    assert {name: len(found) for name, found in compiled.items()} == {
        "_linear_lse_kernel": 2, "_label_dots_kernel": 2, "_softmax_stats_combine_kernel": 1,
    }  # fmt: skip
    for each in {id(launch.compiled): launch.compiled for launch in log}.values():
        figures = resources(each)
        assert figures.spills == 0
        assert figures.shared_bytes <= SHARED_LIMIT[architecture]
    grids = [launch.grid[0] for launch in log if launch.name == "_linear_lse_kernel"]
    assert max(grids) >= PROCESSORS[architecture]


@pytest.mark.parametrize("V", [8192, 8209])  # rows on vector boundaries, and not
def test_few_variants_over_many_lengths(launchers, V):
    rng = random.Random(0)
    variants: dict[str, set[int]] = {}
    with dryrun(89) as log:
        for _ in range(50):
            T = rng.randrange(2, rng.choice((60, 2000)))  # few rows are split, more are not
            P = rng.randrange(1, 9)
            forward_and_backward(T, 64, V, sets=2, bias=True, budget=2 * BUDGET)
            options = {"softcap": 30.0, "workspace_bytes": BUDGET}
            mean_logits.mean_logits(cuda(2 * P, T, 64), cuda(V, 64), **options)
            logps, labels = (cuda(2 * P, T, dtype=each) for each in (torch.float32, torch.int64))
            found = sequence_mean.sequence_mean(logps, labels, logps, labels, -100, None, 2 * P)
            dmean = pair_loss.pair_loss(*found, None, None, 0.1, True, True)[-1]
            sequence_mean.sequence_mean_backward(dmean, found[1], labels, labels, -100, None)
            pairs = [cuda(2 * P, dtype=torch.float32).narrow(0, i * P, P) for i in (0, 1)]
            odds_ratio.odds_ratio_backward(*pairs, *odds_ratio.odds_ratio(*pairs))
        for launch in log:
            variants.setdefault(launch.name, set()).add(id(launch.compiled))
    assert len(variants) >= 6
    assert {name: len(found) for name, found in variants.items() if len(found) > 3} == {}


def test_no_size_is_part_of_a_variant():
    modules = (
        softmax_stats, softmax_grad, column_sums, linear_lse, sequence_mean, odds_ratio, pair_loss,
        gather_matmul, keep_slots, slot_products, sum_products, given_back, scan, live_columns,
        pack_slots, dense_rows, gather_slots, tail_rows,
    )  # fmt: skip
    kernels = {
        each.__name__: each for module in modules for name, each in vars(module).items()
        if name.endswith("_kernel") and hasattr(each, "params")
    }  # fmt: skip
    assert len(kernels) == 25
    for kernel in kernels.values():
        runtime = [each for each in kernel.params if not each.is_constexpr]
        numbers = [each for each in runtime if not each.name.endswith("_ptr")]
        floats = {"logit_scale", "log2_scale", "softcap", "eps", "beta"}  # never specialised
        assert {e.name for e in numbers if not e.do_not_specialize} <= floats, kernel.__name__
        constants = {each.name for each in kernel.params if each.is_constexpr}
        assert not constants & {"P", "N", "T", "R", "C", "V", "H"}
