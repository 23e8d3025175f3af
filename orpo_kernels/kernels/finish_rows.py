"""From the running softmax of rows to their statistics and g: the label columns are added here.

    total = s + e^(z_y - m) (+ e^(z_2 - m)),   log-probs and 1 - p from log-sums, never subtracted
    g = d_y W[y] - (P W) / s

and the statistics (7, N): m, e^(m - lse), the mass beside the labels, log-prob of the first label
and of the second, slope of each. m is the reference of P (z_y where there is no column beside the
labels), everything is relative to it. One program per row; results are written where the row stands
among all N. R rows of a chunk, M rows of the state. Bytes: 4 to 8 H of sums and a row of the head
read, a row of g written.
"""

import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels.elementwise import log_add, log_sigmoid, where_width, whole_vectors
from orpo_kernels.kernels.inputs import LANGUAGE_DTYPE, Inputs, Sums, pair
from orpo_kernels.kernels.start import Start, in_vectors
from orpo_kernels.kernels.tuning import VECTOR, row_of


@triton.jit
def _write_part(
    g_ptr, sums_ptr, partial_ptr, entry_ptr, width, over_sum, slope, has_label, adds_sums,
    HAS_PARTIAL: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        total = tl.load(sums_ptr + column, mask=column < where_width(width, adds_sums), other=0.0)
        if HAS_PARTIAL:
            total += tl.load(partial_ptr + column, mask=inside, other=0.0).to(tl.float32)
        w = tl.load(entry_ptr + column, mask=column < where_width(width, has_label), other=0.0)
        g = slope * w.to(DTYPE).to(tl.float32) - over_sum * total
        tl.store(g_ptr + column, g.to(g_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "first_row", "first_sum", "blocks", "M", "N", "H", "r", "stride_g", "stride_g_r",
        "stride_weight", "stride_weight_r",
    ],
    do_not_specialize_on_alignment=[
        "statistics_ptr", "state_ptr", "labels_ptr", "second_ptr", "index_ptr",
    ],
)  # fmt: skip
def _finish_rows_kernel(
    statistics_ptr,  # (7, N) float32
    g_ptr, g_r_ptr,  # (N, H), (N, r)
    state_ptr,  # (2 + 2 K, M) float32
    accumulator_ptr, partial_ptr,  # (G, H + r) float32, (G, H + r)
    weight_ptr, weight_r_ptr,  # (V, H), (V, r)
    labels_ptr, second_ptr, index_ptr,  # (M,) int64
    first_row, first_sum, blocks, M, N, H, r, stride_g, stride_g_r, stride_weight, stride_weight_r,
    HAS_SECOND: tl.constexpr, HAS_INDEX: tl.constexpr, WITH_G: tl.constexpr, LOW_RANK: tl.constexpr,
    HAS_PARTIAL: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = first_row + pid
    position = row.to(tl.int64)
    if HAS_INDEX:
        position = tl.load(index_ptr + row)
    state = state_ptr + row
    reference, total = tl.load(state), tl.load(state + M)
    z, slope = tl.load(state + 2 * M), tl.load(state + 3 * M)

    nothing = total == 0  # but labels: m is not one
    over_sum = tl.where(nothing, 0.0, 1.0 / tl.where(nothing, 1.0, total))
    m = tl.where(nothing, z, reference)
    rest = tl.where(nothing, float("-inf"), tl.log(tl.where(nothing, 1.0, total)))
    first = z - m
    mass = total + tl.exp(first)
    besides_first = rest
    second_logp = 0.0
    second_slope = 0.0
    if HAS_SECOND:
        distinct = tl.load(second_ptr + row) >= 0
        second = tl.load(state + 4 * M) - m
        second_slope = tl.load(state + 5 * M)
        besides_first = tl.where(distinct, log_add(rest, second), rest)
        second_logp = tl.where(distinct, log_sigmoid(second - log_add(rest, first)), 0.0)
        mass = tl.where(distinct, mass + tl.exp(second), mass)

    out = statistics_ptr + position
    tl.store(out, m)
    tl.store(out + N, 1.0 / mass)
    tl.store(out + 2 * N, total / mass)
    tl.store(out + 3 * N, log_sigmoid(first - besides_first))
    tl.store(out + 4 * N, second_logp)
    tl.store(out + 5 * N, slope)
    tl.store(out + 6 * N, second_slope)

    if WITH_G:
        label = tl.load(labels_ptr + row)
        over_sum = tl.where(label >= 0, over_sum, 0.0)  # 0 where a row is not scored
        width = whole_vectors(H, ALIGNED, VECTOR)
        rest_width = whole_vectors(r, ALIGNED, VECTOR)
        sums = (first_sum + pid).to(tl.int64) * (width + rest_width)
        partial = accumulator_ptr
        if HAS_PARTIAL:
            partial = partial_ptr + sums
        _write_part(
            g_ptr + position * whole_vectors(stride_g, ALIGNED, VECTOR), accumulator_ptr + sums,
            partial, weight_ptr + label * whole_vectors(stride_weight, ALIGNED, VECTOR), width,
            over_sum, slope, label >= 0, blocks > 0, HAS_PARTIAL, DTYPE, BLOCK,
        )  # fmt: skip
        if LOW_RANK:
            if HAS_PARTIAL:
                partial += width
            _write_part(
                g_r_ptr + position * whole_vectors(stride_g_r, ALIGNED, VECTOR),
                accumulator_ptr + sums + width, partial,
                weight_r_ptr + label * whole_vectors(stride_weight_r, ALIGNED, VECTOR), rest_width,
                over_sum, slope, label >= 0, blocks > 0, HAS_PARTIAL, DTYPE, BLOCK,
            )  # fmt: skip


class FinishRows:
    """What ends chunks of rows: results and sums stay, rows change."""

    def __init__(
        self,
        inputs: Inputs,
        state: Tensor,  # (2 + 2 K, M) float32
        sums: Sums | None,
        statistics: Tensor,  # (7, N) float32
        g: tuple[Tensor, Tensor],  # (N, H), (N, r); not looked at without sums
    ) -> None:
        """Takes what stays the same from chunk to chunk."""
        weight, weight_r = pair(inputs.weight)
        accumulator, partial = (None, None) if sums is None else sums
        with_g = accumulator is not None
        written = g[: len(inputs.weight)] if with_g else ()
        g_parts = pair(written) if written else (None, None)
        row = row_of("finish_rows", inputs.dtype, state.device)
        self.start = Start(
            _finish_rows_kernel,
            (
                statistics, *g_parts, state, accumulator, partial, weight,
                weight_r, inputs.labels, inputs.second, inputs.positions,
            ),
            row,
            {
                "HAS_SECOND": inputs.second is not None, "HAS_INDEX": inputs.positions is not None,
                "WITH_G": with_g, "LOW_RANK": weight_r is not None,
                "HAS_PARTIAL": partial is not None, "DTYPE": LANGUAGE_DTYPE[inputs.dtype],
                "ALIGNED": in_vectors(*inputs.weight, *written),
                "BLOCK": row.block, "VECTOR": VECTOR,
            },
        )  # fmt: skip
        rest = (0, 0) if weight_r is None else (weight_r.shape[1], weight_r.stride(0))
        strides = [each.stride(0) for each in written] + [0, 0]
        self.last = (
            state.shape[1], statistics.stride(0), weight.shape[1], rest[0], *strides[:2],
            weight.stride(0), rest[1],
        )  # fmt: skip

    def __call__(self, start: int, stop: int, first_sum: int, blocks: int) -> None:
        """Launches rows `start` to `stop`; of `blocks` products so far sums begin at `first_sum`.

        Where a product is apart, `blocks` are those that were added to the sums.
        """
        self.start(stop - start, start, first_sum, blocks, *self.last)
