"""The op of `linear_logps(..., gradient="sparse")`: log-probs, and gradients from kept entries.

    dhidden_t = a_t (share W[y_t] - sum over kept v of p_tv W_v - m_t q W)
    dW_v = sum_t a_t (share 1[v = y_t] - p_tv where kept) h_t - q_v sum_t a_t m_t h_t

The formulae, and what is kept, are in `engine/sparse.py`. This file registers the op (schema, fake,
autograd) with the dispatcher. Without a gradient nothing is sparse: `linear_logps` then calls its
exact op.
"""

from typing import Any

import torch
from torch import Tensor

from orpo_kernels.engine.chunks import spans, workspace_budget
from orpo_kernels.engine.guard import density_guard
from orpo_kernels.engine.policy import choose_sparse, says_why
from orpo_kernels.engine.segments import Arriving, SegmentWeightGradient, SlotForward
from orpo_kernels.engine.selection import (
    Scored,
    Selection,
    is_capturing,
    problem_sizes,
    refuse_other_groups,
    refuse_out_of_range,
    score,
    select,
)
from orpo_kernels.engine.slots import KEPT_ROUNDING, takes_slots
from orpo_kernels.engine.sparse import (
    Packed,
    Sizing,
    SparseForward,
    Tail,
    even_plan,
    live_share,
    sizing,
)
from orpo_kernels.engine.sparse_weight import SparseWeightGradient
from orpo_kernels.engine.tiles import accumulation_dtype
from orpo_kernels.linear_logps_backward import (
    consumable,
    empty_weight_gradients,
    linear_logps_dhidden_,
    refuse_second_derivatives,
)


