"""The one op between the model and the loss: token log-probs of a linear head, differentiable.

    z_t = softcap(scale * (h_t W^T + b)),   logp_t = z_t[y_t] - log sum exp z_t
    dhidden_t = a_t (d_y W[y_t] - sum_v p_tv d_tv W_v),   a_t = d loss / d logp_t
    dW_v = sum_t a_t d_tv (1[v = y_t] - p_tv) h_t

This file validates, chooses the rows that are scored, and registers the op (schema, fake, autograd)
with the dispatcher; `engine/` does the vocabulary-sized work.

dhidden without its factor per row, g, is computed in the forward; the backward scales it in place
unless the graph is kept (`retain_graph=True`), so hidden costs one gradient buffer and no more.
"""

from typing import Any

import torch
from torch import Tensor

from orpo_kernels.constants import DEFAULT_EPS, IGNORE_INDEX
from orpo_kernels.engine.chunks import spans, workspace_budget
from orpo_kernels.engine.exact import Forward
from orpo_kernels.engine.folded import Folded
from orpo_kernels.engine.policy import choose, keeps
from orpo_kernels.engine.selection import (
    Selection,
    problem_sizes,
    refuse_out_of_range,
    score,
    select,
)
from orpo_kernels.engine.tiles import accumulation_dtype
from orpo_kernels.engine.weight_gradient import WeightGradient
from orpo_kernels.linear_logps_backward import (
    consumable,
    empty_weight_gradients,
    linear_logps_dhidden_,
    refuse_second_derivatives,
)
from orpo_kernels.options import (
    Certificate,
    LogpsOptions,
    choose_compute_dtype,
    refuse_forward_mode,
    validate_operands,
)
from orpo_kernels.sparse_logps import sparse_linear_logps


