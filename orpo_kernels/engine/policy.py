"""Which strategy a call takes, in one place: what is asked for, what fits, what is faster.

    strategy      when                                                     GEMM passes
    E kept        the head trains and E (N, V) fits beside the workspace   3 (2: hidden does not)
    recompute     the head trains                                          4 (3: hidden does not)
    two passes    only hidden needs a gradient                             2
    one pass      nothing needs a gradient                                 1
    sparse        gradient="sparse", and anything needs a gradient         1; as above
                                                                           where tiles are dense
    linear_lse    hidden needs no gradient, on a GPU where it should be    1 (3: the head trains)
                  faster than tiles

A pass is a GEMM of 2 N V H FLOP, forward and backward together. On a GPU E is kept for as many rows
as fit, and of the others recomputed. The sizes of chunks and blocks are those of `budget.py`, on a
GPU of `gpu/plan.py`, which weighs them by the time they should take. The first time a decision is
taken it is logged by the logger "orpo_kernels" at level DEBUG; `explain` gives it without a run.
"""

import functools
import logging
from dataclasses import dataclass

import torch

from orpo_kernels.engine.budget import (
    Plan,
    Sizes,
    kept_rows,
    plan_backward,
    plan_forward,
    plan_kept,
    sufficient,
    workspace_budget,
)
from orpo_kernels.engine.gemm import gemm_widens, operand_dtype
from orpo_kernels.engine.gpu.card import card_of
from orpo_kernels.engine.gpu.model import Job, job_of
from orpo_kernels.engine.gpu.plan import ForwardPlan
from orpo_kernels.engine.gpu.plan import kept_rows as gpu_kept_rows
from orpo_kernels.engine.gpu.plan import plan_backward as plan_backward_on_gpu
from orpo_kernels.engine.gpu.plan import plan_forward as plan_forward_on_gpu
from orpo_kernels.engine.problem import Problem
from orpo_kernels.engine.sparse.plan import SparsePlan, plan_sparse, takes_slots
from orpo_kernels.kernels import has_tensor_cores, runs_triton

_logger = logging.getLogger("orpo_kernels")


@dataclass(frozen=True)
class Decision:
    """How a call is computed.

    Args:
        strategy: as in the table of this module.
        rows: N, the scored rows.
        plan: of the forward: rows per chunk, columns per block, bytes.
        passes: GEMMs of 2 N V H FLOP, forward and backward.
        workspace_bytes: most of forward and backward, the kept E included.
        budget: bytes allowed.
        reason: why this strategy.
        dtype: of the GEMMs' operands, which a CPU may widen; None on a GPU, which does not.
        seconds: what the forward, and the gradient of the head, should take on a GPU.
    """

    strategy: str
    rows: int
    plan: Plan
    passes: int
    workspace_bytes: int
    budget: int
    reason: str
    dtype: torch.dtype | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        """One line."""
        used, allowed = (each / 2**20 for each in (self.workspace_bytes, self.budget))
        expected = "" if self.seconds is None else f"; {1e3 * self.seconds:.1f} ms expected"
        operands = "" if self.dtype is None else f" in {str(self.dtype).removeprefix('torch.')}"
        return (
            f"{self.strategy}: {self.passes} passes{operands} over {self.rows} rows, "
            f"{self.plan.rows} rows x {self.plan.columns} columns at a time, "
            f"{used:.2f} of {allowed:.2f} MiB; {self.reason}{expected}"
        )


@functools.cache
def device_class(device: torch.device) -> str:
    """Of a device: "cpu", "cuda sm_80+", "cuda", "rocm", or its type."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return "rocm"
    # Without a card: a plan for a machine that has one.
    modern = not torch.cuda.is_available() or has_tensor_cores(device)
    return "cuda sm_80+" if modern else "cuda"


def kept_count(problem: Problem, *, needs_dhidden: bool) -> int:
    """For how many rows the forward keeps E, whichever of them are scored."""
    if not problem.trainable:
        return 0
    count, sizes = problem.count, problem.sizes(0)
    if runs_on_gpu(problem):
        job, card = problem.job(problem.sizes(count)), card_of(sizes.device)
        return gpu_kept_rows(job, problem.budget, card, with_g=needs_dhidden)
    return count if count <= kept_rows(sizes, problem.budget) else 0


def runs_on_gpu(problem: Problem) -> bool:
    """Whether the exact loops for a GPU run: Triton's kernels, on a head that lies in rows."""
    return runs_triton(problem.weight.device, problem.dtype) and problem.in_rows


