"""What the kernels of one call read: tensors, labels and the transform of the logits."""

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

LANGUAGE_DTYPE = {
    torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16,
}  # fmt: skip


class Inputs(NamedTuple):
    """M scored rows among N, one or two label sets; parts are H columns and r of a low rank.

    A part of hidden is (N, H), or (B, T, H) with N = B T; columns of every part are adjacent.
    """

    hidden: tuple[Tensor, ...]  # (N, H), and (N, r) or not
    weight: tuple[Tensor, ...]  # (V, H), and (V, r) or not
    bias: Tensor | None  # (V,)
    labels: Tensor  # (M,) int64, -1 for none
    second: Tensor | None  # (M,) int64: a differing second label, or -1
    positions: Tensor | None  # (M,) int64: where the rows stand among all N; None: M is N
    scored: Tensor | None  # (M,) bool: the other rows are read as 0
    logit_scale: float
    softcap: float | None
    dtype: torch.dtype  # of the GEMMs' operands
    wide: torch.dtype  # out of a GEMM: float32 where it can widen, a 16-bit logit costs 1e-2

    @property
    def label_sets(self) -> int:
        """K."""
        return 1 if self.second is None else 2

    @property
    def columns(self) -> int:
        """H + r."""
        return sum(part.shape[1] for part in self.weight)

    @property
    def options(self) -> dict[str, bool]:
        """Constants of every kernel that transforms logits, in this order."""
        return {
            "HAS_SECOND": self.second is not None, "HAS_BIAS": self.bias is not None,
            "HAS_SOFTCAP": self.softcap is not None,
        }  # fmt: skip

    @property
    def numbers(self) -> tuple[float, float]:
        """Scale and softcap, as kernels take them: 1 for no softcap."""
        return float(self.logit_scale), 1.0 if self.softcap is None else float(self.softcap)


class Tiles(NamedTuple):
    """Where logits go and where P goes; rows of both start on 16 bytes, with padding of their own.

    A tile of a chunk starts at its first row; one of all M rows (`of_all_rows`), kept for the
    backward, at the chunk's.
    """

    logits: Tensor  # (R, C) or (M, C)
    probs: Tensor | None  # (R, C) or (M, C), maybe in the memory of the logits; None: not stored
    columns: int  # C, without padding
    logits_of_all_rows: bool = False
    probs_of_all_rows: bool = False

    @property
    def strides(self) -> tuple[int, int]:
        """From row to row, of both."""
        return self.logits.stride(0), 0 if self.probs is None else self.probs.stride(0)

    def firsts(self, start: int) -> tuple[int, int]:
        """Row of each tile where the chunk that starts with row `start` lies."""
        return start if self.logits_of_all_rows else 0, start if self.probs_of_all_rows else 0


class Sums(NamedTuple):
    """Sums of P W; where a GEMM cannot add in float32, its last product stands apart."""

    total: Tensor  # (G, H + r) float32
    partial: Tensor | None  # (G, H + r), 16-bit


def pair(parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
    """Both parts of a matrix, None for a second that is not there."""
    return parts[0], parts[1] if len(parts) == 2 else None