def linear_logps(  # noqa: PLR0913 - the public signature
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | tuple[Tensor, Tensor],
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    gradient: str = "exact",
    eps: float = DEFAULT_EPS,
    tail_groups: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of `labels` under `softmax(softcap(logit_scale * (hidden @ weight.T + bias)))`.

    Args:
        hidden: (..., H) floating, hidden states; any strides.
        weight: (V, H) floating, the output projection; gets a gradient if it requires one.
        labels: (...) integer, the token scored from each hidden state (already shifted), or two
            such tensors scored in one pass.
        bias: (V,) floating, added to the raw logits.
        logit_scale: factor on the logits.
        softcap: c of `c * tanh(logits / c)`, applied after the scale; None: no cap.
        ignore_index: label of positions that are not scored; may lie inside [0, V).
        gradient: "exact"; or "sparse", for the price of the forward: probabilities over `eps` enter
            one by one, the others as their average, so that the error sums to 0 over the rows of a
            group. Where too many are over `eps`, rows are done the exact way. "auto": sparse where
            the GEMMs are 16-bit.
        eps: of the sparse gradient, 0 to 1. Smaller is closer to exact, and keeps more entries.
        tail_groups: (...) integer 0 or 1, of the sparse gradient: rows averaged together. Best are
            rows whose log-probs the loss pushes the same way. Default: all rows.
        compute_dtype: dtype of the GEMM operands; default: the autocast dtype when autocast is on,
            else the promoted dtype of `hidden` and `weight`. On a CPU float16 runs in float32.
        workspace_bytes: what may be allocated beyond inputs, results and gradients, in bytes;
            default: 64 MiB, or 1 % of the device's memory where that is more.
        low_rank: (hidden_r (..., r), weight_r (V, r)); adds `hidden_r @ weight_r.T` to the raw
            logits, with gradients to both: a LoRA on the head.

    Returns:
        (...) float32 (float64 when computed in float64), nats, <= 0, and 0 where ignored; a tuple
        when `labels` is one.

    Raises:
        TypeError: not floating point (a quantised weight), labels that are not integer, an option
            of another type.
        ValueError: shapes that do not match, a label outside [0, V) (CPU tensors; on other devices
            a device-side assertion), an option out of range, a workspace too small for one tile, a
            scale that is not positive with gradient="sparse".
        NotImplementedError: second or forward-mode derivatives.

    Note:
        Never allocates (N, V). Unscored rows are dropped before any GEMM (choosing them syncs a GPU
        once in the forward, and once in the backward of a trainable head). Deterministic.

    Source:
        arXiv 2403.07691, equation 1 (token log-probs); derivation in docs/mathematics.md.
    """
    options = LogpsOptions(
        logit_scale, softcap, ignore_index, gradient, eps, tail_groups, compute_dtype,
        workspace_bytes, low_rank,
    )  # fmt: skip
    return certified_logps(hidden, weight, labels, bias, options)[0]


def certified_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | tuple[Tensor, Tensor],
    bias: Tensor | None,
    options: LogpsOptions,
) -> tuple[Tensor | tuple[Tensor, Tensor], Certificate | None]:
    """`linear_logps`, and what its gradient leaves out: None if it is exact, or there is none."""
    label_sets = labels if isinstance(labels, tuple) else (labels,)
    low_rank = options.low_rank
    validate_operands(hidden, weight, label_sets, bias, options)
    refuse_forward_mode(hidden, weight, bias, *(low_rank or ()))
    device = weight.device
    moved = hidden.to(device)
    hidden_r, weight_r = (None, None) if low_rank is None else (low_rank[0].to(device), low_rank[1])
    stacked = torch.stack([each.to(device, torch.int64) for each in label_sets])
    dtype = choose_compute_dtype(hidden, weight, options.compute_dtype)
    grad = torch.is_grad_enabled()
    needs = (
        grad and (hidden.requires_grad or (hidden_r is not None and hidden_r.requires_grad)),
        grad and any(each is not None and each.requires_grad for each in (weight, bias, weight_r)),
    )
    tensors = (moved, weight, stacked, bias, hidden_r, weight_r)
    transform = (float(options.logit_scale), options.softcap)
    last = (options.ignore_index, dtype, options.workspace_bytes, *needs, True)
    certificate = None
    if options.is_sparse(dtype) and any(needs):
        groups = options.tail_groups
        groups = None if groups is None else groups.to(device, torch.int64)
        eps = float(options.eps)
        logps, fields, *_ = sparse_linear_logps(*tensors, groups, *transform, eps, *last)
        certificate = Certificate(*fields.unbind())
    else:
        logps, *_ = _linear_logps(*tensors, *transform, *last)
    logps = logps.to(hidden.device)
    return (logps[0], logps[1]) if isinstance(labels, tuple) else logps[0], certificate


@torch.library.custom_op("orpo_kernels::linear_logps", mutates_args=())
def _linear_logps(  # noqa: PLR0913 - a schema has no dataclasses
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    hidden_r: Tensor | None,
    weight_r: Tensor | None,
    logit_scale: float,
    softcap: float | None,
    ignore_index: int,
    compute_dtype: torch.dtype,
    workspace_bytes: int | None,
    needs_dhidden: bool,
    needs_dweight: bool,
    consume_g: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probs (K, ...), statistics (7, N), g (N, H), its low-rank part (N, r), kept E (N, V).

    With `consume_g` the backward may turn g into dhidden in place: the caller lets go of it.
    """
    with torch.amp.autocast(weight.device.type, enabled=False):
        refuse_out_of_range(labels, ignore_index, weight.shape[0])
        scored = score(labels, ignore_index)
        options = (logit_scale, softcap, compute_dtype)
        chosen = select((hidden, hidden_r), (weight, weight_r), bias, scored, options)
        statistics, g, g_r, kept = _empty_outputs(
            hidden, weight, labels, hidden_r, weight_r, compute_dtype, workspace_bytes,
            needs_dhidden, needs_dweight,
        )  # fmt: skip
        kept[chosen.sizes.rows :].zero_()  # of no row, but an output
        if chosen.sizes.rows > 0:
            gradients = (g, g_r) if needs_dhidden else None
            _forward(chosen, statistics, gradients, kept, workspace_bytes, needs_dweight)
        return scored.logps(statistics).view(labels.shape), statistics, g, g_r, kept


def _forward(
    chosen: Selection,
    statistics: Tensor,
    gradients: tuple[Tensor, Tensor] | None,
    kept: Tensor,
    workspace_bytes: int | None,
    needs_dweight: bool,
) -> None:
    sizes, keep = chosen.sizes, kept.shape[0] > 0
    decision = choose(
        sizes, workspace_budget(workspace_bytes, sizes.device),
        needs_dhidden=gradients is not None, needs_dweight=needs_dweight, kept=kept.shape[0],
        in_rows=all(part.stride(1) == 1 for part in chosen.head.columns.parts),
    )  # fmt: skip
    plan, inputs = decision.plan, (chosen.rows, chosen.head, chosen.labels, sizes)
    forward = (
        Folded(*inputs, plan)
        if decision.strategy == "linear_lse"
        else Forward(*inputs, plan, with_gradient=gradients is not None, keep=keep)
    )
    for start, stop in spans(sizes.rows, plan.rows):
        chunk, g = forward.chunk(start, stop, kept[start:stop] if keep else None)
        rows = slice(start, stop) if chosen.scored is None else chosen.scored[start:stop]
        statistics[:, rows] = chunk
        if g is not None and gradients is not None:
            width = gradients[0].shape[1]
            gradients[0][rows] = g[:, :width].to(gradients[0].dtype)
            if g.shape[1] > width:
                gradients[1][rows] = g[:, width:].to(gradients[1].dtype)


def _empty_outputs(  # noqa: PLR0913 - as the schema
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    hidden_r: Tensor | None,
    weight_r: Tensor | None,
    compute_dtype: torch.dtype,
    workspace_bytes: int | None,
    needs_dhidden: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = labels[0].numel()
    statistics = hidden.new_zeros((7, count), dtype=accumulation_dtype(compute_dtype))
    g = hidden.new_zeros((count if needs_dhidden else 0, hidden.shape[-1]))
    rank = 0 if hidden_r is None else hidden_r.shape[-1]
    g_r = (hidden if hidden_r is None else hidden_r).new_zeros(
        (count if needs_dhidden else 0, rank)
    )
    sizes = problem_sizes(0, (hidden, hidden_r), (weight, weight_r), labels.shape[0], compute_dtype)
    budget = workspace_budget(workspace_bytes, weight.device)
    fits = keeps(sizes, count, budget, needs_dweight=needs_dweight)
    kept = hidden.new_empty((count if fits else 0, weight.shape[0]), dtype=compute_dtype)
    return statistics, g, g_r, kept


@_linear_logps.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, labels, _, hidden_r, weight_r = args[:6]
    outputs = _empty_outputs(hidden, weight, labels, hidden_r, weight_r, *args[9:13])
    return outputs[0].new_empty(labels.shape), *outputs


@torch.library.custom_op("orpo_kernels::linear_logps_dweight", mutates_args=())
def _linear_logps_dweight(  # noqa: PLR0913 - a schema has no dataclasses
    dlogps: Tensor,
    statistics: Tensor,
    kept: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    hidden_r: Tensor | None,
    weight_r: Tensor | None,
    logit_scale: float,
    softcap: float | None,
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
        chosen = select((hidden, hidden_r), (weight, weight_r), bias, scored, options)
        if chosen.sizes.rows == 0:
            for result in results:
                result.zero_()  # nothing is scored: that has a gradient too
            return results
        a = scored.coefficients(dlogps)
        if chosen.scored is not None:
            statistics, a = statistics[:, chosen.scored], a.take(chosen.scored)
        kept_tile = kept[: chosen.sizes.rows] if kept.shape[0] else None
        budget = (
            workspace_budget(workspace_bytes, weight.device) - kept.numel() * kept.element_size()
        )
        dweight, dbias, dweight_r = (
            result if need else None for result, need in zip(results, needs, strict=True)
        )
        dweights = [dweight] if weight_r is None else [dweight, dweight_r]
        gradient = WeightGradient(
            chosen.rows, chosen.head, chosen.labels, chosen.sizes, statistics, a
        )
        gradient.run(dweights, dbias, kept_tile, budget)
        return results


@_linear_logps_dweight.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_weight_gradients(args[4], args[6], args[8], args[14])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, labels, bias, hidden_r, weight_r, *options = inputs
    ctx.save_for_backward(hidden, weight, labels, bias, hidden_r, weight_r, *output[1:])
    ctx.logit_scale, ctx.softcap, ctx.ignore_index, ctx.compute_dtype, ctx.workspace_bytes = (
        options[:5]
    )
    ctx.had_gradient, ctx.consume_g = options[5], options[7]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for the outputs only the backward uses: (N, V) of them


def _backward(ctx: Any, dlogps: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, labels, bias, hidden_r, weight_r, statistics, g, g_r, kept = ctx.saved_tensors
    needs = ctx.needs_input_grad
    refuse_second_derivatives()
    last = (ctx.ignore_index, ctx.compute_dtype, ctx.workspace_bytes)
    dhidden: Tensor | None = None
    dhidden_r: Tensor | None = None
    if needs[0] or needs[4]:
        g, g_r = consumable(g, g_r, ctx.had_gradient, ctx.consume_g)
        linear_logps_dhidden_(g, g_r, dlogps, statistics, weight, labels, weight_r, *last)
        dhidden = g.view(hidden.shape) if needs[0] else None
        dhidden_r = g_r.view(hidden_r.shape) if needs[4] else None
    wanted = [needs[1], needs[3], needs[5]]
    dweight = dbias = dweight_r = None
    if any(wanted):
        gradients = _linear_logps_dweight(
            dlogps, statistics, kept, hidden, weight, labels, bias, hidden_r, weight_r,
            ctx.logit_scale, ctx.softcap, *last, wanted,
        )  # fmt: skip
        dweight, dbias, dweight_r = (
            each if need else None for each, need in zip(gradients, wanted, strict=True)
        )
    return dhidden, dweight, None, dbias, dhidden_r, dweight_r, *[None] * 8


_linear_logps.register_autograd(_backward, setup_context=_setup_context)
