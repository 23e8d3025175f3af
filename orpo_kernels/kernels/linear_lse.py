"""The softmax statistics of `hidden weight^T` with no logit in memory: a GEMM that folds its tiles.

    x = hidden weight^T,   z = softcap(scale * (x + bias))
    max_r = max_c z_rc,   sum_r = sum_c exp(z_rc - max_r),   columns of labels left out
    total_r = sum_c z_rc,   dots_kr = x_r,label(k, r)

R rows, C vocabulary columns, H hidden columns, K label sets, S splits of the vocabulary. Float32
accumulators and arithmetic, exponentials to base 2: a logit is never rounded. float32 operands are
multiplied as three TensorFloat-32 products (tf32x3), 2^-21 of a product; exact float32 ("ieee") has
no tensor cores, so only devices without tf32x3 (AMD) get it.

A program owns a block of rows and every S-th block of columns. It multiplies one after the other
(the loads of the next go on under the epilogue) and folds each into a maximum and a sum per row, in
registers. The S partials of a row are combined by a second launch, in one order: no atomics, no
locks, 8 S bytes per row. `group` blocks of rows times all splits are neighbours in the grid: what
runs together reads few rows and few columns, and the second-level cache serves the rest.

Operands come by TMA (sm_90 and newer) or by pointers (cp.async on sm_80 to 89). Both need rows that
start on 16 bytes. Others (odd H, a stride that is no multiple) come by single elements, which
cannot be pipelined: as correct, as small, several times slower. Padding them would copy the head.

The label's dot is a kernel of its own, 4 H bytes per row: in the epilogue its selection takes the
registers that the 128 x 256 accumulator leaves (18 to 500 spills on sm_80 and sm_90).
"""

import contextvars
from collections.abc import Callable
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels import tuning
from orpo_kernels.kernels.elementwise import transform
from orpo_kernels.kernels.softmax_stats import combine, pointers
from orpo_kernels.kernels.tuning import VECTOR, Device, Row, Tile, cdiv, launch, share_columns

T = TypeVar("T")

_LOG2E = 1.4426950408889634
_LN2 = tl.constexpr(0.6931471805599453)
_LARGEST = tl.constexpr(3.4028234663852886e38)
_BY_TMA = ("wgmma", "tcgen05", "tma")
_DOT_ROWS = 4  # rows per program of the label dots


@triton.jit
def _place(pid, R, splits, group, BLOCK_R: tl.constexpr):
    """First row of a program and its split: the groups of blocks one after the other."""
    first_block = pid // (group * splits) * group
    in_group = pid % (group * splits)
    blocks = tl.minimum(tl.cdiv(R, BLOCK_R) - first_block, group)
    return (first_block + in_group % blocks) * BLOCK_R, in_group // blocks


@triton.jit
def _steps(H, stride_hidden, stride_weight, ALIGNED: tl.constexpr, VECTOR: tl.constexpr):
    """Columns, and the strides; where aligned as multiples of VECTOR, which the compiler sees."""
    if ALIGNED:
        H = H // VECTOR * VECTOR
        stride_hidden = stride_hidden // VECTOR * VECTOR
        stride_weight = stride_weight // VECTOR * VECTOR
    return H, stride_hidden, stride_weight


@triton.jit
def _leave_out(z, label, second, first, C, BLOCK_C: tl.constexpr, LABEL_SETS: tl.constexpr):
    """-inf in the columns of labels and beyond the vocabulary, in the few blocks that have any."""
    here = (label >= first) & (label < first + BLOCK_C)
    if LABEL_SETS == 2:
        here = here | ((second >= first) & (second < first + BLOCK_C))
    if (tl.max(here.to(tl.int32), 0) > 0) | (first + BLOCK_C > C):
        offs_c = tl.arange(0, BLOCK_C)[None, :]
        left_out = (offs_c >= C - first) | (offs_c == (label - first)[:, None])
        if LABEL_SETS == 2:
            left_out = left_out | (offs_c == (second - first)[:, None])
        z = tl.where(left_out, float("-inf"), z)
    return z


@triton.jit
def _fold(z, m, s):
    """The running maximum and sum (base 2) of each row, with those of `z`."""
    top = tl.maximum(m, tl.max(z, 1))
    base = tl.where(top == float("-inf"), 0.0, top)
    return top, s * tl.exp2(m - base) + tl.sum(tl.exp2(z - base[:, None]), 1)


