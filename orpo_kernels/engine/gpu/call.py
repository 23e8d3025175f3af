"""The exact loops of a GPU for a problem and its scored rows: what `engine/run.py` calls.

Imports the kernels, and triton with them: to be imported when the first call needs it.
"""

from torch import Tensor

from orpo_kernels.engine.gpu import backward, forward
from orpo_kernels.engine.gpu.plan import BackwardPlan, ForwardPlan
from orpo_kernels.engine.operands import Operands
from orpo_kernels.engine.problem import Problem
from orpo_kernels.engine.tile_loop import Results
from orpo_kernels.engine.weight_gradient import HeadGradients
from orpo_kernels.kernels import tuning
from orpo_kernels.kernels.coefficients import Slopes
from orpo_kernels.kernels.inputs import Inputs
from orpo_kernels.kernels.scale_rows import scale_rows


def exact_forward(operands: Operands, plan: ForwardPlan, kept: Tensor | None, out: Results) -> None:
    """Fills the results, and `kept` with E of the first rows."""
    forward.forward(inputs_of(operands), plan, kept, out)


def exact_head_gradient(
    problem: Problem,
    operands: Operands,
    of_forward: tuple[Tensor, Tensor | None],
    dlogps: Tensor,
    plan: BackwardPlan,
    out: HeadGradients,
) -> None:
    """Fills the gradients of the head, from the statistics (7, N) and E kept."""
    statistics, kept = of_forward
    inputs, slopes = inputs_of(operands), slopes_of(problem, dlogps)
    backward.weight_gradient(inputs, statistics, slopes, plan.sweeps, kept, out)


def hidden_gradient_(
    problem: Problem,
    dlogps: Tensor,
    statistics: Tensor,
    g: tuple[Tensor, Tensor],
    product: Tensor | None,
) -> None:
    """Turns g and its low-rank part into dhidden; with `product` g lacks its tail."""
    parts, groups = g[: len(problem.weights)], problem.groups
    if groups is not None:
        groups = groups.reshape(-1).contiguous()
    with tuning.guard(statistics.device):
        scale_rows(
            parts, statistics, slopes_of(problem, dlogps), problem.weights, problem.dtype, product,
            groups,
        )  # fmt: skip


def slopes_of(problem: Problem, dlogps: Tensor) -> Slopes:
    """How the loss depends on the log-probs, as the kernels read it."""
    sets = problem.labels.shape[0]
    labels = problem.labels.reshape(sets, -1)
    return Slopes(dlogps.reshape(sets, -1), labels.contiguous(), problem.ignore_index)


def inputs_of(operands: Operands) -> Inputs:
    """What the kernels of a call read."""
    rows, head, labels, sizes, places, _ = operands
    bias = None if head.bias is None else head.bias.contiguous()
    return Inputs(
        tuple(_readable(part) for part in rows.parts), head.parts, bias, labels.first,
        labels.second, places, rows.scored, *head.transform, head.dtype, sizes.product_dtype,
    )  # fmt: skip


def _readable(part: Tensor) -> Tensor:
    """Rows the kernels can read: (N, H) or (B, T, H), columns adjacent; as they are, or a copy."""
    if part.stride(-1) != 1 and part.shape[-1] > 1:
        part = part.contiguous()
    if part.ndim <= 3:
        return part
    try:
        return part.view(-1, *part.shape[-2:])
    except RuntimeError:
        return part.reshape(-1, part.shape[-1])
