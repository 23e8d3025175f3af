"""Means over the scored tokens of each sequence, padded or packed, of one label set or two.

    mean_s = sum over scored t of s of x_t / n_s,  0 where n_s = 0        dx_t = dmean_s / n_s

B = 2P sequences, T positions or packed tokens, K label sets, of which the second scores the first P
sequences only. Float32. One launch each way. Forward: a program owns a sequence of a set; it reads
its row, or, packed, all tokens, and takes those whose id is its own (20 bytes per token from the
second-level cache, nothing beside the rest of a step). Backward: a program owns a block of tokens;
12 bytes per token, 8 more when packed. No atomics, so deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels.tuning import Device, Row, cdiv, launch

_UNALIGNED = ["values_ptr", "labels_ptr", "nll_values_ptr", "nll_labels_ptr", "ids_ptr"]


@triton.jit(do_not_specialize=["T", "B", "ignore_index"], do_not_specialize_on_alignment=_UNALIGNED)
def _sequence_mean_kernel(
    mean_ptr, count_ptr,  # (K, B) float32
    values_ptr, labels_ptr,  # (B, T), or packed (T,); float32, int64
    nll_values_ptr, nll_labels_ptr,  # of the second set: (P, T) or more, or packed
    ids_ptr,  # packed (T,) int64
    T, B, ignore_index,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence, label_set = tl.program_id(0), tl.program_id(1)
    base = sequence.to(tl.int64) * T
    if PACKED:
        base = base * 0
    end = T
    if label_set == 1:
        values_ptr = nll_values_ptr
        labels_ptr = nll_labels_ptr
        end = tl.where(sequence < B // 2, T, 0)

    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, end, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mine = offs < end
        label = tl.load(labels_ptr + base + offs, mask=mine, other=0)
        scored = mine & (label != ignore_index)
        if PACKED:
            scored = scored & (tl.load(ids_ptr + offs, mask=mine, other=-1) == sequence)
        total += tl.load(values_ptr + base + offs, mask=scored, other=0.0)
        count += tl.where(scored, 1.0, 0.0)

    out = label_set * B + sequence
    tokens = tl.sum(count, 0)
    tl.store(mean_ptr + out, tl.sum(total, 0) / tl.maximum(tokens, 1.0))
    tl.store(count_ptr + out, tokens)


@triton.jit(
    do_not_specialize=["N", "T", "B", "ignore_index"], do_not_specialize_on_alignment=_UNALIGNED
)
def _sequence_mean_backward_kernel(
    dvalues_ptr, nll_dvalues_ptr,  # (N,) float32, all tokens
    dmean_ptr, count_ptr,  # (K, B) float32
    labels_ptr, nll_labels_ptr,  # (N,), the second (P T,) or more; int64
    ids_ptr,  # packed (N,) int64
    N, T, B, ignore_index,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    label_set = tl.program_id(1)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = offs < N
    sequences = B
    if label_set == 1:
        dvalues_ptr = nll_dvalues_ptr
        labels_ptr = nll_labels_ptr
        sequences = B // 2

    if PACKED:
        sequence = tl.load(ids_ptr + offs, mask=exists, other=0)
    else:
        sequence = offs // T
    read = exists & (sequence < sequences)
    scored = read & (tl.load(labels_ptr + offs, mask=read, other=0) != ignore_index)

    of_set = label_set * B + sequence
    dmean = tl.load(dmean_ptr + of_set, mask=scored, other=0.0)
    count = tl.load(count_ptr + of_set, mask=scored, other=1.0)

    tl.store(dvalues_ptr + offs, dmean / tl.maximum(count, 1.0), mask=exists)


def sequence_mean(
    token_logps: Tensor,  # (B, T), or packed (N,)
    labels: Tensor,  # same
    nll_token_logps: Tensor | None,
    nll_labels: Tensor | None,
    ignore_index: int,
    sequence_ids: Tensor | None,  # (N,) when packed
    num_sequences: int,
) -> tuple[Tensor, Tensor]:
    """Launches the means: (K, B) float32, and how many tokens each is of, (K, B) float32."""
    sets = [each.contiguous() for each in (token_logps, labels)]
    second = [each.contiguous() for each in (nll_token_logps, nll_labels) if each is not None]
    packed, ids = sequence_ids is not None, _ids(sequence_ids, sets[1])
    B, K, T = num_sequences, 2 if second else 1, token_logps.shape[-1]

    def run(row: Row, _device: Device) -> tuple[Tensor, Tensor]:
        # Two tensors, not two views of one: outputs of a custom op may not share storage.
        mean, count = (sets[0].new_empty((K, B)) for _ in range(2))
        _sequence_mean_kernel[(B, K)](
            mean, count, *sets, *(second or sets), ids, T, B, ignore_index,
            PACKED=packed, BLOCK=row.block, num_warps=row.warps, enable_fp_fusion=True,
        )  # fmt: skip
        return mean, count

    return launch("sequence_mean", torch.float32, token_logps.device, run)


def sequence_mean_backward(
    dmean: Tensor,  # (K, B)
    count: Tensor,  # (K, B)
    labels: Tensor,  # (B, T), or packed (N,)
    nll_labels: Tensor | None,
    ignore_index: int,
    sequence_ids: Tensor | None,  # (N,) when packed
) -> tuple[Tensor, Tensor]:
    """Launches the gradients of the tokens of both sets, float32; (0,) where there is no second."""
    dmean, first = dmean.contiguous(), labels.contiguous()
    second = first if nll_labels is None else nll_labels.contiguous()
    packed, ids = sequence_ids is not None, _ids(sequence_ids, first)
    K, B, T, N = *dmean.shape, labels.shape[-1], labels.numel()

    def run(row: Row, _device: Device) -> tuple[Tensor, Tensor]:
        dlogps = dmean.new_empty(labels.shape)
        dnll = dmean.new_empty(labels.shape if K == 2 else 0)
        _sequence_mean_backward_kernel[(cdiv(N, row.block), K)](
            dlogps, dnll if K == 2 else dlogps, dmean, count, first, second, ids,
            N, T, B, ignore_index,
            PACKED=packed, BLOCK=row.block, num_warps=row.warps, enable_fp_fusion=True,
        )  # fmt: skip
        return dlogps, dnll

    return launch("sequence_mean_backward", torch.float32, dmean.device, run)


def _ids(sequence_ids: Tensor | None, unread: Tensor) -> Tensor:
    """Where the ids stand; padded, where they are not read, any tensor of their dtype."""
    return unread if sequence_ids is None else sequence_ids.contiguous()