@torch.library.custom_op("orpo_kernels::sparse_linear_logps", mutates_args=())
def sparse_linear_logps(  # noqa: PLR0913 - a schema has no dataclasses
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    hidden_r: Tensor | None,
    weight_r: Tensor | None,
    groups: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    eps: float,
    ignore_index: int,
    compute_dtype: torch.dtype,
    workspace_bytes: int | None,
    needs_dhidden: bool,
    needs_dweight: bool,
    consume_g: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs (K, ...), certificate (5,), and what only the backward uses.

    That is: statistics (8, N), g (N, H) and its low-rank part (N, r), q W (G, H + r); for a
    trainable head the sums of the tail (G, V), and store, table and blocks of `Packed`.
    """
    with torch.amp.autocast(weight.device.type, enabled=False):
        refuse_out_of_range(labels, ignore_index, weight.shape[0])
        if groups is not None:
            refuse_other_groups(groups)
        scored = score(labels, ignore_index)
        options = (logit_scale, softcap, compute_dtype)
        chosen = select((hidden, hidden_r), (weight, weight_r), bias, scored, options)
        sized = _sizing(
            hidden, weight, labels, hidden_r, weight_r, groups, compute_dtype, workspace_bytes,
            needs_dweight,
        )  # fmt: skip
        certificate, statistics, g, g_r, product, sums, store, table, blocks = _empty_outputs(
            sized, hidden, weight, labels, hidden_r, groups, compute_dtype,
            needs_dhidden, needs_dweight,
        )  # fmt: skip
        if chosen.sizes.rows > 0 and says_why():
            budget = workspace_budget(workspace_bytes, weight.device)
            choose_sparse(chosen.sizes, sized, budget, needs_dweight=needs_dweight)
        if chosen.sizes.rows > 0:
            tail = Tail(eps, _groups_of(chosen, groups), _sums(sums, weight, groups, statistics))
            packed = Packed(store, table, blocks) if store.shape[0] > 0 else None
            gradients = (g, g_r) if needs_dhidden else None
            entries, rounding = _forward(chosen, sized, tail, statistics, gradients, packed)
            if needs_dhidden:
                product.copy_(tail.product(chosen.head.columns, sized.plan.columns))
            kept = entries[0] / weight.shape[0]
            certificate.copy_(_certificate(scored, statistics, kept, eps, logit_scale, rounding))
        return (
            scored.logps(statistics).view(labels.shape), certificate, statistics, g, g_r, product,
            sums, store, table, blocks,
        )  # fmt: skip


def _forward(
    chosen: Selection,
    sized: Sizing,
    tail: Tail,
    statistics: Tensor,
    gradients: tuple[Tensor, Tensor] | None,
    packed: Packed | None,
) -> tuple[Tensor, float]:
    """Fills what is given; how many entries were kept, (1,) int64, and how these are rounded."""
    sizes, weight = chosen.sizes, chosen.head.columns.parts[0]
    watched = sizes.device.type != "cpu" and not is_capturing(sizes.device)
    limit = live_share(sizes.device)
    dense = watched and not density_guard.allows(weight, limit)
    plan = even_plan(sized.dense if dense else sized.plan, sizes.rows)
    inputs = (chosen.rows, chosen.head, chosen.labels, sizes, plan, tail)
    in_slots, needs_g = sized.slots and not dense, gradients is not None
    forward = (
        SlotForward(*inputs, with_gradient=needs_g)
        if in_slots
        else SparseForward(*inputs, with_gradient=needs_g, dense=dense)
    )
    if sized.slots and dense:
        packed = None  # the table says of every chunk that it is not in the store
    for start, stop in spans(sizes.rows, plan.rows):
        chunk, g, blocks = forward.sparse_chunk(start, stop, packed)
        rows = slice(start, stop) if chosen.scored is None else chosen.scored[start:stop]
        statistics[:, rows] = chunk
        if packed is not None and blocks is not None:
            packed.blocks[:, :, rows] = blocks
        if g is not None and gradients is not None:
            width = gradients[0].shape[1]
            gradients[0][rows] = g[:, :width].to(gradients[0].dtype)
            if g.shape[1] > width:
                gradients[1][rows] = g[:, width:].to(gradients[1].dtype)
    if packed is not None and isinstance(forward, SlotForward):
        forward.finish(packed)
    if watched and not dense:
        share = forward.kept_entries / (sizes.rows * sizes.vocabulary)
        density_guard.record(weight, share)
    return forward.kept_entries, KEPT_ROUNDING if in_slots else 0.0


def _certificate(
    scored: Scored, statistics: Tensor, kept: Tensor, eps: float, scale: float, rounding: float
) -> Tensor:
    """The fields of `Certificate`, (5,) float32; `kept`: entries over the vocabulary.

    What was dropped may be as much more than m_t as the kept entries, `rounding` of each, were
    rounded up by. Their sum is that of all, at most `scale` times the mass beside the labels (with
    a softcap less), without m_t.
    """
    is_scored = scored.labels.first >= 0
    rows = is_scored.sum().clamp(min=1)
    mass = torch.where(is_scored, statistics[7] * statistics[2], 0.0)
    kept_sum = torch.where(is_scored, scale * statistics[2] - mass, 0.0).clamp(min=0.0)
    dropped = mass + rounding / (1.0 - rounding) * kept_sum
    residual = (eps * dropped.clamp(min=0.0)).sqrt()
    share = kept / rows
    fields = (share, mass.sum() / rows, mass.amax(), residual.sum() / rows, residual.amax())
    return torch.stack([each.to(torch.float32) for each in fields])


def _groups_of(chosen: Selection, groups: Tensor | None) -> Tensor:
    """Group of each scored row, -1 where a captured graph processes one that is not scored."""
    first = chosen.labels.first
    if groups is None:
        of_row = torch.zeros_like(first)
    else:
        flat = groups.reshape(-1)
        of_row = flat if chosen.scored is None else flat[chosen.scored]
    return torch.where(first >= 0, of_row, -1)


def _sums(sums: Tensor, weight: Tensor, groups: Tensor | None, statistics: Tensor) -> Tensor:
    """Where the tail is summed: the output, or scratch for a head that is not trained."""
    if sums.shape[1] > 0:
        return sums
    return statistics.new_zeros((_group_count(groups), weight.shape[0]))


def _group_count(groups: Tensor | None) -> int:
    return 1 if groups is None else 2


def _sizing(  # noqa: PLR0913 - as the schema
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    hidden_r: Tensor | None,
    weight_r: Tensor | None,
    groups: Tensor | None,
    compute_dtype: torch.dtype,
    workspace_bytes: int | None,
    needs_dweight: bool,
) -> Sizing:
    sizes = problem_sizes(
        labels[0].numel(), (hidden, hidden_r), (weight, weight_r), labels.shape[0], compute_dtype
    )
    budget = workspace_budget(workspace_bytes, weight.device)
    slots = takes_slots(sizes, (weight, weight_r))
    return sizing(sizes, _group_count(groups), budget, trainable=needs_dweight, slots=slots)


def _empty_outputs(  # noqa: PLR0913 - as the schema
    sized: Sizing,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    hidden_r: Tensor | None,
    groups: Tensor | None,
    compute_dtype: torch.dtype,
    needs_dhidden: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    count, wide, G = labels[0].numel(), accumulation_dtype(compute_dtype), _group_count(groups)
    H, r = hidden.shape[-1], 0 if hidden_r is None else hidden_r.shape[-1]
    g_rows, has_store = count if needs_dhidden else 0, sized.store_bytes > 0
    new, low_rank = hidden.new_zeros, hidden if hidden_r is None else hidden_r
    return (
        new(5, dtype=torch.float32),
        new((8, count), dtype=wide),
        new((g_rows, H)),
        low_rank.new_zeros((g_rows, r)),
        new((G, H + r if needs_dhidden else 0), dtype=wide),
        new((G, weight.shape[0] if needs_dweight else 0), dtype=wide),
        hidden.new_empty(sized.store_bytes, dtype=torch.uint8),
        hidden.new_full((sized.items if has_store else 0, 2), -1, dtype=torch.int64),
        new((sized.blocks if has_store else 0, 2, count), dtype=wide),
    )


@sparse_linear_logps.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    hidden, weight, labels, _, hidden_r, weight_r, groups = args[:7]
    compute_dtype, workspace_bytes, needs_dhidden, needs_dweight = args[11:15]
    sized = _sizing(
        hidden, weight, labels, hidden_r, weight_r, groups, compute_dtype, workspace_bytes,
        needs_dweight,
    )  # fmt: skip
    outputs = _empty_outputs(
        sized, hidden, weight, labels, hidden_r, groups, compute_dtype, needs_dhidden, needs_dweight
    )
    return outputs[1].new_empty(labels.shape), *outputs


@torch.library.custom_op("orpo_kernels::sparse_linear_logps_dweight", mutates_args=())
def _sparse_linear_logps_dweight(  # noqa: PLR0913 - a schema has no dataclasses
    dlogps: Tensor,
    statistics: Tensor,
    sums: Tensor,
    store: Tensor,
    table: Tensor,
    blocks: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    hidden_r: Tensor | None,
    weight_r: Tensor | None,
    groups: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    eps: float,
    ignore_index: int,
    compute_dtype: torch.dtype,
    workspace_bytes: int | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of weight (V, H), bias (V,) and weight_r (V, r); empty where `needs` says no."""
    with torch.amp.autocast(weight.device.type, enabled=False):
        results = empty_weight_gradients(weight, bias, weight_r, needs)
        scored = score(labels, ignore_index)
        options = (logit_scale, softcap, compute_dtype)
        arriving = Arriving(table)  # before the host waits for the count of the scored rows
        chosen = select((hidden, hidden_r), (weight, weight_r), bias, scored, options)
        if chosen.sizes.rows == 0:
            for result in results:
                result.zero_()  # nothing is scored: that has a gradient too
            return results
        a = scored.coefficients(dlogps)
        if chosen.scored is not None:
            a, statistics = a.take(chosen.scored), statistics[:, chosen.scored]
            blocks = blocks[:, :, chosen.scored]
        sized = _sizing(
            hidden, weight, labels, hidden_r, weight_r, groups, compute_dtype, workspace_bytes, True
        )
        tail = Tail(eps, _groups_of(chosen, groups), sums)
        dweight, dbias, dweight_r = (
            result if need else None for result, need in zip(results, needs, strict=True)
        )
        kind = SegmentWeightGradient if sized.slots else SparseWeightGradient
        gradient = kind(chosen.rows, chosen.head, chosen.labels, chosen.sizes, statistics[:7], a)
        gradient.sparse_run(
            [dweight] if weight_r is None else [dweight, dweight_r], dbias,
            Packed(store, arriving.get(), blocks), tail, sized,
            workspace_budget(workspace_bytes, weight.device),
        )  # fmt: skip
        return results


@_sparse_linear_logps_dweight.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_weight_gradients(args[7], args[9], args[11], args[19])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], *output[2:])
    ctx.options, ctx.had_gradient, ctx.consume_g = inputs[7:13], inputs[13], inputs[15]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for the outputs only the backward uses


