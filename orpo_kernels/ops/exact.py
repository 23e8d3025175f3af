"""The op of `linear_logps(..., gradient="exact")`: schema, fake, autograd.

Its outputs besides the log-probs are what the backward needs, `engine.run.ExactState`. dhidden
without its factor per row, g, is computed in the forward; the backward scales it in place unless
the graph is kept (`retain_graph=True`), so hidden costs one gradient buffer and no more.
"""

from typing import Any

import torch
from torch import Tensor

from orpo_kernels.engine.run import ExactState, exact_forward, exact_head_gradient, exact_state
from orpo_kernels.engine.scoring import Places
from orpo_kernels.ops.shared import (
    EXACT_ARGUMENTS,
    PROBLEM,
    backward,
    empty_head_gradients,
    problem_of,
    without_autocast,
)

_TENSORS = 6
_OUTPUTS = 1 + len(ExactState._fields)
_SAVED = 5  # tensors of the backward before those of the problem
_NO_TAIL = (None, 0.0)  # groups and eps, of a call that drops nothing


@torch.library.custom_op(
    "orpo_kernels::exact_linear_logps",
    mutates_args=(),
    schema=f"({PROBLEM}, bool needs_dhidden, bool trainable, bool consume_g) "
    f"-> ({', '.join(['Tensor'] * _OUTPUTS)})",
)
def exact_linear_logps(*arguments: Any) -> tuple[Tensor, ...]:
    """Log-probs (K, ...) and `ExactState`.

    With `consume_g` the backward may turn g into dhidden in place: the caller lets go of it.
    """
    needs_dhidden, trainable, _ = arguments[EXACT_ARGUMENTS:]
    problem = problem_of(arguments[:EXACT_ARGUMENTS], trainable=trainable)
    with without_autocast(problem):
        logps, state = exact_forward(problem, needs_dhidden=needs_dhidden)
        return logps, *state


@exact_linear_logps.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    needs_dhidden, trainable, _ = arguments[EXACT_ARGUMENTS:]
    problem = problem_of(arguments[:EXACT_ARGUMENTS], trainable=trainable)
    state = exact_state(problem, needs_dhidden=needs_dhidden)
    return state.statistics.new_empty(problem.labels.shape), *state


@torch.library.custom_op(
    "orpo_kernels::exact_linear_logps_dweight",
    mutates_args=(),
    schema="(Tensor dlogps, Tensor statistics, Tensor kept, Tensor places, Tensor number, "
    f"{PROBLEM}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
)
def exact_linear_logps_dweight(
    dlogps: Tensor, statistics: Tensor, kept: Tensor, places: Tensor, number: Tensor,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of weight (V, H), bias (V,) and weight_r (V, r); empty where `needs` says no."""
    problem = problem_of(arguments[:EXACT_ARGUMENTS], trainable=True)
    results, wanted = empty_head_gradients(problem, arguments[EXACT_ARGUMENTS])
    with without_autocast(problem):
        of_rows = Places(places, number)
        exact_head_gradient(problem, dlogps, statistics, kept, of_rows, wanted)
    return results


@exact_linear_logps_dweight.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem = problem_of(arguments[_SAVED : _SAVED + EXACT_ARGUMENTS], trainable=True)
    return empty_head_gradients(problem, arguments[_SAVED + EXACT_ARGUMENTS])[0]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], *output[1:])
    ctx.options = inputs[_TENSORS:EXACT_ARGUMENTS]
    ctx.had_gradient, _, ctx.consume_g = inputs[EXACT_ARGUMENTS:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for the outputs only the backward uses: (N, V) of them


def _backward(ctx: Any, dlogps: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, statistics, g, g_r, kept, places, number = ctx.saved_tensors
    problem = (*tensors, *ctx.options)
    ctx.arguments = (*problem, *_NO_TAIL)

    def head_gradient(wanted: list[bool]) -> Any:
        of_forward = (statistics, kept, places, number)
        return exact_linear_logps_dweight(dlogps, *of_forward, *problem, wanted)

    gradients = backward(ctx, dlogps, statistics, (g, g_r), head_gradient)
    return *gradients, *[None] * (EXACT_ARGUMENTS - _TENSORS + 3)


exact_linear_logps.register_autograd(_backward, setup_context=_setup_context)
