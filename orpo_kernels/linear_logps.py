"""The one op between the model and the loss: token log-probs of a linear head, differentiable.

    z_t = softcap(scale * (h_t W^T + b)),   logp_t = z_t[y_t] - log sum exp z_t
    dhidden_t = a_t (d_y W[y_t] - sum_v p_tv d_tv W_v),   a_t = d loss / d logp_t
    dW_v = sum_t a_t d_tv (1[v = y_t] - p_tv) h_t

This file checks what it is given and calls a registered op of `ops/`; `engine/` does the
vocabulary-sized work.
"""

import torch
from torch import Tensor

from orpo_kernels.constants import IGNORE_INDEX
from orpo_kernels.ops import exact, sparse
from orpo_kernels.options import (
    Certificate,
    LogpsOptions,
    choose_compute_dtype,
    refuse_forward_mode,
    validate_operands,
)


def linear_logps(  # noqa: PLR0913 - the public signature
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | tuple[Tensor, Tensor],
    bias: Tensor | None = None,
    *,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = IGNORE_INDEX,
    gradient: str = "exact",
    eps: float | None = None,
    tail_groups: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    workspace_bytes: int | None = None,
    low_rank: tuple[Tensor, Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probs of `labels` under `softmax(softcap(logit_scale * (hidden @ weight.T + bias)))`.

    Args:
        hidden: (..., H) floating, hidden states; any strides.
        weight: (V, H) floating, the output projection; gets a gradient if it requires one.
        labels: (...) integer, the token scored from each hidden state (already shifted), or two
            such tensors scored in one pass.
        bias: (V,) floating, added to the raw logits.
        logit_scale: factor on the logits.
        softcap: c of `c * tanh(logits / c)`, applied after the scale; None: no cap.
        ignore_index: label of positions that are not scored; may lie inside [0, V).
        gradient: "exact"; or "sparse", for the price of the forward: probabilities over `eps` enter
            one by one, the others as their average, so that the error sums to 0 over the rows of a
            group. Where too many are over `eps`, rows are done the exact way. "auto": sparse where
            the GEMMs are 16-bit.
        eps: of the sparse gradient, 0 to 1. Smaller is closer to exact, and keeps more entries.
            Default: 2^-12; 6 / V, where that is less, if the head gets no gradient.
        tail_groups: (...) integer 0 or 1, of the sparse gradient: rows averaged together. Best are
            rows whose log-probs the loss pushes the same way. Default: all rows.
        compute_dtype: dtype of the GEMM operands; default: the autocast dtype when autocast is on,
            else the promoted dtype of `hidden` and `weight`. On a CPU float16 runs in float32,
            and so does bfloat16 on one that has no kernels for it (without AVX-512 or ARM's bf16).
        workspace_bytes: what may be allocated beyond inputs, results and gradients, in bytes;
            default: 64 MiB, or 1 % of the device's memory where that is more.
        low_rank: (hidden_r (..., r), weight_r (V, r)); adds `hidden_r @ weight_r.T` to the raw
            logits, with gradients to both: a LoRA on the head.

    Returns:
        (...) float32 (float64 when computed in float64), nats, <= 0, and 0 where ignored; a tuple
        when `labels` is one.

    Raises:
        TypeError: not floating point (a quantised weight), labels that are not integer, an option
            of another type.
        ValueError: shapes that do not match, a label outside [0, V) or a tail group but 0 and 1 (a
            device-side assertion while a CUDA graph is captured, and in plain torch on a GPU), an
            option out of range, a workspace too small for one tile, a scale that is not positive
            with gradient="sparse".
        NotImplementedError: second or forward-mode derivatives.

    Note:
        Never allocates (N, V). Unscored rows are dropped before any GEMM (choosing them syncs a GPU
        once in the forward, and once in the backward of a trainable head). Deterministic.

    Source:
        arXiv 2403.07691, equation 1 (token log-probs); derivation in docs/mathematics.md.
    """
    options = LogpsOptions(
        logit_scale, softcap, ignore_index, gradient, eps, tail_groups, compute_dtype,
        workspace_bytes, low_rank,
    )  # fmt: skip
    return certified_logps(hidden, weight, labels, bias, options)[0]


def certified_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | tuple[Tensor, Tensor],
    bias: Tensor | None,
    options: LogpsOptions,
) -> tuple[Tensor | tuple[Tensor, Tensor], Certificate | None]:
    """`linear_logps`, and what its gradient leaves out: None if it is exact, or there is none."""
    label_sets = labels if isinstance(labels, tuple) else (labels,)
    low_rank = options.low_rank
    validate_operands(hidden, weight, label_sets, bias, options)
    refuse_forward_mode(hidden, weight, bias, *(low_rank or ()))
    device = weight.device
    moved = hidden.to(device)
    hidden_r, weight_r = (None, None) if low_rank is None else (low_rank[0].to(device), low_rank[1])
    stacked = torch.stack([each.to(device, torch.int64) for each in label_sets])
    dtype = choose_compute_dtype(hidden, weight, options.compute_dtype)
    grad = torch.is_grad_enabled()
    needs = (
        grad and (hidden.requires_grad or (hidden_r is not None and hidden_r.requires_grad)),
        grad and any(each is not None and each.requires_grad for each in (weight, bias, weight_r)),
    )
    problem = (
        moved, weight, stacked, bias, hidden_r, weight_r, float(options.logit_scale),
        options.softcap, options.ignore_index, dtype, options.workspace_bytes,
    )  # fmt: skip
    certificate = None
    if options.is_sparse(dtype) and any(needs):
        groups = options.tail_groups
        groups = None if groups is None else groups.to(device, torch.int64)
        logps, fields, *_ = sparse.sparse_token_logps(
            *problem, groups, options.threshold(weight.shape[0], trains=needs[1]), *needs, True
        )
        certificate = Certificate(*fields.unbind())
    else:
        logps, *_ = exact.exact_linear_logps(*problem, *needs, True)
    logps = logps.to(hidden.device)
    each = logps.unbind()  # one launch in the backward, where an index for each takes several
    return (each[0], each[1]) if isinstance(labels, tuple) else each[0], certificate