def _backward(ctx: Any, dlogps: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
    inputs, kept = ctx.saved_tensors[:7], ctx.saved_tensors[7:]
    hidden, weight, labels, bias, hidden_r, weight_r, groups = inputs
    statistics, g, g_r, product, sums, store, table, blocks = kept
    needs = ctx.needs_input_grad
    refuse_second_derivatives()
    dhidden: Tensor | None = None
    dhidden_r: Tensor | None = None
    if needs[0] or needs[4]:
        g, g_r = consumable(g, g_r, ctx.had_gradient, ctx.consume_g)
        linear_logps_dhidden_(
            g, g_r, dlogps, statistics, weight, labels, weight_r, *ctx.options[3:], product, groups
        )
        dhidden = g.view(hidden.shape) if needs[0] else None
        dhidden_r = g_r.view(hidden_r.shape) if needs[4] else None
    wanted = [needs[1], needs[3], needs[5]]
    dweight = dbias = dweight_r = None
    if any(wanted):
        gradients = _sparse_linear_logps_dweight(
            dlogps, statistics, sums, store, table, blocks, hidden, weight, labels, bias,
            hidden_r, weight_r, groups, *ctx.options, wanted,
        )  # fmt: skip
        dweight, dbias, dweight_r = (
            each if need else None for each, need in zip(gradients, wanted, strict=True)
        )
    return dhidden, dweight, None, dbias, dhidden_r, dweight_r, *[None] * 10


sparse_linear_logps.register_autograd(_backward, setup_context=_setup_context)
