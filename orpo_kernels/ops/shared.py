"""What both ops of `linear_logps` share: the flat form of a problem, and most of the backward.

A dispatcher schema has no dataclasses. `PROBLEM` is a `Problem` as the schemas list it, written
down here and nowhere else; `problem_of` makes it one again.

torch's caches on disk know a compiled graph, its backward included, by the names of the ops in its
forward: an op whose backward calls others than before, or hands them other arguments, needs another
name, or what was compiled with an older version of the package fails in the newer one.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from orpo_kernels.engine.problem import Problem, Transform
from orpo_kernels.engine.run import hidden_gradient_
from orpo_kernels.engine.weight_gradient import HeadGradients

PROBLEM = (
    "Tensor hidden, Tensor weight, Tensor labels, Tensor? bias, Tensor? hidden_r, "
    "Tensor? weight_r, float logit_scale, float? softcap, int ignore_index, "
    "ScalarType compute_dtype, int? workspace_bytes"
)
EXACT_ARGUMENTS = PROBLEM.count(",") + 1
SPARSE = f"{PROBLEM}, Tensor? groups, float eps"
SPARSE_ARGUMENTS = SPARSE.count(",") + 1


def problem_of(arguments: tuple[Any, ...], *, trainable: bool) -> Problem:
    """The problem of flat arguments, in the order of `PROBLEM` or `SPARSE`."""
    hidden, weight, labels, bias, hidden_r, weight_r, *scalars = arguments
    scale, softcap, ignore_index, dtype, workspace_bytes, *of_sparse = scalars
    return Problem(
        hidden, weight, labels, bias, hidden_r, weight_r, Transform(scale, softcap), ignore_index,
        dtype, workspace_bytes, trainable, *of_sparse,
    )  # fmt: skip


def without_autocast(problem: Problem) -> Any:
    """A context in which the problem's own dtypes hold."""
    kind = problem.weight.device.type
    if not torch.is_autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.amp.autocast(kind, enabled=False)


@torch.library.custom_op(
    "orpo_kernels::linear_logps_hidden_gradient_",
    mutates_args=("g", "g_r"),
    schema=f"(Tensor(a!) g, Tensor(b!) g_r, Tensor dlogps, Tensor statistics, Tensor? product, "
    f"{SPARSE}) -> ()",
)
def linear_logps_hidden_gradient_(
    g: Tensor, g_r: Tensor, dlogps: Tensor, statistics: Tensor, product: Tensor | None,
    *arguments: Any,
) -> None:  # fmt: skip
    """Turns g and its low-rank part into dhidden, see `engine.run.hidden_gradient_`."""
    problem = problem_of(arguments, trainable=False)
    with without_autocast(problem):
        hidden_gradient_(problem, dlogps, statistics, (g, g_r), product)


def empty_head_gradients(
    problem: Problem, needs: list[bool]
) -> tuple[tuple[Tensor, Tensor, Tensor], HeadGradients]:
    """Like weight, bias and the low-rank weight; (0,) for what needs none, and None in the view."""
    given = (problem.weight, problem.bias, problem.weight_r)

    def empty(tensor: Tensor | None, need: bool) -> Tensor:
        like = problem.weight if tensor is None else tensor
        return like.new_empty(like.shape if need and tensor is not None else (0,))

    weight, bias, low_rank = (empty(*each) for each in zip(given, needs, strict=True))
    wanted = [weight if needs[0] else None]
    if problem.weight_r is not None:
        wanted.append(low_rank if needs[2] else None)
    return (weight, bias, low_rank), HeadGradients(tuple(wanted), bias if needs[1] else None)


def backward(
    ctx: Any,
    dlogps: Tensor,
    statistics: Tensor,
    g: tuple[Tensor, Tensor],
    head_gradient: Callable[[list[bool]], Any],
    product: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the six tensors of `PROBLEM`.

    Args:
        ctx: of autograd, with `arguments` (of `SPARSE`), `had_gradient`, `consume_g`.
        dlogps: (K, ...).
        statistics: of the forward.
        g: of the forward, and its low-rank part.
        head_gradient: dW, db and the low-rank part of dW, for which of them are wanted.
        product: of the sparse forward.

    Raises:
        NotImplementedError: the backward is itself recorded: second derivatives.
    """
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "second derivatives of linear_logps are not available: backward with create_graph=False"
        )
    needs, (hidden, *_, hidden_r, _) = ctx.needs_input_grad, ctx.arguments[:6]
    dhidden = dhidden_r = None
    if needs[0] or needs[4]:
        g = _consumable(*g, ctx)
        linear_logps_hidden_gradient_(*g, dlogps, statistics, product, *ctx.arguments)
        dhidden = g[0].view(hidden.shape) if needs[0] else None
        dhidden_r = g[1].view(hidden_r.shape) if needs[4] else None
    wanted = [needs[1], needs[3], needs[5]]
    dweight = dbias = dweight_r = None
    if any(wanted):
        dweight, dbias, dweight_r = (
            each if need else None for each, need in zip(head_gradient(wanted), wanted, strict=True)
        )
    return dhidden, dweight, None, dbias, dhidden_r, dweight_r


def _consumable(g: Tensor, g_r: Tensor, ctx: Any) -> tuple[Tensor, Tensor]:
    """What may be turned into dhidden in place: g and its low-rank part, or copies of them."""
    if not ctx.had_gradient:
        raise RuntimeError("the op was called with needs_dhidden=False; call linear_logps")
    kept_graph = torch._C._autograd._get_current_graph_task_keep_graph()
    # Traced (a subclass stands for g), what is mutated must not be an output of the forward.
    if kept_graph or not ctx.consume_g or type(g) is not Tensor:
        return g.clone(), g_r.clone()
    return g, g_r
