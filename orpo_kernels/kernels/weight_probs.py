"""What multiplies hidden in the gradient of the head: a tile of it, from logits or from E kept.

    P_tv = share_t 1[v = y_t] + share2_t 1[v = y2_t] - softmax_t E_tv,   E = e^(z - m) d
    dW_v = sum_t P_tv h_t

R rows, C columns, M rows of the coefficients (`coefficients.py`). Float32 arithmetic, rounded once,
in the GEMMs' dtype; float16 over `unit`. The labels' entries stand in P: the GEMM sums them, however
often a label repeats. Bytes: the tile read, P written; P may take the memory of logits of at most
BLOCK columns, as every warp of a program has read its part of a row before one writes.
"""

import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels.elementwise import transform, whole_vectors
from orpo_kernels.kernels.inputs import Inputs
from orpo_kernels.kernels.start import Start
from orpo_kernels.kernels.tuning import VECTOR, row_holding


@triton.jit(
    do_not_specialize=[
        "first_row", "first_tile", "first_column", "C", "M", "stride_source", "stride_probs",
    ],
    do_not_specialize_on_alignment=[
        "bias_ptr", "coefficients_ptr", "labels_ptr", "second_ptr", "unit_ptr",
    ],
)  # fmt: skip
def _weight_probs_kernel(
    probs_ptr,  # (R, C)
    source_ptr,  # (R, C) logits, or E from its first column and row on
    bias_ptr,  # (V,)
    coefficients_ptr,  # (4, M) float32: m, softmax, share, share2
    labels_ptr, second_ptr,  # (M,) int64
    unit_ptr,  # (1,) float32
    first_row, first_tile, first_column, C, M, stride_source, stride_probs, logit_scale, softcap,
    HAS_SECOND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    KEPT: tl.constexpr, HAS_UNIT: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = first_row + pid
    coefficients = coefficients_ptr + row
    m, softmax = tl.load(coefficients), tl.load(coefficients + M)
    share, share2 = tl.load(coefficients + 2 * M), tl.load(coefficients + 3 * M)
    # A captured graph's row that is not scored may have no m: E is 0 there, and never infinite.
    m = tl.where(softmax == 0, float("inf"), m)
    label = (tl.load(labels_ptr + row) - first_column).to(tl.int32)

    column = tl.arange(0, BLOCK)
    inside = column < tl.cdiv(C, VECTOR) * VECTOR
    stride = whole_vectors(stride_source, True, VECTOR)
    tile_row = (first_tile + pid).to(tl.int64)
    source = source_ptr + tile_row * stride
    if KEPT:
        source = source_ptr + row.to(tl.int64) * stride + whole_vectors(first_column, True, VECTOR)
    x = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    e = x
    if not KEPT:
        if HAS_BIAS:
            bias = tl.load(bias_ptr + first_column + column, mask=column < C, other=0.0)
            x += bias.to(tl.float32)
        z, slope = transform(x, logit_scale, softcap, HAS_SOFTCAP)
        e = tl.exp(z - m) * slope
    p = tl.where(column == label, share, -softmax * e)
    if HAS_SECOND:
        second = (tl.load(second_ptr + row) - first_column).to(tl.int32)
        p = tl.where(column == second, share2, p)
    if HAS_UNIT:
        p = p / tl.load(unit_ptr)

    p = tl.where(column < C, p, 0.0)
    if not KEPT:
        # P may lie over the logits, at half their distance: where other warps still read theirs.
        tl.debug_barrier()
    out = probs_ptr + tile_row * whole_vectors(stride_probs, True, VECTOR)
    tl.store(out + column, p.to(probs_ptr.dtype.element_ty), mask=inside)


class WeightProbs:
    """Tiles of one call, from one source: tensors stay, rows and columns change."""

    def __init__(
        self,
        inputs: Inputs,
        probs: Tensor,  # (R, C) in the GEMMs' dtype, its rows on 16 bytes
        source: Tensor,  # (R, C) logits; or (M, V) E kept, rows on 16 bytes
        coefficients: Tensor,  # (5, M) float32
        unit: Tensor | None,  # (1,) float32
        *,
        columns: int,
        kept: bool,
    ) -> None:
        """Takes what stays the same from tile to tile, of at most `columns` columns."""
        row = row_holding("weight_probs", source.dtype, source.device, columns)
        self.start = Start(
            _weight_probs_kernel,
            (probs, source, inputs.bias, coefficients, inputs.labels, inputs.second, unit), row,
            {
                **inputs.options, "KEPT": kept, "HAS_UNIT": unit is not None,
                "BLOCK": row.block, "VECTOR": VECTOR,
            },
        )  # fmt: skip
        M = coefficients.shape[1]
        self.last = (M, source.stride(0), probs.stride(0), *inputs.numbers)

    def __call__(self, rows: tuple[int, int], first: int, columns: tuple[int, int]) -> None:
        """Launches rows `start` to `stop` of columns `v0` to `v1`, from row `first` of the tile."""
        (start, stop), (v0, v1) = rows, columns
        self.start(stop - start, start, first, v0, v1 - v0, *self.last)
