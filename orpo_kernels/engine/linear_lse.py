"""`linear_lse`: the softmax statistics of a whole head, in memory that depends on no size.

    x = hidden weight^T,   z = softcap(scale * (x + bias))

    linear_lse  max over the columns of no label and sum of exp(z - max), per row;
                dots x of the labels; on request the sum of z over all columns

As `softmax_stats` over all V columns, of logits that are never there: on a GPU with tensor cores a
Triton GEMM (`kernels/linear_lse.py`); elsewhere, and for float64, this file's plain torch, a tile
at a time. `hidden` (R, H) and `weight` (V, H) are of one dtype, `labels` (K, R) int64, -1 where a
row has none. The mean logit is the sum over V.
"""

import torch
from torch import Tensor

from orpo_kernels.engine.budget import accumulation_dtype, spans
from orpo_kernels.engine.gemm import gemm_widens, matmul_into, operand_dtype
from orpo_kernels.engine.tiles import softmax_stats
from orpo_kernels.engine.tiles.plain import merge
from orpo_kernels.engine.tiles.schemas import linear_lse
from orpo_kernels.kernels import register_tile_operation

__all__ = ["linear_lse"]

_ROWS, _COLUMNS = 256, 8192  # 8 MiB of float32 logits, and the temporaries of softmax_stats


def _linear_lse(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logit_scale: float,
    softcap: float | None,
    with_logit_sum: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    row_max, sum_exp, dots, logit_sum = _outputs(hidden, labels, with_logit_sum)
    row_max.fill_(torch.finfo(row_max.dtype).min)
    sum_exp.zero_()
    logit_sum.zero_()
    for i, j in spans(hidden.shape[0], _ROWS):
        for v0, v1 in spans(weight.shape[0], _COLUMNS):
            tile = _product(hidden[i:j], weight[v0:v1])
            block = (tile, None if bias is None else bias[v0:v1])
            options = (logit_scale, softcap, with_logit_sum)
            block_max, block_sum, total = softmax_stats(*block, labels[:, i:j], v0, *options)
            row_max[i:j], sum_exp[i:j], *_ = merge(row_max[i:j], sum_exp[i:j], block_max, block_sum)
            if with_logit_sum:
                logit_sum[i:j] += total
        wide = hidden[i:j].to(dots.dtype)
        for each, row_labels in zip(dots, labels[:, i:j], strict=True):
            entries = weight.index_select(0, row_labels.clamp(min=0)).to(dots.dtype)
            each[i:j] = torch.where(row_labels >= 0, (wide * entries).sum(1), 0.0)
    return row_max, sum_exp, dots, logit_sum


def _outputs(hidden: Tensor, labels: Tensor, with_logit_sum: bool) -> tuple[Tensor, ...]:
    R, dtype = hidden.shape[0], accumulation_dtype(hidden.dtype)
    shapes = ((R,), (R,), tuple(labels.shape), (R if with_logit_sum else 0,))
    return tuple(hidden.new_empty(shape, dtype=dtype) for shape in shapes)


def _product(hidden: Tensor, weight: Tensor) -> Tensor:
    dtype = operand_dtype(hidden.device, hidden.dtype)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    widens = gemm_widens(hidden.device, hidden.dtype)
    columns = weight.shape[0]
    pitch = columns if hidden.device.type == "cpu" else -(-columns // 8) * 8
    tile = hidden.new_empty(
        (hidden.shape[0], pitch), dtype=torch.float32 if widens else hidden.dtype
    )[:, :columns]
    return matmul_into(tile, hidden, weight.t())


def _linear_lse_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    logit_scale: float,
    softcap: float | None,
    with_logit_sum: bool,
) -> tuple[Tensor, ...]:
    return _outputs(hidden, labels, with_logit_sum)


torch.library.register_fake("orpo_kernels::linear_lse", _linear_lse_fake)
torch.library.impl("orpo_kernels::linear_lse", "CompositeExplicitAutograd", _linear_lse)
register_tile_operation("linear_lse", _linear_lse)
