"""Mean over the scored tokens of each sequence, padded or packed, in one launch.

    mean_s = sum over scored t of s of x_t / n_s,  0 where n_s = 0

B sequences, T positions, N packed tokens. Float32. A program owns a sequence: it reads its row, or,
packed, all N tokens and takes those whose id is its own (13 bytes per token from the second-level
cache, nothing beside the rest of a step). No atomics, so deterministic.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from orpo_kernels.kernels.tuning import Device, Row, launch


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["values_ptr", "mask_ptr"])
def _sequence_mean_kernel(
    mean_ptr, count_ptr,  # (B,) float32
    values_ptr, mask_ptr, ids_ptr,  # (B, T), or packed (T,); float32, uint8, int64
    T,
    PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0)
    base = sequence.to(tl.int64) * T
    if PACKED:
        base = base * 0

    total = tl.zeros((BLOCK,), tl.float32)
    count = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, T, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mine = offs < T
        scored = tl.load(mask_ptr + base + offs, mask=mine, other=0) != 0
        if PACKED:
            scored = scored & (tl.load(ids_ptr + offs, mask=mine, other=-1) == sequence)
        total += tl.load(values_ptr + base + offs, mask=scored, other=0.0)
        count += tl.where(scored, 1.0, 0.0)

    tokens = tl.sum(count, 0)
    tl.store(mean_ptr + sequence, tl.sum(total, 0) / tl.maximum(tokens, 1.0))
    tl.store(count_ptr + sequence, tokens)


def sequence_mean(
    token_logps: Tensor,  # (B, T), or packed (N,)
    mask: Tensor,  # same, bool
    sequence_ids: Tensor | None,  # (N,) when packed
    num_sequences: int,
) -> tuple[Tensor, Tensor]:
    """Launches the means: (B,) float32, and how many tokens each is of, (B,) float32."""
    packed = sequence_ids is not None
    values, scored = token_logps.contiguous(), mask.contiguous().view(torch.uint8)
    ids = None if sequence_ids is None else sequence_ids.contiguous()
    B = num_sequences if packed else token_logps.shape[0]

    def run(row: Row, _device: Device) -> tuple[Tensor, Tensor]:
        # Two tensors, not two views of one: outputs of a custom op may not share storage.
        mean, count = (values.new_empty(B) for _ in range(2))
        _sequence_mean_kernel[(B,)](
            mean, count, values, scored, ids, values.shape[-1],
            PACKED=packed, BLOCK=row.block, num_warps=row.warps, enable_fp_fusion=True,
        )  # fmt: skip
        return mean, count

    return launch("sequence_mean", torch.float32, values.device, run)
