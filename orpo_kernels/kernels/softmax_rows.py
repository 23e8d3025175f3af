"""The softmax of whole rows: sum and exponentials of a tile of all columns, one launch.

    z = softcap(scale * (x + b)),   d = dz / dx,   labels' columns left out
    s = sum e^(z - m),   P = e^(z - m) d in the GEMMs' dtype

R rows, C columns, M rows of the state. Float32 arithmetic, natural logarithms. One program per row.
In one look the reference m is the maximum of the first block of columns, and only a row that grows
by more than `limit` nats is read again; P is then at most e^limit. In two looks, for P that takes
the place of the logits, m is the maximum. The loops have no barrier: a
thread keeps maximum and sum of its own columns. Bytes: the tile read once (twice), P written.
"""

import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels import tuning
from orpo_kernels.kernels.elementwise import whole_vectors
from orpo_kernels.kernels.inputs import Inputs, Tiles
from orpo_kernels.kernels.softmax_block import held_row
from orpo_kernels.kernels.start import Start
from orpo_kernels.kernels.tuning import VECTOR, row_of


@triton.jit
def _stored(
    out_ptr, logits_ptr, bias_ptr, C, label, second, reference, logit_scale, softcap,
    HAS_SECOND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    STORES: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Stores P relative to `reference`; maximum and sum of a row by thread, (BLOCK,)."""
    base = tl.where(reference == float("-inf"), 0.0, reference)
    tops = tl.full((BLOCK,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, C, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z, slope = held_row(
            logits_ptr, bias_ptr, column, 0, C, label, second, logit_scale, softcap,
            HAS_SECOND, HAS_BIAS, HAS_SOFTCAP, VECTOR,
        )  # fmt: skip
        e = tl.exp(z - base)
        tops = tl.maximum(tops, z)
        sums += e
        if STORES:
            inside = column < tl.cdiv(C, VECTOR) * VECTOR
            tl.store(out_ptr + column, (e * slope).to(out_ptr.dtype.element_ty), mask=inside)
    return tl.max(tops, 0), tl.sum(sums, 0)


@triton.jit(
    do_not_specialize=[
        "first_row", "first_logit", "first_prob", "C", "M", "stride_logits", "stride_probs",
    ],
    do_not_specialize_on_alignment=["state_ptr", "bias_ptr", "labels_ptr", "second_ptr"],
)  # fmt: skip
def _softmax_rows_kernel(
    state_ptr,  # (2 + 2 K, M) float32: reference, sum
    probs_ptr,  # (R, C)
    logits_ptr,  # (R, C)
    bias_ptr,  # (C,)
    labels_ptr, second_ptr,  # (M,) int64
    first_row, first_logit, first_prob, C, M, stride_logits, stride_probs, limit, logit_scale, softcap,
    HAS_SECOND: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    STORES: tl.constexpr, ONE_LOOK: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = first_row + pid
    state = state_ptr + row
    logits = logits_ptr + (first_logit + pid).to(tl.int64) * whole_vectors(
        stride_logits, True, VECTOR
    )
    out = probs_ptr
    if STORES:
        out += (first_prob + pid).to(tl.int64) * whole_vectors(stride_probs, True, VECTOR)
    label = tl.load(labels_ptr + row).to(tl.int32)
    second = label
    if HAS_SECOND:
        second = tl.load(second_ptr + row).to(tl.int32)

    looked = C
    if ONE_LOOK:
        looked = tl.minimum(C, BLOCK)
    tops = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, looked, BLOCK):
        z, _ = held_row(
            logits, bias_ptr, start + tl.arange(0, BLOCK), 0, C, label, second, logit_scale, softcap,
            HAS_SECOND, HAS_BIAS, HAS_SOFTCAP, VECTOR,
        )  # fmt: skip
        tops = tl.maximum(tops, z)
    reference = tl.max(tops, 0)
    top, total = _stored(
        out, logits, bias_ptr, C, label, second, reference, logit_scale, softcap,
        HAS_SECOND, HAS_BIAS, HAS_SOFTCAP, STORES, BLOCK, VECTOR,
    )  # fmt: skip
    if ONE_LOOK:  # noqa: SIM102 - one is known when compiled, the other is not
        if top > reference + limit:
            reference = top
            _top, total = _stored(
                out, logits, bias_ptr, C, label, second, reference, logit_scale, softcap,
                HAS_SECOND, HAS_BIAS, HAS_SOFTCAP, STORES, BLOCK, VECTOR,
            )  # fmt: skip

    tl.store(state, reference)
    tl.store(state + M, total)


class SoftmaxRows:
    """The softmax of chunks of rows: tensors stay, rows change."""

    def __init__(
        self,
        inputs: Inputs,
        state: Tensor,  # (2 + 2 K, M) float32
        tiles: Tiles,
        limit: float,
        *,
        one_look: bool,
    ) -> None:
        """Takes what stays the same from chunk to chunk."""
        # Two rows per processor, or fewer: more of each under way at once.
        few = state.shape[1] <= 2 * tuning.device_info(state.device).processors
        name = "softmax_few_rows" if few else "softmax_rows"
        row = row_of(name, tiles.logits.dtype, state.device)
        self.start = Start(
            _softmax_rows_kernel,
            (state, tiles.probs, tiles.logits, inputs.bias, inputs.labels, inputs.second), row,
            {
                **inputs.options, "STORES": tiles.probs is not None, "ONE_LOOK": one_look,
                "BLOCK": row.block, "VECTOR": VECTOR,
            },
        )  # fmt: skip
        columns = inputs.weight[0].shape[0]
        self.tiles = tiles
        self.last = (columns, state.shape[1], *tiles.strides, limit, *inputs.numbers)

    def __call__(
        self, rows: tuple[int, int], first_sum: int, columns: tuple[int, int], block: int
    ) -> None:
        """Launches rows `start` to `stop`, of all columns; as `SoftmaxBlock`."""
        start, stop = rows
        self.start(stop - start, start, *self.tiles.firsts(start), *self.last)
