"""The op of `linear_logps(..., gradient="sparse")`: schema, fake, autograd.

    dhidden_t = a_t (share W[y_t] - sum over kept v of p_tv W_v - m_t q W)
    dW_v = sum_t a_t (share 1[v = y_t] - p_tv where kept) h_t - q_v sum_t a_t m_t h_t

The formulae, and what is kept, are in `engine/sparse/`. Without a gradient nothing is sparse:
`linear_logps` then calls its exact op.
"""

from typing import Any

import torch
from torch import Tensor

from orpo_kernels.engine.run import (
    SparseState,
    sparse_forward,
    sparse_head_gradient,
    sparse_plan,
    sparse_state,
)
from orpo_kernels.engine.scoring import Places
from orpo_kernels.engine.sparse.tail import Packed
from orpo_kernels.ops.shared import (
    SPARSE,
    SPARSE_ARGUMENTS,
    backward,
    empty_head_gradients,
    problem_of,
    without_autocast,
)

_TENSORS = 6
_GROUPS = SPARSE_ARGUMENTS - 2  # the only other tensor of a problem
_OUTPUTS = 2 + len(SparseState._fields)
_SAVED = 8  # tensors of the backward before those of the problem


@torch.library.custom_op(
    "orpo_kernels::sparse_token_logps",
    mutates_args=(),
    schema=f"({SPARSE}, bool needs_dhidden, bool trainable, bool consume_g) "
    f"-> ({', '.join(['Tensor'] * _OUTPUTS)})",
)
def sparse_token_logps(*arguments: Any) -> tuple[Tensor, ...]:
    """Log-probs (K, ...), the fields of the certificate (5,), and `SparseState`."""
    needs_dhidden, trainable, _ = arguments[SPARSE_ARGUMENTS:]
    problem = problem_of(arguments[:SPARSE_ARGUMENTS], trainable=trainable)
    with without_autocast(problem):
        logps, certificate, state = sparse_forward(problem, needs_dhidden=needs_dhidden)
        return logps, certificate, *state


@sparse_token_logps.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    needs_dhidden, trainable, _ = arguments[SPARSE_ARGUMENTS:]
    problem = problem_of(arguments[:SPARSE_ARGUMENTS], trainable=trainable)
    state = sparse_state(problem, sparse_plan(problem), needs_dhidden=needs_dhidden)
    certificate = state.statistics.new_empty(5, dtype=torch.float32)
    return state.statistics.new_empty(problem.labels.shape), certificate, *state


@torch.library.custom_op(
    "orpo_kernels::sparse_token_logps_dweight",
    mutates_args=(),
    schema="(Tensor dlogps, Tensor statistics, Tensor sums, Tensor store, Tensor table, "
    f"Tensor per_block, Tensor places, Tensor number, {SPARSE}, bool[] needs) "
    "-> (Tensor, Tensor, Tensor)",
)
def sparse_token_logps_dweight(
    dlogps: Tensor, statistics: Tensor, sums: Tensor, store: Tensor, table: Tensor,
    per_block: Tensor, places: Tensor, number: Tensor, *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of weight (V, H), bias (V,) and weight_r (V, r); empty where `needs` says no."""
    problem = problem_of(arguments[:SPARSE_ARGUMENTS], trainable=True)
    results, wanted = empty_head_gradients(problem, arguments[SPARSE_ARGUMENTS])
    with without_autocast(problem):
        packed, of_rows = Packed(store, table, per_block), Places(places, number)
        sparse_head_gradient(problem, dlogps, statistics, sums, packed, of_rows, wanted)
    return results


@sparse_token_logps_dweight.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem = problem_of(arguments[_SAVED : _SAVED + SPARSE_ARGUMENTS], trainable=True)
    return empty_head_gradients(problem, arguments[_SAVED + SPARSE_ARGUMENTS])[0]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS], inputs[_GROUPS], *output[2:])
    ctx.options, ctx.eps = inputs[_TENSORS:_GROUPS], inputs[_GROUPS + 1]
    ctx.had_gradient, _, ctx.consume_g = inputs[SPARSE_ARGUMENTS:]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # zeros for the outputs only the backward uses


def _backward(ctx: Any, dlogps: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
    tensors, groups = ctx.saved_tensors[:_TENSORS], ctx.saved_tensors[_TENSORS]
    state = SparseState(*ctx.saved_tensors[_TENSORS + 1 :])
    ctx.arguments = (*tensors, *ctx.options, groups, ctx.eps)

    def head_gradient(wanted: list[bool]) -> Any:
        return sparse_token_logps_dweight(
            dlogps, state.statistics, state.sums, state.store, state.table, state.per_block,
            state.places, state.number, *ctx.arguments, wanted,
        )  # fmt: skip

    gradients = backward(
        ctx, dlogps, state.statistics, (state.g, state.g_r), head_gradient, state.product
    )
    return *gradients, *[None] * (SPARSE_ARGUMENTS - _TENSORS + 3)


sparse_token_logps.register_autograd(_backward, setup_context=_setup_context)
