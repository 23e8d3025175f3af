"""Per row of a tile of logits, the maximum and the sum of exponentials, in one read.

    z = softcap(scale * (x + bias))
    max_r = max_c z_rc                    sum_r = sum_c exp(z_rc - max_r),  c not a label's column
    logit_sum_r = sum_c z_rc,  every c    only when asked

R rows, C columns, K label sets, S splits of a row. Natural logarithms; float32 arithmetic. Bytes:
the tile once, and 8 S (12 S) per row. Online: every thread keeps a running maximum (from -inf) and sum of
its own vectors, so the loop has no barrier and about 1 + 1/VECTOR exponentials per logit; they meet
once, after it. A row is split over S programs when the rows alone do not fill the device; a second
launch combines their partials, always in the same order.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels.elementwise import aligned_row, edge_columns, transform
from orpo_kernels.kernels.tuning import MAX_SPLITS, VECTOR, Device, Row, cdiv, launch, split_row

_COMBINED_ROWS = 16  # rows per program of the combining kernel
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _merge(m, s, m_other, s_other):
    """Of two pairs (maximum, sum), the pair of both; -inf stands for nothing yet."""
    top = tl.maximum(m, m_other)
    base = tl.where(top == float("-inf"), 0.0, top)
    return top, s * tl.exp(m - base) + s_other * tl.exp(m_other - base)


@triton.jit(
    do_not_specialize=["stride_logits", "stride_labels", "C", "first_column", "blocks", "splits"],
    do_not_specialize_on_alignment=["max_ptr", "sum_ptr", "logit_sum_ptr", "labels_ptr"],
)
def _softmax_stats_kernel(
    max_ptr, sum_ptr, logit_sum_ptr,  # (R, S) float32
    logits_ptr, stride_logits,  # (R, C)
    bias_ptr,  # (C,)
    labels_ptr, stride_labels,  # (K, R) int64
    C, first_column, blocks, splits,
    logit_scale, softcap,
    LABEL_SETS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_LOGIT_SUM: tl.constexpr, HEAD: tl.constexpr,
    BLOCK: tl.constexpr, VECTOR: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = (pid // splits).to(tl.int64)
    split = pid % splits
    first, head, body = aligned_row(row, stride_logits, C, HEAD, VECTOR)
    begin = split * blocks * BLOCK
    end = tl.minimum(begin + blocks * BLOCK, body)
    label = (tl.load(labels_ptr + row) - first_column).to(tl.int32)
    second = label
    if LABEL_SETS == 2:
        second = (tl.load(labels_ptr + stride_labels + row) - first_column).to(tl.int32)

    # What is in no whole vector: once per row, by its first program.
    edge, exists = edge_columns(head, body, C, split, VECTOR)
    raw = tl.load(logits_ptr + row * stride_logits + edge, mask=exists, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + edge, mask=exists, other=0.0).to(tl.float32)
    z_edge, _edge_slope = transform(raw, logit_scale, softcap, HAS_SOFTCAP)
    if HAS_LOGIT_SUM:
        edge_logits = tl.sum(z_edge, 0)  # 0, like what was loaded, where there is no column
    z_edge = tl.where(exists & (edge != label) & (edge != second), z_edge, float("-inf"))
    edge_max = tl.max(z_edge, 0)
    edge_base = tl.where(edge_max == float("-inf"), 0.0, edge_max)
    edge_sum = tl.sum(tl.exp(z_edge - edge_base), 0)

    offs = tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    m = tl.full((BLOCK // LANE,), float("-inf"), tl.float32)
    s = tl.zeros((BLOCK // LANE,), tl.float32)
    if HAS_LOGIT_SUM:
        logit_sum = tl.zeros((BLOCK // LANE,), tl.float32)
    for start in range(begin, end, BLOCK):
        inside = start + offs < end
        x = tl.load(logits_ptr + first + start + offs, mask=inside, other=0.0).to(tl.float32)
        column = head + start + offs
        if HAS_BIAS:
            x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        z, _ = transform(x, logit_scale, softcap, HAS_SOFTCAP)
        if HAS_LOGIT_SUM:
            logit_sum += tl.sum(z, 1)
        z = tl.where(inside & (column != label) & (column != second), z, float("-inf"))
        top = tl.maximum(m, tl.max(z, 1))
        base = tl.where(top == float("-inf"), 0.0, top)
        s = s * tl.exp(m - base) + tl.sum(tl.exp(z - base[:, None]), 1)
        m = top

    top = tl.max(m, 0)
    base = tl.where(top == float("-inf"), 0.0, top)
    top, total = _merge(top, tl.sum(s * tl.exp(m - base), 0), edge_max, edge_sum)
    # Nothing but labels: the smallest number, so that exp(z - max) stays 0 in whoever uses it.
    tl.store(max_ptr + pid, tl.maximum(top, -_LARGEST))
    tl.store(sum_ptr + pid, total)
    if HAS_LOGIT_SUM:
        tl.store(logit_sum_ptr + pid, tl.sum(logit_sum, 0) + edge_logits)


@triton.jit(
    do_not_specialize=["R", "splits"],
    do_not_specialize_on_alignment=[
        "max_ptr", "sum_ptr", "logit_sum_ptr",
        "partial_max_ptr", "partial_sum_ptr", "partial_logit_sum_ptr",
    ],
)  # fmt: skip
def _softmax_stats_combine_kernel(
    max_ptr, sum_ptr, logit_sum_ptr,  # (R,)
    partial_max_ptr, partial_sum_ptr, partial_logit_sum_ptr,  # (R, S)
    R, splits,
    HAS_LOGIT_SUM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    split = tl.arange(0, BLOCK_S)
    exists = (row[:, None] < R) & (split[None, :] < splits)
    offs = row[:, None].to(tl.int64) * splits + split[None, :]

    m = tl.load(partial_max_ptr + offs, mask=exists, other=-_LARGEST)
    s = tl.load(partial_sum_ptr + offs, mask=exists, other=0.0)

    top = tl.max(m, 1)
    total = tl.sum(s * tl.exp(m - top[:, None]), 1)

    tl.store(max_ptr + row, top, mask=row < R)
    tl.store(sum_ptr + row, total, mask=row < R)
    if HAS_LOGIT_SUM:
        logit_sum = tl.sum(tl.load(partial_logit_sum_ptr + offs, mask=exists, other=0.0), 1)
        tl.store(logit_sum_ptr + row, logit_sum, mask=row < R)


def pointers(statistics: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of (2, ...) or (3, ...): the maximum, the sum of exponentials, that of logits or None."""
    row_max, sum_exp, *logit_sum = statistics.unbind(0)
    return row_max, sum_exp, logit_sum[0] if logit_sum else None


