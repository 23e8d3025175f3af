"""Which strategy a call takes, in one place: what is asked for, what fits, what is faster.

    strategy      when                                                     GEMM passes
    E kept        the head trains and E (N, V) fits beside the workspace   3 (2: hidden does not)
    recompute     the head trains                                          4 (3: hidden does not)
    two passes    only hidden needs a gradient                             2
    one pass      nothing needs a gradient                                 1
    sparse        gradient="sparse", and anything needs a gradient         1; as above
                                                                           where tiles are dense
    linear_lse    hidden needs no gradient, and either no tile of logits   1 (3: the head trains)
                  fits, or the device is one it was measured to be faster
                  on (`FASTER_ON`)

A pass is a GEMM of 2 N V H FLOP, forward and backward together. The sizes of chunks and blocks are
those of `budget.py`. The first time a decision is taken it is logged by the logger "orpo_kernels"
at level DEBUG; `explain` gives it without a run.
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
    workspace_budget,
)
from orpo_kernels.engine.gemm import gemm_widens
from orpo_kernels.engine.sparse.plan import SparsePlan, plan_sparse, takes_slots
from orpo_kernels.kernels import has_tensor_cores, runs_triton

FASTER_ON: frozenset[str] = frozenset()
"""Device classes where `linear_lse` was measured faster than a GEMM and `softmax_stats`: none."""

_LEAST_ROWS = 16
_ROW_BYTES = 1024  # partials of 64 splits, statistics and what computes them
_FIXED_BYTES = 2**14  # descriptors of the 64 programs that share the first block of rows
_COLUMNS = 1024  # least block of a head that is copied block by block

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
    """

    strategy: str
    rows: int
    plan: Plan
    passes: int
    workspace_bytes: int
    budget: int
    reason: str

    def __str__(self) -> str:
        """One line."""
        used, allowed = (each / 2**20 for each in (self.workspace_bytes, self.budget))
        return (
            f"{self.strategy}: {self.passes} passes over {self.rows} rows, {self.plan.rows} rows x "
            f"{self.plan.columns} columns at a time, {used:.2f} of {allowed:.2f} MiB; {self.reason}"
        )


def device_class(device: torch.device) -> str:
    """Of a device: "cpu", "cuda sm_80+", "cuda", "rocm", or its type."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip is not None:
        return "rocm"
    # Without a card: a plan for a machine that has one.
    modern = not torch.cuda.is_available() or has_tensor_cores(device)
    return "cuda sm_80+" if modern else "cuda"


def keeps(sizes: Sizes, count: int, budget: int, *, needs_dweight: bool) -> bool:
    """Whether the forward keeps E for `count` rows, and the backward recomputes no logit."""
    return needs_dweight and count <= kept_rows(sizes, budget)


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
        kept: rows that E was allocated for (`keeps`), 0 for none.

    Returns:
        The decision.

    Raises:
        ValueError: the budget is too small for every strategy; says what the smallest takes.
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
    plan, reason = _without_gradient(sizes, budget)
    strategy = "linear_lse" if reason else strategy
    return _decided(
        strategy, sizes, plan, passes, backward, budget, reason or "a tile of logits fits"
    )


def describe_sparse(sizes: Sizes, plan: SparsePlan, budget: int, *, trainable: bool) -> Decision:
    """What a sparse call does: nothing is left to choose but its shapes, and these are `plan`'s."""
    backward = 0
    if plan.slots:
        reason = "kept entries are slots of 64 rows"
    else:
        reason = "kept entries are lists, dense tiles go the exact way"
    if trainable:
        reserved = plan.reserved_bytes
        gradient = plan_backward(
            sizes, budget, sizes.hidden_columns, recompute=True, reserved=reserved
        )
        backward = gradient.workspace_bytes
        reason += f"; {plan.store_bytes / 2**20:.2f} MiB of them kept for the backward"
    return _decided("sparse", sizes, plan.tile.even(sizes.rows), 1, backward, budget, reason)


