"""From a problem to its results: select the scored rows, choose, allocate, run a loop, scatter.

    exact_forward, sparse_forward    log-probs, and what the backward needs
    hidden_gradient_                 g, of the forward, becomes dhidden in place
    exact_head_gradient,
    sparse_head_gradient             dW and db

The loops are `tile_loop.py` and those of `gpu/` (exact), and those of `sparse/`. Allocations do not
depend on which rows are scored: the registered ops allocate the same while they are traced.
"""

import importlib
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orpo_kernels.engine import tile_loop
from orpo_kernels.engine.budget import accumulation_dtype, spans, sufficient
from orpo_kernels.engine.gpu.card import card_of
from orpo_kernels.engine.gpu.model import Job
from orpo_kernels.engine.gpu.plan import plan_backward
from orpo_kernels.engine.host_copy import HostCopy
from orpo_kernels.engine.operands import Coefficients, Head, Operands, Statistics
from orpo_kernels.engine.policy import (
    choose,
    choose_on_gpu,
    describe_sparse,
    kept_count,
    runs_on_gpu,
    say,
    says_why,
)
from orpo_kernels.engine.problem import Problem
from orpo_kernels.engine.scoring import Places, Scored, Selection, score, select, select_again
from orpo_kernels.engine.sparse import tile_loop as sparse_tile_loop
from orpo_kernels.engine.sparse.plan import SparsePlan, plan_sparse, takes_slots
from orpo_kernels.engine.sparse.tail import Packed, Tail, certificate_fields
from orpo_kernels.engine.sparse.weight_gradient import Kept, sparse_weight_gradient
from orpo_kernels.engine.tile_loop import Results
from orpo_kernels.engine.weight_gradient import Factors, HeadGradients, Work, weight_gradient
from orpo_kernels.kernels.slot_store import KEPT_ROUNDING, SlotStore

_STRIP_BYTES = 2**24  # of the backward of hidden: a few MiB are as fast as more


class ExactState(NamedTuple):
    """What an exact forward leaves for the backward, besides the problem."""

    statistics: Tensor  # (7, N)
    g: Tensor  # (N, H), or (0, H) where hidden needs no gradient
    g_r: Tensor  # (N, r), or (0, r)
    kept: Tensor  # (N', V) E of the first scored rows, of the others it is recomputed
    places: Tensor  # these two: of `Places`
    number: Tensor


class SparseState(NamedTuple):
    """What a sparse forward leaves for the backward, besides the problem."""

    statistics: Tensor  # (8, N)
    g: Tensor
    g_r: Tensor
    product: Tensor  # (G, H + r) q W
    sums: Tensor  # (G, V) of the tail; (G, 0) where the head is not trained
    store: Tensor  # these three: of `Packed`; of slots `SlotStore`, and nothing by block
    table: Tensor
    per_block: Tensor
    places: Tensor  # these two: of `Places`
    number: Tensor


def exact_state(problem: Problem, *, needs_dhidden: bool) -> ExactState:
    """Its memory, zeros but for the E that is kept."""
    sizes = problem.sizes(0)
    rows = kept_count(problem, needs_dhidden=needs_dhidden)
    kept_shape = (rows, sizes.pitch(sizes.vocabulary))
    return ExactState(
        *_row_results(problem, 7, needs_dhidden=needs_dhidden),
        problem.hidden.new_empty(kept_shape, dtype=problem.dtype),
        *Places.empty(problem),
    )  # fmt: skip


def sparse_state(problem: Problem, plan: SparsePlan, *, needs_dhidden: bool) -> SparseState:
    """Its memory: zeros, but for the store, and no entry of the table."""
    hidden, count, has_store = problem.hidden, problem.count, plan.store_bytes > 0
    sizes, G, wide = problem.sizes(0), problem.group_count, accumulation_dtype(problem.dtype)
    statistics, g, g_r = _row_results(problem, 8, needs_dhidden=needs_dhidden)
    return SparseState(
        statistics, g, g_r,
        _zeros(hidden, (G, sizes.hidden_columns if needs_dhidden else 0), wide),
        _zeros(hidden, (G, sizes.vocabulary if problem.trainable else 0), wide),
        hidden.new_empty(plan.store_bytes, dtype=torch.uint8),
        hidden.new_full((plan.items if has_store else 0, 2), -1, dtype=torch.int64),
        _zeros(hidden, (plan.blocks if has_store and not plan.slots else 0, 2, count), wide),
        *Places.empty(problem),
    )  # fmt: skip


