"""Column sums of a tile into a vector of the vocabulary: the gradient of a head's bias.

    totals_v = sum_t P_tv,   or totals_v + that for further rows of the same columns

R rows, C columns. Float32 sums in one order, no atomics: a program sums a block of columns over all
rows. Bytes: the tile once, from the second-level cache, where the row kernel left it.
"""

import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels.elementwise import where_width, whole_vectors
from orpo_kernels.kernels.start import Start
from orpo_kernels.kernels.tuning import VECTOR, cdiv, row_of

_ROWS = 64  # per step


@triton.jit(
    do_not_specialize=["first_column", "R", "C", "stride_tile", "adds"],
    do_not_specialize_on_alignment=["totals_ptr"],
)
def _column_totals_kernel(
    totals_ptr,  # (V,) float32
    tile_ptr,  # (R, C)
    first_column, R, C, stride_tile, adds,
    BLOCK_R: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, BLOCK_R)
    stride = whole_vectors(stride_tile, True, VECTOR)
    in_tile = column < tl.cdiv(C, VECTOR) * VECTOR
    total = tl.zeros((BLOCK_R, BLOCK), tl.float32)
    for start in range(0, R, BLOCK_R):
        row = start + lane
        offs = row[:, None].to(tl.int64) * stride + column[None, :]
        inside = (row < R)[:, None] & in_tile[None, :]
        total += tl.load(tile_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    out = totals_ptr + first_column + column
    before = tl.load(out, mask=column < where_width(C, adds != 0), other=0.0)
    tl.store(out, before + tl.sum(total, 0), mask=column < C)


class ColumnTotals:
    """Totals of one call: tile and vector stay, rows and columns change."""

    def __init__(self, totals: Tensor, tile: Tensor) -> None:
        """Takes `totals` (V,) float32 and the tile (R, C), whose rows start on 16 bytes."""
        self.row = row_of("column_totals", tile.dtype, tile.device)
        self.start = Start(
            _column_totals_kernel, (totals, tile), self.row,
            {"BLOCK_R": _ROWS, "BLOCK": self.row.block, "VECTOR": VECTOR},
        )  # fmt: skip
        self.stride = tile.stride(0)

    def __call__(self, rows: int, v0: int, v1: int, *, adds: bool) -> None:
        """Launches the totals of columns `v0` to `v1` over the first `rows` rows of the tile."""
        programs = cdiv(v1 - v0, self.row.block)
        self.start(programs, v0, rows, v1 - v0, self.stride, int(adds))