@triton.jit(
    do_not_specialize=[
        "stride_hidden", "stride_weight", "stride_labels", "R", "C", "H", "first_column", "splits",
        "group",
    ],
    do_not_specialize_on_alignment=["max_ptr", "sum_ptr", "total_ptr", "bias_ptr", "labels_ptr"],
)  # fmt: skip
def _linear_lse_kernel(
    max_ptr, sum_ptr, total_ptr,  # (R, S) float32
    hidden_ptr, stride_hidden,  # (R, H)
    weight_ptr, stride_weight,  # (C, H)
    bias_ptr,  # (C,)
    labels_ptr, stride_labels,  # (K, R) int64
    R, C, H, first_column, splits, group,
    logit_scale, softcap,  # times log2 e, so that z is
    LABEL_SETS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    WITH_TOTAL: tl.constexpr, TMA: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    first_row, split = _place(tl.program_id(0), R, splits, group, BLOCK_R)
    row = first_row + tl.arange(0, BLOCK_R)
    exists = row < R
    label = (tl.load(labels_ptr + row, mask=exists, other=-1) - first_column).to(tl.int32)
    second = label
    if LABEL_SETS == 2:
        second = tl.load(labels_ptr + stride_labels + row, mask=exists, other=-1)
        second = (second - first_column).to(tl.int32)

    tl.assume(H > 0)  # else the epilogue is compiled twice, once for no step at all
    width, hidden_step, weight_step = _steps(H, stride_hidden, stride_weight, ALIGNED, VECTOR)
    if TMA:
        hidden_rows = tl.make_tensor_descriptor(
            hidden_ptr, [R, H], [stride_hidden, 1], [BLOCK_R, BLOCK_H]
        )
        weight_rows = tl.make_tensor_descriptor(
            weight_ptr, [C, H], [stride_weight, 1], [BLOCK_C, BLOCK_H]
        )
    # Rows beyond the last read the last: what becomes of them is not stored.
    hidden_offs = tl.minimum(row, R - 1).to(tl.int64) * hidden_step

    m = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK_R,), tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    # One loop of both: TMA loads run ahead into the next block. A bias leaves no registers for it.
    for block in tl.range(split, tl.cdiv(C, BLOCK_C), splits, flatten=TMA and not HAS_BIAS):
        first = block * BLOCK_C
        column = first + tl.arange(0, BLOCK_C)
        weight_offs = column.to(tl.int64) * weight_step
        x = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
        for h in tl.range(0, H, BLOCK_H):
            if TMA:
                a = hidden_rows.load([first_row, h])
                b = weight_rows.load([first, h])
            else:
                k = h + tl.arange(0, BLOCK_H)[None, :]
                inside = (column < C)[:, None] & (k < width)
                a = tl.load(hidden_ptr + hidden_offs[:, None] + k, mask=k < width, other=0.0)
                b = tl.load(weight_ptr + weight_offs[:, None] + k, mask=inside, other=0.0)
            x = tl.dot(a, b.T, x, input_precision=PRECISION)

        if HAS_BIAS:
            bias = tl.load(bias_ptr + column, mask=column < C, other=0.0)
            x += bias.to(tl.float32)[None, :]
        z, _ = transform(x, logit_scale, softcap, HAS_SOFTCAP)
        if WITH_TOTAL:  # columns beyond the vocabulary are 0
            total += tl.sum(z, 1)
        z = _leave_out(z, label, second, first, C, BLOCK_C, LABEL_SETS)
        m, s = _fold(z, m, s)

    offs = row.to(tl.int64) * splits + split
    # Nothing but labels: the smallest number, so that exp(z - max) stays 0 in whoever uses it.
    tl.store(max_ptr + offs, tl.maximum(m * _LN2, -_LARGEST), mask=exists)
    tl.store(sum_ptr + offs, s, mask=exists)
    if WITH_TOTAL:
        tl.store(total_ptr + offs, total * _LN2, mask=exists)