def choose_on_gpu(
    job: Job, device: torch.device, budget: int, *, needs_dhidden: bool, needs_dweight: bool,
    kept: int = 0,
) -> tuple[Decision, ForwardPlan]:  # fmt: skip
    """The strategy of a call on a GPU, and the shapes of its forward.

    Args:
        job: sizes of the scored rows.
        device: of the head.
        budget: bytes of workspace.
        needs_dhidden: whether hidden, or its low-rank part, needs a gradient.
        needs_dweight: whether the head needs one.
        kept: rows that E was allocated for, 0 for none.

    Returns:
        The decision, and the plan.

    Raises:
        TooSmallError: the budget is too small for every strategy; see `sufficient`.
    """
    card, folds = card_of(device), device_class(device) == "cuda sm_80+"
    plan = plan_forward_on_gpu(job, budget, card, with_g=needs_dhidden, kept=kept, folds=folds)
    seconds, backward = plan.seconds, 0
    if needs_dweight:  # a budget too small for the backward is refused here
        of_head = plan_backward_on_gpu(job, budget, card, kept)
        seconds, backward = seconds + of_head.seconds, of_head.workspace_bytes
    passes = 1 + needs_dhidden + needs_dweight * (1 if kept >= job.rows else 2)
    strategy = {(False, False): "one pass", (True, False): "two passes"}.get(
        (needs_dhidden, needs_dweight), "recompute"
    )
    shape, reason = plan.shape, "the fastest of what fits"
    if kept >= job.rows and plan.kept_shape is not None:
        strategy, shape = "E kept", plan.kept_shape
    elif kept:
        strategy, reason = "E kept", f"E of {kept} rows fits"
    elif plan.folded:
        strategy = "linear_lse"
    of_kept = kept * job.kept_row_bytes
    most = Plan(min(shape.rows, job.rows), shape.columns, plan.workspace_bytes + of_kept)
    decision = Decision(
        strategy, job.rows, most, passes, max(most.workspace_bytes, backward + of_kept), budget,
        reason, seconds=seconds,
    )  # fmt: skip
    return decision, plan


def choose(
    sizes: Sizes,
    budget: int,
    *,
    needs_dhidden: bool,
    needs_dweight: bool,
    kept: int = 0,
) -> Decision:
    """The strategy of a call, and its shapes.

    Args:
        sizes: of the scored rows.
        budget: bytes of workspace.
        needs_dhidden: whether hidden, or its low-rank part, needs a gradient.
        needs_dweight: whether the head needs one.
        kept: rows that E was allocated for (`kept_count`), 0 for none.

    Returns:
        The decision.

    Raises:
        TooSmallError: the budget is too small for every strategy; see `sufficient`.
    """
    if kept:
        plan = plan_kept(sizes, kept, budget)
        passes = 3 if needs_dhidden else 2
        return _decided("E kept", sizes, plan, passes, 0, budget, "E fits beside the workspace")
    backward, passes, strategy = 0, 1, "one pass"
    if needs_dweight:  # a budget too small for the backward is refused here
        backward = plan_backward(
            sizes, budget, sizes.hidden_columns, recompute=True
        ).workspace_bytes
        passes, strategy = 3, "recompute"
    if needs_dhidden:
        passes, strategy = passes + 1, "recompute" if needs_dweight else "two passes"
        plan = plan_forward(sizes, budget, with_gradient=True)
        return _decided(strategy, sizes, plan, passes, backward, budget, "hidden needs a gradient")
    plan = plan_forward(sizes, budget, with_gradient=False)
    reason = "only the head needs a gradient" if needs_dweight else "nothing needs a gradient"
    return _decided(strategy, sizes, plan, passes, backward, budget, reason)


