"""A tile of logits to the unnormalised gradient of its log-sum-exp: one read and one write.

    z = softcap(scale * (x + bias)),  d = dz / dx
    x <- exp(z - reference_r) d,  0 in the columns of labels

R rows, C columns, K label sets. Float32 arithmetic, rounded once into `out`: the tile itself, or
one of another dtype (16-bit operands of the next GEMM from float32 logits). Bytes: tile read, out
written. Every element is read and written by one program: in place is safe, and deterministic.
"""

import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels.elementwise import aligned_row, edge_columns, transform
from orpo_kernels.kernels.tuning import VECTOR, Device, Row, launch, split_row

_MOST_BLOCKS = 8  # per program: what a row needs (labels, reference) is loaded once for them


@triton.jit
def _gradient(x, reference, kept, logit_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    z, slope = transform(x, logit_scale, softcap, HAS_SOFTCAP)
    return tl.where(kept, tl.exp(z - reference) * slope, 0.0)


@triton.jit(
    do_not_specialize=[
        "stride_out", "stride_logits", "stride_labels", "C", "first_column", "blocks", "splits",
    ],
    do_not_specialize_on_alignment=["labels_ptr", "reference_ptr"],
)  # fmt: skip
def _softmax_grad_kernel(
    out_ptr, stride_out,  # (R, C)
    logits_ptr, stride_logits,  # (R, C)
    bias_ptr,  # (C,)
    labels_ptr, stride_labels,  # (K, R) int64
    reference_ptr,  # (R,) float32
    C, first_column, blocks, splits,
    logit_scale, softcap,
    LABEL_SETS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HEAD: tl.constexpr, ALIKE: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    row = (pid // splits).to(tl.int64)
    split = pid % splits
    first, head, body = aligned_row(row, stride_logits, C, HEAD, VECTOR)
    # ALIKE: rows of out start as many elements past a vector as those of logits.
    out_first = row * stride_out + head
    if ALIKE:
        out_first = out_first // VECTOR * VECTOR
    begin = split * blocks * BLOCK
    end = tl.minimum(begin + blocks * BLOCK, body)
    reference = tl.load(reference_ptr + row)
    label = (tl.load(labels_ptr + row) - first_column).to(tl.int32)
    second = label
    if LABEL_SETS == 2:
        second = (tl.load(labels_ptr + stride_labels + row) - first_column).to(tl.int32)

    edge, exists = edge_columns(head, body, C, split, VECTOR)
    raw = tl.load(logits_ptr + row * stride_logits + edge, mask=exists, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + edge, mask=exists, other=0.0).to(tl.float32)
    edge_kept = (edge != label) & (edge != second)
    e_edge = _gradient(raw, reference, edge_kept, logit_scale, softcap, HAS_SOFTCAP)
    tl.store(out_ptr + row * stride_out + edge, e_edge.to(out_ptr.dtype.element_ty), mask=exists)

    offs = tl.arange(0, BLOCK)
    for start in range(begin, end, BLOCK):
        inside = start + offs < end
        x = tl.load(logits_ptr + first + start + offs, mask=inside, other=0.0).to(tl.float32)
        column = head + start + offs
        if HAS_BIAS:
            x += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
        kept = (column != label) & (column != second)
        e = _gradient(x, reference, kept, logit_scale, softcap, HAS_SOFTCAP)
        tl.store(out_ptr + out_first + start + offs, e.to(out_ptr.dtype.element_ty), mask=inside)


def softmax_grad_(
    logits: Tensor,  # (R, C), overwritten unless out is given
    bias: Tensor | None,  # (C,)
    labels: Tensor,  # (K, R)
    first_column: int,
    reference: Tensor,  # (R,) float32
    logit_scale: float,
    softcap: float | None,
    out: Tensor | None = None,  # (R, C)
) -> None:
    """Launches the gradient, in place or into `out`."""
    target = logits if out is None else out
    bias = None if bias is None else bias.contiguous()
    reference = reference.contiguous()

    def run(row: Row, device: Device) -> None:
        R, C = logits.shape
        split = split_row(R, C, row.block, device.processors, _MOST_BLOCKS)
        strides = (logits.stride(0), target.stride(0))
        head = any(stride % VECTOR for stride in strides)
        _softmax_grad_kernel[(R * split.splits,)](
            target, target.stride(0), logits, logits.stride(0), bias, labels, labels.stride(0),
            reference, C, first_column, split.blocks, split.splits,
            logit_scale, 1.0 if softcap is None else softcap,
            LABEL_SETS=labels.shape[0], HAS_BIAS=bias is not None, HAS_SOFTCAP=softcap is not None,
            HEAD=head, ALIKE=(strides[0] - strides[1]) % VECTOR == 0,
            BLOCK=row.block, VECTOR=VECTOR, num_warps=row.warps, enable_fp_fusion=True,
        )  # fmt: skip

    launch("softmax_grad", logits.dtype, logits.device, run)