@triton.jit(
    do_not_specialize=["stride_hidden", "stride_weight", "stride_labels", "R", "H"],
    do_not_specialize_on_alignment=["dots_ptr", "labels_ptr"],
)
def _label_dots_kernel(
    dots_ptr,  # (K, R) float32
    hidden_ptr, stride_hidden,  # (R, H)
    weight_ptr, stride_weight,  # (C, H)
    labels_ptr, stride_labels,  # (K, R) int64
    R, H,
    ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    pid_set = tl.program_id(1).to(tl.int64)
    exists = row < R
    label = tl.load(labels_ptr + pid_set * stride_labels + row, mask=exists, other=-1)
    width, hidden_step, weight_step = _steps(H, stride_hidden, stride_weight, ALIGNED, VECTOR)
    hidden_offs = row.to(tl.int64) * hidden_step
    weight_offs = label * weight_step

    sums = tl.zeros((BLOCK_R, BLOCK_H), tl.float32)
    for h in range(0, H, BLOCK_H):
        k = h + tl.arange(0, BLOCK_H)[None, :]
        inside = (label >= 0)[:, None] & (k < width)
        a = tl.load(hidden_ptr + hidden_offs[:, None] + k, mask=inside, other=0.0)
        b = tl.load(weight_ptr + weight_offs[:, None] + k, mask=inside, other=0.0)
        sums += a.to(tl.float32) * b.to(tl.float32)

    tl.store(dots_ptr + pid_set * R + row, tl.sum(sums, 1), mask=exists)


def linear_lse(
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (C, H)
    bias: Tensor | None,  # (C,)
    labels: Tensor,  # (K, R)
    logit_scale: float,
    softcap: float | None,
    with_logit_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launches all three: (R,) maximum and sum of exponentials, (K, R) dots, (R,) total or (0,)."""
    (R, H), K = hidden.shape, labels.shape[0]

    def run_dots(row: Row, _device: Device) -> Tensor:
        dots = torch.empty((K, R), dtype=torch.float32, device=hidden.device)
        _label_dots_kernel[(cdiv(R, _DOT_ROWS), K)](
            dots, hidden, hidden.stride(0), weight, weight.stride(0), labels, labels.stride(0),
            R, H, ALIGNED=_in_vectors(hidden, weight),
            BLOCK_R=_DOT_ROWS, BLOCK_H=row.block, VECTOR=VECTOR,
            num_warps=row.warps, enable_fp_fusion=True,
        )  # fmt: skip
        return dots

    operands = (hidden, weight, bias, labels)
    partials = fold(*operands, (logit_scale, softcap), with_logit_sum=with_logit_sum)
    with tuning.guard(hidden.device):
        row_max, row_sum, total = combine(partials)
    return row_max, row_sum, launch("label_dots", hidden.dtype, hidden.device, run_dots), total


def fold(
    hidden: Tensor,  # (R, H)
    weight: Tensor,  # (C, H)
    bias: Tensor | None,  # (C,)
    labels: Tensor,  # (K, R)
    transform: tuple[float, float | None],
    first_column: int = 0,
    *,
    with_logit_sum: bool = False,
) -> Tensor:
    """Launches the product: (2 or 3, R, S) float32 partial maxima, sums of exponentials, of logits.

    `weight` and `bias` begin with entry `first_column` of the vocabulary.
    """
    (R, H), C, K = hidden.shape, weight.shape[0], labels.shape[0]
    form = _form(hidden, weight, tuning.device_info(hidden.device))
    logit_scale, softcap = transform
    bias = None if bias is None else bias.contiguous()

    def run(tile: Tile, device: Device) -> Tensor:
        row_blocks, column_blocks = cdiv(R, tile.rows), cdiv(C, tile.columns)
        share = share_columns(row_blocks, column_blocks, tile, device.processors)
        shape = (3 if with_logit_sum else 2, R, share.splits)
        partials = torch.empty(shape, dtype=torch.float32, device=hidden.device)
        _linear_lse_kernel[(row_blocks * share.splits,)](
            *pointers(partials), hidden, hidden.stride(0), weight, weight.stride(0), bias,
            labels, labels.stride(0), R, C, H, first_column, share.splits, share.group,
            logit_scale * _LOG2E, _LOG2E if softcap is None else softcap * _LOG2E,
            LABEL_SETS=K, HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
            WITH_TOTAL=with_logit_sum, TMA=form in _BY_TMA, ALIGNED=form == "pointers",
            PRECISION="tf32x3" if device.capability else "ieee",
            BLOCK_R=tile.rows, BLOCK_C=tile.columns, BLOCK_H=tile.depth, VECTOR=VECTOR,
            num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=True,
        )  # fmt: skip
        return partials

    transformed = "" if bias is None and softcap is None else "_transformed"
    name = f"linear_lse_{form}{transformed}"
    return _with_allocator(hidden.device, lambda: launch(name, hidden.dtype, hidden.device, run))


def _form(hidden: Tensor, weight: Tensor, device: Device) -> str:
    """Where the operands come from, a part of the name in the table."""
    if 0 < device.capability < 80:
        raise NotImplementedError(
            f"linear_lse needs tensor cores of sm_80 or newer, this device is sm_{device.capability}"
        )
    if device.capability >= 90:
        # A descriptor stops at the last column by itself: H may be any number.
        apart = [each.stride(0) * each.element_size() for each in (hidden, weight)]
        if not any(each % 16 for each in (hidden.data_ptr(), weight.data_ptr(), *apart)):
            return {9: "wgmma", 10: "tcgen05"}.get(device.capability // 10, "tma")
    elif _in_vectors(hidden, weight):
        return "pointers"
    return "elements"


def _in_vectors(hidden: Tensor, weight: Tensor) -> bool:
    """Whether every row of both is whole vectors and starts on the boundary of one."""
    sizes = (hidden.shape[1], hidden.stride(0), weight.stride(0))
    starts = (hidden.data_ptr(), weight.data_ptr())
    return not any(each % VECTOR for each in sizes) and not any(each % 16 for each in starts)


def _with_allocator(device: torch.device, call: Callable[[], T]) -> T:
    """`call()` where Triton may allocate descriptors; the user's own allocator stays what it is."""

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device=device)

    def run() -> T:
        triton.set_allocator(allocate)
        return call()

    # The allocator is a context variable: set in a copy, it is gone with it.
    return contextvars.copy_context().run(run)