def describe_sparse(sizes: Sizes, plan: SparsePlan, budget: int, *, trainable: bool) -> Decision:
    """What a sparse call does: nothing is left to choose but its shapes, and these are `plan`'s."""
    backward = 0
    if plan.slots:
        reason = "kept entries are slots of 64 rows"
    else:
        reason = "kept entries are lists, dense tiles go the exact way"
    if trainable and not plan.slots:
        gradient = plan_backward(
            sizes, budget, sizes.hidden_columns, recompute=True, reserved=plan.reserved_bytes
        )
        backward = gradient.workspace_bytes
    if trainable:
        what = "their columns" if plan.remakes else "them"
        reason += f"; {plan.store_bytes / 2**20:.2f} MiB of {what} kept for the backward"
    return _decided("sparse", sizes, plan.tile.even(sizes.rows), 1, backward, budget, reason)


def says_why() -> bool:
    """Whether decisions are logged."""
    return _logger.isEnabledFor(logging.DEBUG)


def say(decision: Decision) -> None:
    """Log a decision, the first time it is taken."""
    if says_why():
        _log(decision)


def explain(  # noqa: PLR0913 - the public signature
    rows: int,
    vocabulary: int,
    hidden_columns: int,
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    needs_dhidden: bool = True,
    needs_dweight: bool = False,
    workspace_bytes: int | None = None,
    label_sets: int = 1,
    gradient: str = "exact",
) -> Decision:
    """What the engine would do with a call of these sizes; `print` it.

    Args:
        rows: N, scored rows.
        vocabulary: V.
        hidden_columns: H.
        dtype: of hidden and head.
        device: of the head.
        needs_dhidden: whether hidden needs a gradient.
        needs_dweight: whether the head needs one.
        workspace_bytes: as of `linear_logps`; to be given for a GPU that is not here.
        label_sets: 1, or 2 scored in one pass.
        gradient: "exact" or "sparse", of two tail groups.

    Returns:
        The decision, as `linear_logps` takes it for a head in `dtype` without a low-rank part.

    Raises:
        ValueError: the budget is too small; says what suffices.
    """
    device = torch.device(device)
    operands = operand_dtype(device, dtype)
    sizes = Sizes(
        rows, vocabulary, hidden_columns, label_sets, operands, operands != dtype, device,
        gemm_widens(device, operands), runs_triton(device, operands),
    )  # fmt: skip
    budget = workspace_budget(workspace_bytes, device)
    if gradient == "sparse" and (needs_dhidden or needs_dweight):
        slots = takes_slots(sizes)
        shared = {"trainable": needs_dweight, "slots": slots}
        plan = sufficient(lambda some: plan_sparse(sizes, 2, some, **shared), budget)
        return describe_sparse(sizes, plan, budget, trainable=needs_dweight)
    needs = {"needs_dhidden": needs_dhidden, "needs_dweight": needs_dweight}

    def decide(some: int) -> Decision:
        if sizes.on_triton:
            job, kept = job_of(sizes, dtype.itemsize), 0
            if needs_dweight:
                kept = gpu_kept_rows(job, some, card_of(device), with_g=needs_dhidden)
            return choose_on_gpu(job, device, some, kept=kept, **needs)[0]
        keep = needs_dweight and rows <= kept_rows(sizes, some)
        return choose(sizes, some, kept=rows if keep else 0, **needs)

    return sufficient(decide, budget)


def _decided(
    strategy: str, sizes: Sizes, plan: Plan, passes: int, backward: int, budget: int, reason: str
) -> Decision:
    most = max(plan.workspace_bytes, backward)
    return Decision(strategy, sizes.rows, plan, passes, most, budget, reason, sizes.compute_dtype)


@functools.lru_cache(maxsize=1024)
def _log(decision: Decision) -> None:
    _logger.debug("linear_logps: %s", decision)
