"""`linear_lse`: the softmax statistics of a whole head, in memory that depends on no size.

    x = hidden weight^T,   z = softcap(scale * (x + bias))

    linear_lse  max over the columns of no label and sum of exp(z - max), per row;
                dots x of the labels; on request the sum of z over all columns

As `softmax_stats` over all V columns, of logits that are never there: on a GPU with tensor cores a
Triton GEMM (`kernels/linear_lse.py`); elsewhere, and for float64, this file's plain torch, a tile
at a time. `hidden` (R, H) and `weight` (V, H) are of one dtype, `labels` (K, R) int64, -1 where a
row has none. The mean logit is the sum over V.

`forward` is the loop of a call without a gradient: it holds rows of hidden in the GEMMs' dtype and
about 1 KiB per row. No tile, and no float32 copy of rows, as the dots of the labels come with the
statistics. A head that has to be copied (cast, or joined with its low-rank part) is, one vocabulary
block at a time.
"""

import torch
from torch import Tensor

from orpo_kernels.engine.budget import Plan, accumulation_dtype, spans
from orpo_kernels.engine.gemm import gemm_widens, matmul_into
from orpo_kernels.engine.operands import Operands
from orpo_kernels.engine.tile_loop import Results, empty_sums, finish
from orpo_kernels.engine.tiles import linear_lse, softmax_stats
from orpo_kernels.engine.tiles.plain import merge
from orpo_kernels.kernels import register_tile_operation

_ROWS, _COLUMNS = 256, 8192  # 8 MiB of float32 logits, and the temporaries of softmax_stats


def forward(operands: Operands, plan: Plan, out: Results) -> None:
    """Fills the statistics of the scored rows, `plan.rows` of them at a time."""
    rows, head, all_labels, sizes, _ = operands
    for start, stop in spans(sizes.rows, plan.rows):
        hidden, labels = rows.take(start, stop), all_labels.stacked(start, stop)
        row_max, sum_exp = empty_sums(hidden)
        dots = hidden.new_zeros(labels.shape, dtype=row_max.dtype)
        for v0, v1 in spans(sizes.vocabulary, plan.columns):
            here = torch.where((labels >= v0) & (labels < v1), labels - v0, -1)
            block_max, block_sum, block_dots, _ = linear_lse(
                hidden, head.block(v0, v1), head.block_bias(v0, v1), here, *head.transform, False
            )
            row_max, sum_exp, *_ = merge(row_max, sum_exp, block_max, block_sum)
            dots += block_dots
        label = head.terms_of(hidden[:0], list(dots), labels)
        statistics, _ = finish(label, row_max, sum_exp, None)
        out.write(operands.placed(start, stop), statistics, None)


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
