"""The certificate of a sparse call: what was dropped of how many rows, in one launch.

    mass_t = m_t (1 - p_t) / s,   R_t = sqrt(eps (mass_t + rho max(0, 1 - p_t - mass_t)))

N positions, of which those with a label count; m_t and 1 - p_t are statistics, s the scale of the
logits, eps a probability. One program takes them in blocks, one after the other: what its lanes
have summed is added up in the end. Bytes: 16 per position.

Fields (5,) float32: kept entries as a share of all; mean and largest mass; mean and largest R.
"""

import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels import tuning
from orpo_kernels.kernels.start import Start
from orpo_kernels.kernels.tuning import row_of


@triton.jit
def _positive(x):
    """`max(x, 0)`; NaN stays."""
    return tl.where(x < 0.0, 0.0, x)


@triton.jit
def _store_mean_and_most(out, mean, most):
    """Both, NaN if the mean is: a maximum of numbers and NaN is a number."""
    tl.store(out, mean)
    tl.store(out + 1, tl.where(mean != mean, mean, most))


@triton.jit(
    do_not_specialize=["N", "blocks", "vocabulary"],
    do_not_specialize_on_alignment=[
        "fields_ptr", "labels_ptr", "beside_ptr", "dropped_ptr", "entries_ptr",
    ],
)  # fmt: skip
def _certificate_kernel(
    fields_ptr,  # (5,) float32
    labels_ptr,  # (N,) int64, -1 for none
    beside_ptr, dropped_ptr,  # (N,) float32
    entries_ptr,  # (blocks,) int64
    N, blocks, vocabulary, scale, eps, rounding,
    BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    rows = tl.zeros((BLOCK,), tl.int32)
    mass_sum = tl.zeros((BLOCK,), tl.float32)
    residual_sum, most_mass, most_residual = mass_sum, mass_sum, mass_sum
    for start in range(0, N, BLOCK):
        position = start + lane
        label = tl.load(labels_ptr + position, mask=position < N, other=-1)
        scored = label >= 0
        beside = tl.load(beside_ptr + position, mask=scored, other=0.0)
        mass = tl.load(dropped_ptr + position, mask=scored, other=0.0) * beside / scale
        residual = tl.sqrt(_positive(eps * (mass + rounding * _positive(beside - mass))))
        rows += scored.to(tl.int32)
        mass_sum += mass
        residual_sum += residual
        most_mass = tl.maximum(most_mass, mass)
        most_residual = tl.maximum(most_residual, residual)

    kept_entries = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, blocks, BLOCK):
        block = start + lane
        kept_entries += tl.load(entries_ptr + block, mask=block < blocks, other=0)

    count = tl.maximum(tl.sum(rows, 0), 1).to(tl.float32)
    share = tl.sum(kept_entries, 0).to(tl.float32) / vocabulary / count
    tl.store(fields_ptr, share)
    _store_mean_and_most(fields_ptr + 1, tl.sum(mass_sum, 0) / count, tl.max(most_mass, 0))
    _store_mean_and_most(fields_ptr + 3, tl.sum(residual_sum, 0) / count, tl.max(most_residual, 0))


def certificate(
    labels: Tensor,  # (N,) int64, -1 for none
    statistics: Tensor,  # (8, N) float32
    entries: Tensor,  # any length, int64: kept entries, in parts
    vocabulary: int,
    numbers: tuple[float, float, float],  # scale, eps, rho
) -> Tensor:
    """Launches the fields."""
    row = row_of("certificate", statistics.dtype, statistics.device)
    fields = statistics.new_empty(5)
    tensors = (fields, labels, statistics[2], statistics[7], entries)
    with tuning.guard(statistics.device):
        start = Start(_certificate_kernel, tensors, row, {"BLOCK": row.block})
        start(1, labels.shape[0], entries.shape[0], vocabulary, *map(float, numbers))
    return fields
