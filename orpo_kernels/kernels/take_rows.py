"""Rows gathered, cast and joined: what a GEMM reads, in one launch.

    out_t = (first_p, second_p),  p = index_t or t;   0 where the row is not scored

Rows of hidden states with those of its low-rank part, or entries of a head and of a LoRA on it, in
the GEMMs' dtype. R rows, H and r columns. Bytes: every element read and written once. A row may
lie at two strides (row p is row p % period of slice p // period), so that a slice such as
hidden[:, :-1] is read where it is. 16-byte accesses where rows start on such a boundary.
"""

import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels.elementwise import row_place, where_width, whole_vectors
from orpo_kernels.kernels.start import Start, in_vectors, places
from orpo_kernels.kernels.tuning import VECTOR, row_of


@triton.jit
def _copy_row(out_ptr, source_ptr, width, scale, exists, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        x = tl.load(source_ptr + column, mask=column < where_width(width, exists), other=0.0)
        if SCALED:
            x = x.to(tl.float32) * scale
        tl.store(out_ptr + column, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "first_row", "first_out", "stride_out", "H", "r", "period", "stride_slice", "stride_row",
        "period_r", "stride_slice_r", "stride_row_r",
    ],
    do_not_specialize_on_alignment=["index_ptr", "scored_ptr", "scale_ptr"],
)  # fmt: skip
def _take_rows_kernel(
    out_ptr,  # (R, H + r)
    first_ptr, second_ptr,  # (N, H), (N, r)
    index_ptr, scored_ptr,  # (M,) int64, (M,) bool
    scale_ptr,  # (1,) float32
    first_row, first_out, stride_out, H, r,
    period, stride_slice, stride_row, period_r, stride_slice_r, stride_row_r,
    HAS_SECOND: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_SCORED: tl.constexpr,
    SCALED: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = first_row + pid
    position = row.to(tl.int64)
    if HAS_INDEX:
        position = tl.load(index_ptr + row)
    exists = position >= 0
    if HAS_SCORED:
        exists = tl.load(scored_ptr + row) != 0
    scale = 1.0
    if SCALED:
        scale = tl.load(scale_ptr)
    out = out_ptr + (first_out + pid).to(tl.int64) * whole_vectors(stride_out, ALIGNED, VECTOR)

    width = whole_vectors(H, ALIGNED, VECTOR)
    offs = row_place(position, period, stride_slice, stride_row, ALIGNED, VECTOR)
    _copy_row(out, first_ptr + offs, width, scale, exists, SCALED, BLOCK)
    if HAS_SECOND:
        offs = row_place(position, period_r, stride_slice_r, stride_row_r, ALIGNED, VECTOR)
        rest = whole_vectors(r, ALIGNED, VECTOR)
        _copy_row(out + width, second_ptr + offs, rest, scale, exists, SCALED, BLOCK)


class TakeRows:
    """Rows of one matrix, or of two side by side, into the start of one buffer, chunk by chunk."""

    def __init__(
        self,
        out: Tensor,  # (R or more, H + r)
        parts: tuple[Tensor, ...],  # (N, H), and (N, r) or not; or (B, T, H), N = B T
        index: Tensor | None = None,  # (M,) int64
        scored: Tensor | None = None,  # (M,) bool
        scale: Tensor | None = None,  # (1,) float32
    ) -> None:
        """Takes what stays the same from chunk to chunk."""
        second = parts[1] if len(parts) == 2 else None
        row = row_of("take_rows", out.dtype, out.device)
        self.start = Start(
            _take_rows_kernel, (out, parts[0], second, index, scored, scale), row,
            {
                "HAS_SECOND": second is not None, "HAS_INDEX": index is not None,
                "HAS_SCORED": scored is not None, "SCALED": scale is not None,
                "ALIGNED": in_vectors(out, *parts), "BLOCK": row.block, "VECTOR": VECTOR,
            },
        )  # fmt: skip
        rest = 0 if second is None else second.shape[-1]
        strides = (*places(parts[0]), *((1, 0, 0) if second is None else places(second)))
        self.numbers = (out.stride(0), parts[0].shape[-1], rest, *strides)
        self.out = out

    def __call__(self, start: int, stop: int, first: int = 0) -> Tensor:
        """Launches rows `start` to `stop`: `(stop - start, H + r)` of the buffer, from `first` on."""
        self.start(stop - start, start, first, *self.numbers)
        return self.out[first : first + stop - start]