def combine(
    partials: Tensor,  # (2 or 3, R, S)
) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics of whole rows from those of their splits, (R,) each; no sum of logits: (0,)."""
    if partials.shape[2] == 1:
        _load_combination(partials.device, partials.shape[0])
        statistics = partials.squeeze(2)
    else:
        statistics = _launch_combination(partials)
    row_max, sum_exp, logit_sum = pointers(statistics)
    return row_max, sum_exp, row_max.new_empty(0) if logit_sum is None else logit_sum


def _launch_combination(partials: Tensor) -> Tensor:
    count, R, splits = partials.shape
    combined = partials.new_empty((count, R))
    _softmax_stats_combine_kernel[(cdiv(R, _COMBINED_ROWS),)](
        *pointers(combined), *pointers(partials), R, splits, HAS_LOGIT_SUM=count == 3,
        BLOCK_R=_COMBINED_ROWS, BLOCK_S=MAX_SPLITS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return combined


@functools.cache
def _load_combination(device: torch.device, count: int) -> None:
    # While a CUDA graph is captured nothing can be loaded, and more rows are processed or fewer
    # splits made then: what the eager warm-up did not need is loaded by it all the same.
    _launch_combination(torch.zeros((count, 1, 1), dtype=torch.float32, device=device))


def softmax_stats(
    logits: Tensor,  # (R, C)
    bias: Tensor | None,  # (C,)
    labels: Tensor,  # (K, R)
    first_column: int,
    logit_scale: float,
    softcap: float | None,
    with_logit_sum: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the statistics: (R,) float32 maximum, sum of exponentials, sum of logits or (0,)."""
    bias = None if bias is None else bias.contiguous()

    def run(row: Row, device: Device) -> tuple[Tensor, Tensor, Tensor]:
        R, C = logits.shape
        # A third running figure: with every option, whole blocks of 16-bit logits spill on sm_100.
        block = row.block // 2 if with_logit_sum else row.block
        split = split_row(R, C, block, device.processors)
        shape = (3 if with_logit_sum else 2, R, split.splits)
        partials = torch.empty(shape, dtype=torch.float32, device=logits.device)
        _softmax_stats_kernel[(R * split.splits,)](
            *pointers(partials), logits, logits.stride(0), bias, labels, labels.stride(0),
            C, first_column, split.blocks, split.splits,
            logit_scale, 1.0 if softcap is None else softcap,
            LABEL_SETS=labels.shape[0], HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
            HAS_LOGIT_SUM=with_logit_sum, HEAD=logits.stride(0) % VECTOR != 0,
            BLOCK=block, VECTOR=VECTOR, LANE=16 // logits.element_size(),
            num_warps=row.warps, enable_fp_fusion=True,
        )  # fmt: skip
        return combine(partials)

    return launch("softmax_stats", logits.dtype, logits.device, run)
