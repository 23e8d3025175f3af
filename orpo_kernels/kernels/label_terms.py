"""Logits and slopes of the labels of every scored row, one or two label sets, in one launch.

    x = h_t . W[y] + b[y],   z = softcap(scale * x),   d = dz / d(h . W[y])

M scored rows, H and r columns. Exact products of the GEMMs' operands, summed in float32: a
confident token loses no digits. 0 where a row has no (or no second) label. Bytes: 4 H per row. The
running figures of the softmax (`softmax_block.py`) start here: reference -inf, sum 0.

Rows of the state (2 + 2 K, M) float32: reference, sum; z and d of the first label; of the second.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels.elementwise import row_place, transform, where_width, whole_vectors
from orpo_kernels.kernels.inputs import LANGUAGE_DTYPE, Inputs, pair
from orpo_kernels.kernels.start import Start, in_vectors, places
from orpo_kernels.kernels.tuning import VECTOR, row_of


@triton.jit
def _dots(
    hidden_ptr, first_ptr, second_ptr, width, exists, has_first, has_second, dots, second_dots,
    HAS_SECOND: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`dots` (BLOCK,), plus the products of a row of hidden with those of its labels."""
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        h = (
            tl.load(hidden_ptr + column, mask=column < where_width(width, exists), other=0.0)
            .to(DTYPE)
            .to(tl.float32)
        )
        w = tl.load(first_ptr + column, mask=column < where_width(width, has_first), other=0.0)
        dots += h * w.to(DTYPE).to(tl.float32)
        if HAS_SECOND:
            w = tl.load(
                second_ptr + column, mask=column < where_width(width, has_second), other=0.0
            )
            second_dots += h * w.to(DTYPE).to(tl.float32)
    return dots, second_dots


@triton.jit
def _finished(
    dots, label, bias_ptr, logit_scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr
):
    x = tl.sum(dots, 0)
    if HAS_BIAS:
        x += tl.load(bias_ptr + label, mask=label >= 0, other=0.0).to(tl.float32)
    z, slope = transform(x, logit_scale, softcap, HAS_SOFTCAP)
    return tl.where(label >= 0, z, 0.0), tl.where(label >= 0, slope, 0.0)


@triton.jit(
    do_not_specialize=[
        "M", "H", "r", "period", "stride_slice", "stride_row", "period_r", "stride_slice_r",
        "stride_row_r", "stride_weight", "stride_weight_r",
    ],
    do_not_specialize_on_alignment=["index_ptr", "scored_ptr", "labels_ptr", "second_ptr", "bias_ptr"],
)  # fmt: skip
def _label_terms_kernel(
    state_ptr,  # (2 + 2 K, M) float32
    hidden_ptr, hidden_r_ptr,  # (N, H), (N, r)
    weight_ptr, weight_r_ptr, bias_ptr,  # (V, H), (V, r), (V,)
    labels_ptr, second_ptr,  # (M,) int64
    index_ptr, scored_ptr,  # (M,) int64, (M,) bool
    M, H, r, period, stride_slice, stride_row, period_r, stride_slice_r, stride_row_r,
    stride_weight, stride_weight_r, logit_scale, softcap,
    HAS_SECOND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    LOW_RANK: tl.constexpr, HAS_INDEX: tl.constexpr, HAS_SCORED: tl.constexpr,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    position = row.to(tl.int64)
    if HAS_INDEX:
        position = tl.load(index_ptr + row)
    exists = position >= 0
    if HAS_SCORED:
        exists = tl.load(scored_ptr + row) != 0
    label = tl.load(labels_ptr + row)
    second = label
    if HAS_SECOND:
        second = tl.load(second_ptr + row)

    dots = tl.zeros((BLOCK,), tl.float32)
    second_dots = tl.zeros((BLOCK,), tl.float32)
    h = hidden_ptr + row_place(position, period, stride_slice, stride_row, ALIGNED, VECTOR)
    step = whole_vectors(stride_weight, ALIGNED, VECTOR)
    dots, second_dots = _dots(
        h, weight_ptr + label * step, weight_ptr + second * step, whole_vectors(H, ALIGNED, VECTOR),
        exists, label >= 0, second >= 0, dots, second_dots, HAS_SECOND, DTYPE, BLOCK,
    )  # fmt: skip
    if LOW_RANK:
        place = row_place(position, period_r, stride_slice_r, stride_row_r, ALIGNED, VECTOR)
        step = whole_vectors(stride_weight_r, ALIGNED, VECTOR)
        dots, second_dots = _dots(
            hidden_r_ptr + place, weight_r_ptr + label * step, weight_r_ptr + second * step,
            whole_vectors(r, ALIGNED, VECTOR), exists, label >= 0, second >= 0, dots, second_dots,
            HAS_SECOND, DTYPE, BLOCK,
        )  # fmt: skip

    z, slope = _finished(dots, label, bias_ptr, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP)
    out = state_ptr + row
    tl.store(out, float("-inf"))
    tl.store(out + M, 0.0)
    tl.store(out + 2 * M, z)
    tl.store(out + 3 * M, slope)
    if HAS_SECOND:
        z, slope = _finished(
            second_dots, second, bias_ptr, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP
        )
        tl.store(out + 4 * M, z)
        tl.store(out + 5 * M, slope)


def label_terms(inputs: Inputs) -> Tensor:
    """Launches the labels' terms: the state (2 + 2 K, M) of all rows, ready for the first tile."""
    M = inputs.labels.shape[0]
    hidden, hidden_r = pair(inputs.hidden)
    weight, weight_r = pair(inputs.weight)
    state = torch.empty(
        (2 + 2 * inputs.label_sets, M), dtype=torch.float32, device=inputs.labels.device
    )
    row = row_of("label_terms", inputs.dtype, state.device)
    start = Start(
        _label_terms_kernel,
        (
            state, hidden, hidden_r, weight, weight_r, inputs.bias, inputs.labels, inputs.second,
            inputs.positions, inputs.scored,
        ),
        row,
        {
            **inputs.options, "LOW_RANK": hidden_r is not None,
            "HAS_INDEX": inputs.positions is not None, "HAS_SCORED": inputs.scored is not None,
            "DTYPE": LANGUAGE_DTYPE[inputs.dtype],
            "ALIGNED": in_vectors(*inputs.hidden, *inputs.weight),
            "BLOCK": row.block, "VECTOR": VECTOR,
        },
    )  # fmt: skip
    start(
        M, M, hidden.shape[-1], 0 if weight_r is None else weight_r.shape[1], *places(hidden),
        *((1, 0, 0) if hidden_r is None else places(hidden_r)),
        weight.stride(0), 0 if weight_r is None else weight_r.stride(0), *inputs.numbers,
    )  # fmt: skip
    return state