def says_why() -> bool:
    """Whether decisions are logged."""
    return _logger.isEnabledFor(logging.DEBUG)


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
        dtype: of the GEMMs' operands.
        device: of the head.
        needs_dhidden: whether hidden needs a gradient.
        needs_dweight: whether the head needs one.
        workspace_bytes: as of `linear_logps`; to be given for a GPU that is not here.
        label_sets: 1, or 2 scored in one pass.
        gradient: "exact" or "sparse", of two tail groups.

    Returns:
        The decision, as `linear_logps` takes it for a head in `dtype` without a low-rank part.

    Raises:
        ValueError: the budget is too small.
    """
    device = torch.device(device)
    sizes = Sizes(
        rows, vocabulary, hidden_columns, label_sets, dtype, False, device,
        gemm_widens(device, dtype), runs_triton(device, dtype),
    )  # fmt: skip
    budget = workspace_budget(workspace_bytes, device)
    if gradient == "sparse" and (needs_dhidden or needs_dweight):
        slots = takes_slots(sizes)
        plan = plan_sparse(sizes, 2, budget, trainable=needs_dweight, slots=slots)
        return describe_sparse(sizes, plan, budget, trainable=needs_dweight)
    keep = keeps(sizes, rows, budget, needs_dweight=needs_dweight)
    return choose(
        sizes, budget, needs_dhidden=needs_dhidden, needs_dweight=needs_dweight,
        kept=rows if keep else 0,
    )  # fmt: skip


def _without_gradient(sizes: Sizes, budget: int) -> tuple[Plan, str]:
    """Plan of a forward without a gradient, and why it is `linear_lse`'s, or ""."""
    card = device_class(sizes.device)
    possible = card == "cuda sm_80+" and sizes.on_triton
    if possible and card in FASTER_ON:
        return _plan_linear_lse(sizes, budget), f"measured faster on {card}"
    try:
        return plan_forward(sizes, budget, with_gradient=False), ""
    except ValueError:
        if not possible:
            raise
        return _plan_linear_lse(sizes, budget), "no tile of logits fits the budget"


def _plan_linear_lse(sizes: Sizes, budget: int) -> Plan:
    """Rows per call, and the columns of a block where the head has to be copied."""
    row_bytes = sizes.hidden_columns * sizes.compute_dtype.itemsize + _ROW_BYTES
    column_bytes = row_bytes - _ROW_BYTES if sizes.weight_is_copied else 0
    columns = sizes.vocabulary
    if column_bytes:
        columns = min(columns, max(_COLUMNS, budget // 2 // column_bytes // _COLUMNS * _COLUMNS))
    least_rows = min(_LEAST_ROWS, sizes.rows)
    fixed = _FIXED_BYTES + columns * column_bytes
    rows = min(sizes.rows, (budget - fixed) // row_bytes)
    if rows < least_rows:
        least = least_rows * row_bytes + _FIXED_BYTES + min(columns, _COLUMNS) * column_bytes
        raise ValueError(
            f"workspace_bytes={budget} is too small: {least_rows} rows of a head with H = "
            f"{sizes.hidden_columns} and V = {sizes.vocabulary} take {least} bytes without any "
            "logit; raise workspace_bytes to at least that"
        )
    even = -(-sizes.rows // -(-sizes.rows // rows))
    return Plan(even, columns, even * row_bytes + fixed)


def _decided(
    strategy: str, sizes: Sizes, plan: Plan, passes: int, backward: int, budget: int, reason: str
) -> Decision:
    most = max(plan.workspace_bytes, backward)
    decision = Decision(strategy, sizes.rows, plan, passes, most, budget, reason)
    if says_why():
        _log(decision)
    return decision


@functools.lru_cache(maxsize=1024)
def _log(decision: Decision) -> None:
    _logger.debug("linear_logps: %s", decision)
