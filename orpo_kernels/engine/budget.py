"""From a budget in bytes to row chunks and vocabulary blocks: arithmetic only, no tensor.

The workspace is everything the vocabulary-sized work allocates beyond its inputs and its results
(log-probs, gradients): tiles, accumulators, gathered rows, widened strips. A plan is the largest
shape whose bytes fit; nothing is allocated beyond it.

Shapes are preferred in this order. CPU: 1024 rows x 8192 columns (16 MB of bf16 logits stay in a
last-level cache; under 256 rows the GEMM slows down), then fewer columns, then fewer rows.
Elsewhere: the whole vocabulary as long as 256 rows fit, then blocks of it.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch

from orpo_kernels.constants import DEFAULT_WORKSPACE_BYTES, MOST_LARGE

_Planned = TypeVar("_Planned")

_CPU_COLUMNS = (8192, 4096, 2048)
_CPU_BACKWARD_COLUMNS = (16384, 8192, 4096, 2048)
_COLUMNS = (65536, 32768, 16384, 8192)
_CPU_ROWS = (1024, 512, 256)
_ROWS = (8192, 4096, 2048, 1024, 512, 256)
_KEPT_ROWS = 256
_SMALL = tuple((rows, columns) for rows in (256, 128, 64, 32, 16) for columns in (1024, 512, 256))

_STRIP_BYTES_CPU = 2**21  # widened strip: an L2 cache; less costs calls, and threads their barriers
_STRIP_BYTES_OTHER = 2**22  # elsewhere a strip is a few launches: larger, yet inside 64 MiB
STRIPS = 4
"""Strips alive at once: the widened one, and with a softcap its slope and two temporaries."""


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic and of every per-row figure for logits of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def strip_bytes(device: torch.device) -> int:
    """Bytes of scratch one tile operation in plain torch may take (a strip and its temporaries)."""
    return STRIPS * (_STRIP_BYTES_CPU if device.type == "cpu" else _STRIP_BYTES_OTHER)


class TooSmallError(ValueError):
    """A workspace that does not hold the smallest tile, and what does.

    Args:
        budget: bytes that were allowed.
        least: bytes that suffice for what was asked.
        head: V and H.
    """

    def __init__(self, budget: int, least: int, head: tuple[int, int]) -> None:
        self.budget, self.least, self.head = budget, least, head
        super().__init__(
            f"workspace_bytes={budget} is too small for a head with H = {head[1]} and V = "
            f"{head[0]}: the smallest tile takes {least} bytes; raise workspace_bytes to at least "
            f"that (default: {DEFAULT_WORKSPACE_BYTES})"
        )


def sufficient(plan: Callable[[int], _Planned], budget: int) -> _Planned:
    """`plan(budget)`, a call's plans of forward and backward.

    Args:
        plan: from bytes to plans.
        budget: bytes.

    Returns:
        The plans.

    Raises:
        TooSmallError: nothing fits. It names bytes that suffice for all of them, when one less does
            not: what a single plan takes is not enough where another takes more.
    """
    try:
        return plan(budget)
    except TooSmallError as error:
        refused, enough, head = budget, max(error.least, budget + 1), error.head

    def fits(some_bytes: int) -> bool:
        try:
            plan(some_bytes)
        except TooSmallError:
            return False
        return True

    while not fits(enough):
        refused, enough = enough, 2 * enough
    while enough - refused > 1:
        middle = (enough + refused) // 2
        refused, enough = (refused, middle) if fits(middle) else (middle, enough)
    raise TooSmallError(budget, enough, head)


def spans(count: int, step: int) -> Iterator[tuple[int, int]]:
    """`range(count)` in (start, stop) pieces of `step`; the last may be shorter."""
    for start in range(0, count, step):
        yield start, min(start + step, count)


@dataclass(frozen=True)
class Sizes:
    """Sizes of one call, and how its device multiplies.

    Attributes:
        rows: scored rows.
        vocabulary: V.
        hidden_columns: H, the columns of a low-rank part included.
        label_sets: 1, or 2 scored in one pass.
        compute_dtype: of the GEMMs' operands.
        weight_is_copied: whether a vocabulary block of the head is a copy: cast, joined with its
            low-rank part, or of a head whose rows are not contiguous.
        device: of the head.
        widens: whether a GEMM of 16-bit operands writes float32 there (`gemm.gemm_widens`).
        on_triton: whether the loop for Triton devices runs (`kernels.runs_triton`).
    """

    rows: int
    vocabulary: int
    hidden_columns: int
    label_sets: int
    compute_dtype: torch.dtype
    weight_is_copied: bool
    device: torch.device
    widens: bool = False
    on_triton: bool = False

    @property
    def product_dtype(self) -> torch.dtype:
        """Dtype out of a GEMM: float32 where it can widen, a 16-bit logit costs 1e-2 of dhidden."""
        return torch.float32 if self.widens else self.compute_dtype

    @property
    def on_cpu(self) -> bool:
        """Whether tiles are sized for the caches of a CPU."""
        return self.device.type == "cpu" and not self.on_triton

    @property
    def refines(self) -> bool:
        """Whether large entries are redone in float32: where a GEMM rounds logits, on a CPU."""
        return self.on_cpu and self.product_dtype.itemsize == 2

    @property
    def list_bytes(self) -> int:
        """Bytes a row's list of large entries may take: twice a column and a value, and their E."""
        return 20 * MOST_LARGE if self.refines else 0

    @property
    def sums_apart(self) -> bool:
        """Whether a product is summed after the GEMM: operands narrower than the accumulator."""
        return self.compute_dtype != accumulation_dtype(self.compute_dtype)

    @property
    def partial_bytes(self) -> int:
        """Bytes of an element of a product that is summed apart."""
        return self.product_dtype.itemsize if self.sums_apart else 0

    @property
    def wide_bytes(self) -> int:
        """Bytes of an element of an accumulator."""
        return accumulation_dtype(self.compute_dtype).itemsize

    def pitch(self, columns: int) -> int:
        """Elements from a row of a tile to the next: on a GPU rows start on 16 bytes.

        Tensor-core GEMMs and 16-byte accesses need it, and a resized vocabulary is often odd.
        """
        return columns if self.on_cpu else -(-columns // 8) * 8


@dataclass(frozen=True)
class Plan:
    """Rows per chunk, a multiple of `row_block`, columns per vocabulary block, bytes this takes."""

    rows: int
    columns: int
    workspace_bytes: int
    row_block: int = 1

    def even(self, rows: int) -> "Plan":
        """The same for `rows` rows, in chunks of one size."""
        chunks = max(1, -(-rows // self.rows))
        even = max(1, -(-rows // chunks))
        even = -(-even // self.row_block) * self.row_block
        return Plan(even, self.columns, self.workspace_bytes, self.row_block)


def workspace_budget(workspace_bytes: int | None, device: torch.device) -> int:
    """What is asked for; by default 64 MiB, or 1 % of the device's memory where that is more."""
    if workspace_bytes is not None:
        return workspace_bytes
    if device.type == "cuda":
        return max(DEFAULT_WORKSPACE_BYTES, _memory_of(device) // 100)
    return DEFAULT_WORKSPACE_BYTES


@functools.cache
def _memory_of(device: torch.device) -> int:
    """Bytes of a GPU, asked once: every call has a budget."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def plan_forward(sizes: Sizes, budget: int, *, with_gradient: bool) -> Plan:
    """Shape of the forward: logits tile, and with a gradient the float32 accumulator of E W."""
    per_cell = sizes.product_dtype.itemsize
    if with_gradient and sizes.widens:
        per_cell += sizes.compute_dtype.itemsize
    per_row, per_column = forward_units(sizes, with_gradient)
    return first_fit(sizes, budget, (per_row, per_column, per_cell), shapes(sizes))


def kept_rows(sizes: Sizes, budget: int) -> int:
    """How many rows of E `(N, V)` fit beside the workspace; does not depend on `sizes.rows`."""
    reserve = _kept_forward_bytes(sizes, _KEPT_ROWS)
    narrow, wide = sizes.compute_dtype.itemsize, sizes.wide_bytes
    block = sizes.hidden_columns * (_KEPT_ROWS * (narrow + 2 * wide) + 1024 * 2 * wide)
    reserve = max(reserve, block + 2**20)
    return max(0, budget - reserve) // (sizes.vocabulary * narrow)


def plan_kept(sizes: Sizes, capacity: int, budget: int) -> Plan:
    """Shape of a forward that keeps E for `capacity` rows (at most `kept_rows`).

    One block, the whole vocabulary: then E has one reference per row and needs no rescaling.
    """
    left = budget - capacity * sizes.vocabulary * sizes.compute_dtype.itemsize
    rows = max(
        _KEPT_ROWS, *(r for r in _ROWS if _kept_forward_bytes(sizes, r) <= left or r == _KEPT_ROWS)
    )
    return Plan(
        min(rows, sizes.rows), sizes.vocabulary, budget - left + _kept_forward_bytes(sizes, rows)
    )


def _kept_forward_bytes(sizes: Sizes, rows: int) -> int:
    per_row, per_column = forward_units(sizes, with_gradient=True)
    per_cell = sizes.product_dtype.itemsize if sizes.widens else 0
    tile = rows * (per_row + sizes.vocabulary * per_cell)
    return tile + sizes.vocabulary * per_column + strip_bytes(sizes.device)


def plan_backward(
    sizes: Sizes, budget: int, gradient_columns: int, *, recompute: bool, reserved: int = 0
) -> Plan:
    """Shape of the weight gradient: a float32 block of it, and the recomputed tile.

    Args:
        sizes: of the problem.
        budget: bytes.
        gradient_columns: columns of the weight parts that need a gradient (0: the bias only).
        recompute: whether a tile of logits is needed (E was not kept).
        reserved: bytes of the budget that are taken, whatever the shape.

    Returns:
        The plan.
    """
    units = _backward_units(sizes, gradient_columns, recompute)
    return first_fit(sizes, budget, units, shapes(sizes, _CPU_BACKWARD_COLUMNS), (reserved, 0))


def plan_direct(
    sizes: Sizes, budget: int, gradient_columns: int, *, recompute: bool
) -> Plan | None:
    """Shape of a weight gradient whose GEMMs write it: all rows in one chunk, no block beside.

    Args:
        sizes: of the problem.
        budget: bytes.
        gradient_columns: columns of the weight.
        recompute: whether a tile of logits is needed.

    Returns:
        The plan; None when nothing of the kind fits.
    """
    per_row, _, per_cell = _backward_units(sizes, gradient_columns, recompute)
    copied = sizes.hidden_columns * sizes.compute_dtype.itemsize if sizes.weight_is_copied else 0
    units = (per_row, copied + 2 * sizes.wide_bytes, per_cell)
    for columns in _CPU_BACKWARD_COLUMNS:
        shape = (sizes.rows, min(columns, sizes.vocabulary))
        if (need := _bytes(sizes, units, *shape)) <= budget:
            return Plan(*shape, need)
    return None


def _backward_units(sizes: Sizes, gradient_columns: int, recompute: bool) -> tuple[int, int, int]:
    """Bytes per row, per column and per cell of the weight gradient."""
    narrow, wide = sizes.compute_dtype.itemsize, sizes.wide_bytes
    per_row = gradient_columns * (narrow + 2 * wide) + 64 * sizes.label_sets + sizes.list_bytes
    per_column = gradient_columns * (wide + sizes.partial_bytes) + 2 * wide
    per_cell = 0
    if recompute:
        per_row += sizes.hidden_columns * narrow
        per_cell += sizes.product_dtype.itemsize + (narrow if sizes.widens else 0)
        per_column += sizes.hidden_columns * narrow if sizes.weight_is_copied else 0
    return per_row, per_column, per_cell


def forward_units(sizes: Sizes, with_gradient: bool) -> tuple[int, int]:
    """Bytes per row (gathered, widened, label entries, product, accumulator) and per column."""
    narrow, wide = sizes.compute_dtype.itemsize, sizes.wide_bytes
    per_row = sizes.hidden_columns * (narrow + (2 + sizes.label_sets) * wide) + 128
    per_row += sizes.list_bytes
    if with_gradient:
        per_row += sizes.hidden_columns * (wide + sizes.partial_bytes)
    return per_row, sizes.hidden_columns * narrow if sizes.weight_is_copied else 0


def shapes(sizes: Sizes, cpu_columns: tuple[int, ...] = _CPU_COLUMNS) -> Iterator[tuple[int, int]]:
    """Rows and columns of a tile, in the order of preference, down to one of a few KiB."""
    if sizes.on_cpu:
        yield from ((rows, columns) for rows in _CPU_ROWS for columns in cpu_columns)
    else:
        yield from ((rows, sizes.vocabulary) for rows in _ROWS)
        yield from ((rows, columns) for rows in _ROWS[3:] for columns in _COLUMNS)
    yield from _SMALL


def first_fit(
    sizes: Sizes,
    budget: int,
    unit_bytes: tuple[int, int, float],
    shapes: Iterable[tuple[int, int]],
    reserved: tuple[int, int] = (0, 0),
    row_block: int = 1,
    either: tuple[int, float] = (0, 0.0),
) -> Plan:
    """The first shape, of whole blocks of rows, whose bytes per row, column and cell fit.

    `reserved` bytes are taken whatever the shape, and for each vocabulary block; `either` are
    bytes per row or per cell, whichever is more.
    """
    least = 0
    for rows, columns in (shape for shape in shapes if shape[0] >= row_block):
        rows, columns = min(rows, sizes.rows), min(columns, sizes.vocabulary)
        need = _bytes(sizes, unit_bytes, rows, columns)
        need += reserved[0] + reserved[1] * -(-sizes.vocabulary // columns)
        need += rows * max(either[0], math.ceil(columns * either[1]))
        if need <= budget:
            even = -(-sizes.rows // -(-sizes.rows // rows))
            return Plan(-(-even // row_block) * row_block, columns, need, row_block)
        least = min(least or need, need)
    raise TooSmallError(budget, least, (sizes.vocabulary, sizes.hidden_columns))


def _bytes(sizes: Sizes, unit_bytes: tuple[int, int, float], rows: int, columns: int) -> int:
    per_row, per_column, per_cell = unit_bytes
    scratch = min(strip_bytes(sizes.device), 4 * rows * columns * sizes.wide_bytes)
    cells = rows * sizes.pitch(columns)
    return rows * per_row + columns * per_column + math.ceil(cells * per_cell) + scratch
