"""GEMMs into memory that is there, and sums of their products: cuBLAS and oneDNN through torch."""

import functools

import torch
from torch import Tensor

from orpo_kernels.engine.tiles import accumulate_


@functools.cache
def gemm_widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a GEMM of 16-bit `dtype` operands writes float32 on this device.

    NVIDIA from sm_80 on: older cards have no such bf16 GEMM. A ROCm build may refuse `out_dtype`,
    which is asked once, by a GEMM of 16 x 16. Where it is refused, logits are rounded to `dtype`
    and products are summed in float32 afterwards, as on a CPU.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    if not torch.cuda.is_available():
        return True  # a plan for a machine that has such a card
    if torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    square = torch.zeros((16, 16), dtype=dtype, device=device)
    wide = torch.empty_like(square, dtype=torch.float32)
    try:
        matmul_into(wide, square, square)
    except torch.cuda.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True


def operand_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """Dtype in which a device multiplies operands of `dtype` fastest: float32 in place of some.

    On a CPU of float16, which is 3 times slower there and overflows besides, and of bfloat16 where
    oneDNN has no kernel for it: without AVX-512 (or bf16 on ARM) torch's own loops take 3 to 150
    times what float32 takes. What is multiplied is widened a block at a time.
    """
    if device.type != "cpu" or dtype.itemsize != 2:
        return dtype
    return dtype if dtype == torch.bfloat16 and multiplies_bfloat16() else torch.float32


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices on this CPU."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def matmul_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`out = a @ b`, widened in the GEMM when `out` is wider than `a` (CUDA)."""
    if out.dtype == a.dtype:
        return torch.mm(a, b, out=out)
    return _widening_mm(out, a, b)


def add_matmul_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """`out += a @ b` in the epilogue of the GEMM, which reads and writes `out` as it is."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out)
    else:
        _widening_addmm(out, a, b)


def _widening_mm(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def _widening_addmm(out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def accumulate_product_(
    accumulator: Tensor, rescale: Tensor | None, a: Tensor, b: Tensor, partial: Tensor
) -> None:
    """`accumulator <- rescale * accumulator + a @ b`, (R, C), rescaled by row (R,) or not at all.

    `partial` (R or more, C) takes the product where the operands are narrower than the accumulator;
    it has no rows where the GEMM adds by itself.
    """
    if partial.shape[0] > 0:
        product = matmul_into(partial[: a.shape[0]], a, b)
        accumulate_(accumulator, product, rescale)
        return
    if rescale is not None:
        accumulator.mul_(rescale[:, None])
    accumulator.addmm_(a, b)


def tile_of(buffer: Tensor, rows: int, columns: int, pitch: int) -> Tensor:
    """`(R, C)` at the start of a flat buffer, its rows `pitch` elements apart."""
    return buffer[: rows * pitch].view(rows, pitch)[:, :columns]