def _row_results(
    problem: Problem, figures: int, *, needs_dhidden: bool
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, count = problem.hidden, problem.count
    low_rank, g_rows = problem.hidden_r, count if needs_dhidden else 0
    rank, like = (0, hidden) if low_rank is None else (low_rank.shape[-1], low_rank)
    return (
        hidden.new_zeros((figures, count), dtype=accumulation_dtype(problem.dtype)),
        _zeros(hidden, (g_rows, hidden.shape[-1])),
        _zeros(like, (g_rows, rank)),
    )


def _zeros(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Zeros beside a tensor; no launch where there is no element."""
    new = like.new_empty(shape, dtype=dtype or like.dtype)
    return new.zero_() if new.numel() > 0 else new


def exact_forward(problem: Problem, *, needs_dhidden: bool) -> tuple[Tensor, ExactState]:
    """Log-probs (K, ...), 0 where a label set does not score, and what the backward needs."""
    scored = _scored(problem)
    # Before the device is waited for: it has these to fill in the meantime.
    state = exact_state(problem, needs_dhidden=needs_dhidden)
    operands = select(problem, scored)
    sizes = operands.sizes
    if sizes.rows < state.kept.shape[0]:
        state.kept[sizes.rows :].zero_()  # of no row, but an output
    Places(state.places, state.number).note(operands)
    if sizes.rows > 0:
        needs = {"needs_dhidden": needs_dhidden, "needs_dweight": problem.trainable}
        kept, out = _kept_rows(state.kept, operands), Results(*state[:3])
        if runs_on_gpu(problem):
            _exact_on_gpu(problem, operands, kept, out, needs_dhidden=needs_dhidden)
        else:
            decision = sufficient(
                lambda budget: choose(
                    sizes, budget, kept=_kept_of(problem, budget, needs_dhidden), **needs
                ),
                problem.budget,
            )
            say(decision)
            tile_loop.forward(operands, decision.plan, kept, out)
    return scored.logps(Statistics.of(state.statistics)).view(problem.labels.shape), state


def _exact_on_gpu(
    problem: Problem, operands: Operands, kept: Tensor | None, out: Results, *, needs_dhidden: bool
) -> None:
    job, device = _job(problem, operands), operands.sizes.device
    decision, plan = sufficient(
        lambda budget: choose_on_gpu(
            job, device, budget,
            kept=0 if kept is None else _kept_of(problem, budget, needs_dhidden),
            needs_dhidden=needs_dhidden, needs_dweight=problem.trainable,
        ),
        problem.budget,
    )  # fmt: skip
    say(decision)
    _on_gpu().exact_forward(operands, plan, kept, out)


def _kept_of(problem: Problem, budget: int, needs_dhidden: bool) -> int:
    """`kept_count`, had the problem that budget."""
    if budget != problem.budget:
        problem = replace(problem, workspace_bytes=budget)
    return kept_count(problem, needs_dhidden=needs_dhidden)


def sparse_forward(problem: Problem, *, needs_dhidden: bool) -> tuple[Tensor, Tensor, SparseState]:
    """Log-probs (K, ...), the certificate (5,), and what the backward needs."""
    scored, plan = _scored(problem), sparse_plan(problem)
    selection, prepared = Selection(problem, scored), None
    if plan.scan is not None and problem.count > 0:
        selection.ask()
        prepared = _scan_loop().Prepared(selection.candidates, plan.scan)
    # Before the device is waited for, as in `exact_forward`.
    state = sparse_state(problem, plan, needs_dhidden=needs_dhidden)
    sums = state.sums
    if not problem.trainable:  # scratch, for a head that is not trained
        sums = state.statistics.new_zeros((problem.group_count, problem.weight.shape[0]))
    operands = selection.operands
    Places(state.places, state.number).note(operands)
    sizes, certificate = operands.sizes, None
    if sizes.rows > 0:
        if says_why():
            say(describe_sparse(sizes, plan, problem.budget, trainable=problem.trainable))
        tail = Tail.of(problem, operands, sums)
        packed = Packed(state.store, state.table, state.per_block) if plan.store_bytes else None
        out = Results(state.statistics, state.g, state.g_r)
        if prepared is not None:
            kept = _scanned(problem, plan, operands, prepared, tail, out, packed, state.product)
        else:
            kept = sparse_tile_loop.forward(operands, plan, tail, packed, out)
            if needs_dhidden:
                state.product.copy_(tail.product(operands.head, plan.tile.columns))
        rounding = KEPT_ROUNDING if plan.slots else 0.0
        certificate = certificate_fields(problem, scored, state.statistics, kept, rounding)
    if certificate is None:
        certificate = state.statistics.new_zeros(5, dtype=torch.float32)
    logps = scored.logps(Statistics.of(state.statistics)).view(problem.labels.shape)
    return logps, certificate, state


def _scanned(
    problem: Problem, plan: SparsePlan, operands: Operands, prepared: Any, tail: Tail, out: Results,
    packed: Packed | None, product: Tensor,
) -> Tensor:  # fmt: skip
    """Kept entries, counted in parts; flat logits are left to the exact loop, which keeps all.

    `prepared`: of `scan_loop.Prepared`, which this takes over.
    """
    store = _slot_store(plan, packed)
    found = _scan_loop().forward(operands, prepared, tail, out, store)
    if found is None:
        exact, left = Results(out.statistics[:-1], *out[1:]), problem.budget - plan.store_bytes
        _exact_on_gpu(
            replace(problem, workspace_bytes=left), operands, None, exact,
            needs_dhidden=out.wants_g,
        )  # fmt: skip
        sizes = operands.sizes
        return out.statistics.new_full((1,), sizes.rows * sizes.vocabulary, dtype=torch.int64)
    kept: Tensor = found[0]
    if found[1] is not None:
        product.copy_(found[1])
    return kept


def _slot_store(plan: SparsePlan, packed: Packed | None) -> SlotStore | None:
    """What a trainable head keeps of its slots, None where it keeps nothing."""
    if packed is None or plan.store_bytes == 0:
        return None
    return SlotStore.of(packed.store, packed.table, remade=plan.remakes)


def sparse_plan(problem: Problem) -> SparsePlan:
    """How the budget of a sparse call is divided, whichever of its rows are scored."""
    sizes = problem.sizes(problem.count)
    groups = problem.group_count
    slots = takes_slots(sizes) and problem.in_rows

    def plan(budget: int) -> SparsePlan:
        return plan_sparse(sizes, groups, budget, trainable=problem.trainable, slots=slots)

    return sufficient(plan, problem.budget)


def hidden_gradient_(
    problem: Problem,
    dlogps: Tensor,
    statistics: Tensor,
    g: tuple[Tensor, Tensor],
    product: Tensor | None = None,
) -> None:
    """Turns g and its low-rank part into dhidden: a (1 - p) g, and the entries of two labels.

    With `product`, q W (G, H + r) of the sparse gradient, g is first completed by it: row t lacks
    `statistics.dropped[t]` times the row of its group.
    """
    if runs_on_gpu(problem):
        _on_gpu().hidden_gradient_(problem, dlogps, statistics, g, product)
        return
    scored = score(problem.labels, problem.ignore_index)
    figures, a = Statistics.of(statistics), scored.coefficients(dlogps)
    head = Head(problem.weights, problem.bias, problem.transform, problem.dtype)
    first, second = scored.labels
    moved = None if second is None else torch.where(second >= 0, figures.moved(a), 0.0)
    factor = a.total * figures.beside
    # Widened rows, entries of both labels and their casts.
    row_bytes = (g[0].shape[1] + g[1].shape[1]) * factor.element_size() * 6
    step = max(1, min(problem.budget, _STRIP_BYTES) // max(1, row_bytes))
    for start, stop in spans(g[0].shape[0], step):
        wide = factor[start:stop, None] * torch.cat([each[start:stop] for each in g], 1)
        if product is not None and figures.dropped is not None:
            share = factor[start:stop] * figures.dropped[start:stop]
            of_row = product
            if problem.groups is not None:
                of_row = product[problem.groups.reshape(-1)[start:stop]]
            wide -= share[:, None] * of_row
        if second is not None and moved is not None:
            # Their difference first: what entries of the head have in common is not in it.
            entries = head.entries(first[start:stop], wide.dtype)
            entries *= figures.first_slope[start:stop, None]
            others = head.entries(second[start:stop], wide.dtype)
            entries.addcmul_(others, figures.second_slope[start:stop, None], value=-1.0)
            wide.addcmul_(entries, moved[start:stop, None])
        g[0][start:stop] = wide[:, : g[0].shape[1]]
        g[1][start:stop] = wide[:, g[0].shape[1] :]


def exact_head_gradient(
    problem: Problem, dlogps: Tensor, statistics: Tensor, kept: Tensor, places: Places,
    out: HeadGradients,
) -> None:  # fmt: skip
    """Fills the gradients of the head, of an exact forward."""
    scored = score(problem.labels, problem.ignore_index)
    operands = select_again(problem, scored, places)
    if operands.sizes.rows == 0:
        _fill_nothing(out)
        return
    of_forward = (statistics, _kept_rows(kept, operands))
    if runs_on_gpu(problem):
        job, card = _job(problem, operands, out), card_of(kept.device)
        plan = plan_backward(job, problem.budget, card, kept.shape[0])
        _on_gpu().exact_head_gradient(problem, operands, of_forward, dlogps, plan, out)
        return
    figures, a = _of_rows(scored, operands, dlogps, statistics)
    budget = problem.budget - kept.numel() * kept.element_size()
    weight_gradient(operands, figures, a, of_forward[1], out, budget)


def sparse_head_gradient(
    problem: Problem, dlogps: Tensor, statistics: Tensor, sums: Tensor, packed: Packed,
    places: Places, out: HeadGradients,
) -> None:  # fmt: skip
    """Fills the gradients of the head, of a sparse forward."""
    plan, scored = sparse_plan(problem), score(problem.labels, problem.ignore_index)
    # Behind the forward: the device has more to do in the meantime.
    table = None if plan.slots else HostCopy(packed.table)
    operands = select_again(problem, scored, places)
    if operands.sizes.rows == 0:
        _fill_nothing(out)
        return
    tail = Tail.of(problem, operands, sums)
    if table is None:
        sizing = (_job(problem, operands, out), problem.budget - plan.store_bytes)
        gradient = importlib.import_module("orpo_kernels.engine.sparse.slot_gradient").head_gradient
        store = _slot_store(plan, packed)
        gradient(problem, operands, statistics, dlogps, tail, store, sizing, out)
        return
    figures, a = _of_rows(scored, operands, dlogps, statistics)
    if operands.places is not None:
        packed = packed._replace(per_block=packed.per_block[:, :, operands.places])
    packed = packed._replace(table=table.get())
    work = Work(operands, figures, Factors.of(operands, figures, a), out)
    kept = Kept.of(operands, packed, tail, plan, work)
    sparse_weight_gradient(work, kept, problem.budget)


def _scored(problem: Problem) -> Scored:
    return score(problem.labels, problem.ignore_index, problem.weight.shape[0], problem.groups)


def _of_rows(
    scored: Scored, operands: Operands, dlogps: Tensor, statistics: Tensor
) -> tuple[Statistics, Coefficients]:
    """Statistics and coefficients of the scored rows."""
    a, rows = scored.coefficients(dlogps), operands.places
    if rows is None:
        return Statistics.of(statistics), a
    return Statistics.of(statistics[:, rows]), a.take(rows)


def _job(problem: Problem, operands: Operands, out: HeadGradients | None = None) -> Job:
    """Sizes of the scored rows, as the plans of a GPU count them."""
    rows, chosen = operands.rows, operands.places is not None
    plain = len(rows.parts) == 1 and rows.parts[0].dtype == rows.dtype and rows.scored is None
    # Only of a matrix of the whole head can dW lend its memory.
    lends = out is not None and len(problem.weights) == 1 and out.weights[0] is not None
    return problem.job(operands.sizes, gathers=chosen or not plain, in_result=lends)


def _scan_loop() -> ModuleType:
    """The sparse forward of a GPU, imported likewise."""
    return importlib.import_module("orpo_kernels.engine.sparse.scan_loop")


def _on_gpu() -> ModuleType:
    """The loops of a GPU: imported with the first call that takes them, and triton with them."""
    return importlib.import_module("orpo_kernels.engine.gpu.call")


def _kept_rows(kept: Tensor, operands: Operands) -> Tensor | None:
    return kept[: operands.sizes.rows] if kept.shape[0] > 0 else None


def _fill_nothing(out: HeadGradients) -> None:
    """Nothing is scored: that has a gradient too."""
    for each in (*out.weights, out.bias):
        if each is not None:
            each.zero_()
