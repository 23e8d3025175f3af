"""Column sums of a tile weighted by row: the gradient of a head's bias, in one read.

    sums_c = sum_r coefficients_r tile_rc

R rows, C columns, S splits of the rows. Float32 products and sums. A program sums a block of
columns over its share of the rows, 8 rows at a time; the shares are added in a fixed order, no
atomics. Bytes: the tile once, 4 S per column. 16-byte loads where rows start on such a boundary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels.tuning import VECTOR, Device, Row, cdiv, launch

_ROWS = 8  # rows per step, summed by the thread that loads them
_STEPS = 4  # at least so many steps per program


@triton.jit(
    do_not_specialize=["stride_tile", "R", "C", "rows"],
    do_not_specialize_on_alignment=["coefficients_ptr"],
)
def _column_sums_kernel(
    sums_ptr,  # (S, C) float32
    tile_ptr, stride_tile,  # (R, C)
    coefficients_ptr,  # (R,) float32
    R, C, rows,
    HEAD: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    pid_split = tl.program_id(1)
    stride = stride_tile
    width = C
    if not HEAD:  # as multiples, which the compiler sees
        stride = stride_tile // VECTOR * VECTOR
        width = C // VECTOR * VECTOR
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_tile = column < width
    end = tl.minimum((pid_split + 1) * rows, R)

    total = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(pid_split * rows, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        offs = row[:, None].to(tl.int64) * stride + column[None, :]
        inside = (row < end)[:, None] & in_tile[None, :]
        x = tl.load(tile_ptr + offs, mask=inside, other=0.0).to(tl.float32)
        weight = tl.load(coefficients_ptr + row, mask=row < end, other=0.0)
        total += tl.sum(x * weight[:, None], 0)

    tl.store(sums_ptr + pid_split.to(tl.int64) * C + column, total, mask=in_tile)


def column_sums(
    tile: Tensor,  # (R, C)
    coefficients: Tensor,  # (R,) or (G, R) float32
) -> Tensor:
    """Launches the sums: (C,) or (G, C) float32, a launch for each row of coefficients."""
    if coefficients.ndim == 2:
        return torch.stack([column_sums(tile, each) for each in coefficients])
    coefficients = coefficients.contiguous()

    def run(row: Row, device: Device) -> Tensor:
        R, C = tile.shape
        blocks = cdiv(C, row.block)
        wanted = cdiv(8 * device.processors, blocks)
        splits = max(1, min(wanted, R // (_ROWS * _STEPS)))
        each = cdiv(cdiv(R, splits), _ROWS) * _ROWS
        splits = cdiv(R, each)
        sums = torch.empty((splits, C), dtype=torch.float32, device=tile.device)
        _column_sums_kernel[(blocks, splits)](
            sums, tile, tile.stride(0), coefficients, R, C, each,
            HEAD=tile.stride(0) % VECTOR != 0 or C % VECTOR != 0, BLOCK_R=_ROWS, BLOCK_C=row.block,
            VECTOR=VECTOR, num_warps=row.warps, enable_fp_fusion=True,
        )  # fmt: skip
        return sums.squeeze(0) if splits == 1 else sums.sum(0)

    return launch("column_sums", tile.dtype, tile.device, run)
