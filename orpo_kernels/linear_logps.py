"""The one op between the model and the loss: token log-probs of a linear head, differentiable.

    z_t = softcap(scale * (h_t W^T + b)),   logp_t = z_t[y_t] - log sum exp z_t
    dhidden_t = a_t (d_y W[y_t] - sum_v p_tv d_tv W_v),   a_t = d loss / d logp_t
    dW_v = sum_t a_t d_tv (1[v = y_t] - p_tv) h_t

This file validates, chooses the rows that are scored, and registers the op (schema, fake, autograd)
with the dispatcher; `engine/` does the vocabulary-sized work.

dhidden without its factor per row, g, is computed in the forward; the backward scales it in place
unless the graph is kept (`retain_graph=True`), so hidden costs one gradient buffer and no more.
"""

import math
from typing import Any

import torch
from torch import Tensor

from orpo_kernels.constants import IGNORE_INDEX
from orpo_kernels.engine.arguments import choose_compute_dtype, refuse_forward_mode, validate
from orpo_kernels.engine.chunks import Columns, spans, workspace_budget
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
from orpo_kernels.engine.weight_gradient import WeightGradient, label_shares, present

GRADIENTS = ("exact",)


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
        gradient: "exact".
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
        TypeError: not floating point (a quantised weight), or labels that are not integer.
        ValueError: shapes that do not match, a label outside [0, V) (CPU tensors; on other devices
            a device-side assertion), a workspace too small for one tile.
        NotImplementedError: an unknown `gradient`; second or forward-mode derivatives.

    Note:
        Never allocates (N, V). Unscored rows are dropped before any GEMM (choosing them syncs a GPU
        once in the forward, and once in the backward of a trainable head). Deterministic.

    Source:
        arXiv 2403.07691, equation 1 (token log-probs); derivation in docs/mathematics.md.
    """
    label_sets = labels if isinstance(labels, tuple) else (labels,)
    validate(hidden, weight, label_sets, bias, low_rank)
    if gradient not in GRADIENTS:
        raise NotImplementedError(f"gradient={gradient!r} is not available; use one of {GRADIENTS}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be positive and finite, got {softcap}; None means no cap")
    refuse_forward_mode(hidden, weight, bias, *(low_rank or ()))
    device = weight.device
    moved = hidden.to(device)
    hidden_r, weight_r = (None, None) if low_rank is None else (low_rank[0].to(device), low_rank[1])
    stacked = torch.stack([each.to(device, torch.int64) for each in label_sets])
    grad = torch.is_grad_enabled()
    logps, *_ = _linear_logps(
        moved, weight, stacked, bias, hidden_r, weight_r, float(logit_scale), softcap, ignore_index,
        choose_compute_dtype(hidden, weight, compute_dtype), workspace_bytes,
        grad and (hidden.requires_grad or (hidden_r is not None and hidden_r.requires_grad)),
        grad and any(each is not None and each.requires_grad for each in (weight, bias, weight_r)),
        True,
    )  # fmt: skip
    logps = logps.to(hidden.device)
    return (logps[0], logps[1]) if isinstance(labels, tuple) else logps[0]


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


@torch.library.custom_op("orpo_kernels::linear_logps_dhidden_", mutates_args=("g", "g_r"))
def _linear_logps_dhidden_(  # noqa: PLR0913 - a schema has no dataclasses
    g: Tensor,
    g_r: Tensor,
    dlogps: Tensor,
    statistics: Tensor,
    weight: Tensor,
    labels: Tensor,
    weight_r: Tensor | None,
    ignore_index: int,
    compute_dtype: torch.dtype,
    workspace_bytes: int | None,
) -> None:
    """Turns g into dhidden in place: a (1 - p) g, plus the entries of two differing labels."""
    with torch.amp.autocast(weight.device.type, enabled=False):
        scored = score(labels, ignore_index)
        a = scored.coefficients(dlogps)
        columns = Columns((weight,) if weight_r is None else (weight, weight_r), compute_dtype)
        shares = None
        if scored.labels.second is not None:
            distinct = scored.labels.second >= 0
            shares = [torch.where(distinct, share, 0.0) for share in label_shares(statistics, a)]
        factor = a.total * statistics[2]
        # Widened rows, label entries and their cast; a few MiB are as fast as more.
        row_bytes = (g.shape[1] + g_r.shape[1]) * factor.element_size() * 4
        budget = min(workspace_budget(workspace_bytes, weight.device), 2**24)
        for start, stop in spans(g.shape[0], max(1, budget // max(1, row_bytes))):
            wide = factor[start:stop, None] * torch.cat((g[start:stop], g_r[start:stop]), 1)
            if shares is not None:
                for each, share in zip(present(list(scored.labels)), shares, strict=True):
                    rows = columns.rows(each[start:stop], wide.dtype)
                    wide.addcmul_(rows, share[start:stop, None])
            g[start:stop] = wide[:, : g.shape[1]]
            g_r[start:stop] = wide[:, g.shape[1] :]


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
        results = _empty_weight_gradients(weight, bias, weight_r, needs)
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


def _empty_weight_gradients(
    weight: Tensor, bias: Tensor | None, weight_r: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    def empty(tensor: Tensor | None, need: bool) -> Tensor:
        like = weight if tensor is None else tensor
        return like.new_empty(like.shape if need and tensor is not None else (0,))

    return empty(weight, needs[0]), empty(bias, needs[1]), empty(weight_r, needs[2])


@_linear_logps_dweight.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_weight_gradients(args[4], args[6], args[8], args[14])


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
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "second derivatives of linear_logps are not available: backward with create_graph=False"
        )
    last = (ctx.ignore_index, ctx.compute_dtype, ctx.workspace_bytes)
    dhidden: Tensor | None = None
    dhidden_r: Tensor | None = None
    if needs[0] or needs[4]:
        if not ctx.had_gradient:
            raise RuntimeError("the op was called with needs_dhidden=False; call linear_logps")
        kept_graph = torch._C._autograd._get_current_graph_task_keep_graph()
        # Traced (a subclass stands for g), what is mutated must not be an output of the forward.
        if kept_graph or not ctx.consume_g or type(g) is not Tensor:
            g, g_r = g.clone(), g_r.clone()
        _linear_logps_dhidden_(g, g_r, dlogps, statistics, weight, labels, weight_r, *last)
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
