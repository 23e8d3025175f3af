"""What a chunk's rows drop of their mass, and the rows of the head that stand for it.

    dropped_t = (scale * looked at_t - sum of the slots of t) / s_t
    product_g = sum_v tail_gv W_v / sum_v tail_gv,   0 for a group that dropped nothing

`looked at` is the sum of E r over the tiles in which row t is in no dense row block, both relative
to the reference of the slots; float32. The product reads the head once for both groups, rows in
splits whose sums are added in one order. G groups, P splits. Bytes: 4 W per row; the head once a call.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels import tuning
from orpo_kernels.kernels.elementwise import whole_vectors
from orpo_kernels.kernels.inputs import LANGUAGE_DTYPE, Inputs
from orpo_kernels.kernels.scan_state import ScanState
from orpo_kernels.kernels.start import Start, in_vectors
from orpo_kernels.kernels.tuning import VECTOR, cdiv, row_of

_SPANS = 32  # looked at together
_ADDED = 2  # rows of the head that a program's sums are of


@triton.jit(
    do_not_specialize=["first_row", "R", "spans", "M", "logit_scale"],
    do_not_specialize_on_alignment=[
        "dropped_ptr", "mass_ptr", "rows_ptr", "state_ptr", "index_ptr",
    ],
)  # fmt: skip
def _dropped_rows_kernel(
    dropped_ptr,  # (N,) float32
    mass_ptr,  # (W, R) float32
    rows_ptr, state_ptr,  # (4, M), (2 + 2 K, M) float32
    index_ptr,  # (M,) int64
    first_row, R, spans, M, logit_scale,
    HAS_INDEX: tl.constexpr, BLOCK: tl.constexpr, SPANS: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = lane < R
    kept = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, spans, SPANS):
        span = start + tl.arange(0, SPANS)
        at = mass_ptr + span[:, None].to(tl.int64) * R + lane[None, :]
        inside = (span < spans)[:, None] & exists[None, :]
        kept += tl.sum(tl.load(at, mask=inside, other=0.0), 0)
    row = first_row + lane
    s = tl.load(state_ptr + M + row, mask=exists, other=0.0)
    looked = tl.load(rows_ptr + 3 * M + row, mask=exists, other=0.0)
    position = row.to(tl.int64)
    if HAS_INDEX:
        position = tl.load(index_ptr + row, mask=exists, other=0)
    dropped = (looked * logit_scale - kept) / tl.where(s > 0, s, 1.0)
    tl.store(dropped_ptr + position, tl.where(s > 0, dropped, 0.0), mask=exists)


class DroppedRows:
    """Dropped masses, chunk by chunk of one call."""

    def __init__(self, inputs: Inputs, state: ScanState, sums: Tensor, dropped: Tensor) -> None:
        """Takes what stays the same; `dropped` (N,) float32 is filled where rows stand."""
        self.row = row_of("dropped_rows", torch.float32, sums.device)
        self.start = Start(
            _dropped_rows_kernel, (dropped, state.mass, state.rows, sums, inputs.positions),
            self.row,
            {"HAS_INDEX": inputs.positions is not None, "BLOCK": self.row.block, "SPANS": _SPANS},
        )  # fmt: skip
        self.last = (state.mass.shape[0], sums.shape[1], float(inputs.logit_scale))

    def __call__(self, start: int, stop: int) -> None:
        """Launches rows `start` to `stop`, whose masses are complete."""
        self.start(cdiv(stop - start, self.row.block), start, stop - start, *self.last)


@triton.jit(
    do_not_specialize=["V", "H", "each", "stride_weight", "stride_out", "size_out"],
    do_not_specialize_on_alignment=["tail_ptr", "out_ptr"],
)
def _tail_product_kernel(
    out_ptr,  # (P, G, H) float32
    tail_ptr,  # (G, V) float32
    weight_ptr,  # (V, H)
    V, H, each, stride_weight, stride_out, size_out,
    GROUPS: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr,
    ADDED: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    width = whole_vectors(H, ALIGNED, VECTOR)
    stride = whole_vectors(stride_weight, ALIGNED, VECTOR)
    column_blocks = tl.cdiv(H, BLOCK)
    split = tl.program_id(0) // column_blocks
    column = tl.program_id(0) % column_blocks * BLOCK + tl.arange(0, BLOCK)
    first = tl.zeros((ADDED, BLOCK), tl.float32)
    second = tl.zeros((ADDED, BLOCK), tl.float32)
    end = tl.minimum((split + 1) * each, V)
    for start in range(split * each, end, ROWS):
        for part in tl.static_range(0, ROWS, ADDED):  # whose loads do not wait for one another
            v = start + part + tl.arange(0, ADDED)
            at = weight_ptr + v[:, None].to(tl.int64) * stride + column[None, :]
            inside = (v < end)[:, None] & (column < width)[None, :]
            w = tl.load(at, mask=inside, other=0.0).to(DTYPE).to(tl.float32)
            first += tl.load(tail_ptr + v, mask=v < end, other=0.0)[:, None] * w
            if GROUPS == 2:
                second += tl.load(tail_ptr + V + v, mask=v < end, other=0.0)[:, None] * w
    out = out_ptr + split.to(tl.int64) * size_out + column
    tl.store(out, tl.sum(first, 0), mask=column < width)
    if GROUPS == 2:
        tl.store(out + stride_out, tl.sum(second, 0), mask=column < width)


def tail_product(
    weights: tuple[Tensor, ...],  # (V, H), and (V, r) or not
    tail: Tensor,  # (G, V) float32
    dtype: torch.dtype,  # of the GEMMs' operands
) -> Tensor:
    """Launches the rows `(G, H + r)` float32 of the tail: a launch for each part of the head."""
    G, V = tail.shape
    found = []
    for weight in weights:
        row = row_of("tail_product", weight.dtype, weight.device)
        H, programs = weight.shape[1], cdiv(weight.shape[1], row.block)
        wanted = max(1, 8 * tuning.device_info(weight.device).processors // programs)
        each = cdiv(cdiv(V, wanted), row.depth) * row.depth
        splits = cdiv(V, each)
        out = tail.new_empty((splits, G, H))
        start = Start(
            _tail_product_kernel, (out, tail, weight), row,
            {
                "GROUPS": G, "DTYPE": LANGUAGE_DTYPE[dtype], "ALIGNED": in_vectors(weight),
                "ROWS": row.depth, "ADDED": _ADDED, "BLOCK": row.block, "VECTOR": VECTOR,
            },
        )  # fmt: skip
        start(splits * programs, V, H, each, weight.stride(0), H, G * H)
        found.append(out.sum(0))
    mass = tail.sum(1, keepdim=True)
    # The mass may be a subnormal number, whose reciprocal is infinite.
    return torch.where(mass > 0, torch.cat(found, 1) / mass, 0.0)
