"""The schemas of all tile operations, and what each does.

A tile holds the raw logits `h W^T` of R rows and C consecutive vocabulary columns, `first_column`
on. The transform is part of the operation: `z = softcap(scale * (tile + bias))`, `d = dz / dtile`.

    softmax_stats   max, sum of exp(z - max) and, on request, sum of z, per row 1 read
    softmax_grad_   tile <- exp(z - reference) * d, label columns 0             1 read + 1 write
    column_sums     coefficients^T tile, of one row of them or several          1 read
    accumulate_     accumulator <- rescale * accumulator + alpha * partial      1 read + 1 update

those with which one operation finishes a tile (`tiles/collect.py`), on a CPU and in plain torch:

    softmax_collect_         one step of an online softmax, E in place; the large entries apart,
                             redone in float32 from the inputs, as a list per row
                                                                                1 read + 1 write
    csr_matmul_              accumulator += that list @ weight                  a row per entry
    softmax_compact_online_  the same step for the sparse gradient: what is not in the list is
                             summed by column                                   1 read + 1 write
    compact_weight_gradient  block <- block - list^T (coefficients * hidden)    a row per entry

and the one that needs no tile (`engine/linear_lse.py`):

    linear_lse      the statistics of `hidden weight^T`, and the dots of labels  no logit in memory

`labels` is (K, R) int64, K label sets, -1 where a row has none. Label columns take no part in the
maximum and the sum of exponentials and are zeroed in the gradient: the engine handles them in
float32, from exact dots, so a confident token loses no digits. The sum of z, empty when not asked
for, is over all columns, those of labels included: it belongs to a mean over the vocabulary.

All arithmetic is float32 (float64 for a float64 tile); a 16-bit tile is widened in strips that stay
in cache, never as a whole.

A backend implements an operation by registering a kernel for its dispatch key (CPU: `csrc/`; CUDA,
ROCm and XPU: `kernels/`). The plain-torch form of every operation serves whoever has none.
"""

import torch

_TRANSFORM = "float logit_scale, float? softcap"
_TILE = "Tensor? bias, Tensor labels, int first_column"
_ONLINE = "Tensor(b!) row_max, Tensor(c!) sum_exp, Tensor? others, Tensor? hidden, Tensor? weight"

SCHEMAS = {
    "softmax_stats": (
        f"(Tensor logits, {_TILE}, {_TRANSFORM}, bool with_logit_sum=False) "
        "-> (Tensor, Tensor, Tensor)"
    ),
    "softmax_grad_": (
        f"(Tensor(a!) logits, {_TILE}, Tensor reference, {_TRANSFORM}, Tensor(b!)? out=None) -> ()"
    ),
    "column_sums": "(Tensor tile, Tensor coefficients) -> Tensor",
    "accumulate_": (
        "(Tensor(a!) accumulator, Tensor partial, Tensor? rescale, float alpha=1.0) -> ()"
    ),
    "softmax_collect_": (
        f"(Tensor(a!) logits, {_TILE}, {_ONLINE}, float share, int most, {_TRANSFORM}, "
        "bool online, bool store) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "csr_matmul_": (
        "(Tensor(a!) accumulator, Tensor offsets, Tensor columns, Tensor values, Tensor weight) "
        "-> ()"
    ),
    "softmax_compact_online_": (
        f"(Tensor(a!) logits, {_TILE}, {_ONLINE}, float eps, float share, int most, {_TRANSFORM}, "
        "Tensor groups, Tensor(d!) tail, int capacity) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "compact_weight_gradient": (
        "(Tensor(a!) block, Tensor store, Tensor table, int item, int first_column, "
        "Tensor coefficients, Tensor hidden, Tensor? tail=None, Tensor? tail_rows=None) -> ()"
    ),
    "linear_lse": (
        f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, {_TRANSFORM}, "
        "bool with_logit_sum) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
}

for _name, _schema in SCHEMAS.items():
    torch.library.define(f"orpo_kernels::{_name}", _schema)

softmax_stats = torch.ops.orpo_kernels.softmax_stats
softmax_grad_ = torch.ops.orpo_kernels.softmax_grad_
column_sums = torch.ops.orpo_kernels.column_sums
accumulate_ = torch.ops.orpo_kernels.accumulate_
softmax_collect_ = torch.ops.orpo_kernels.softmax_collect_
csr_matmul_ = torch.ops.orpo_kernels.csr_matmul_
softmax_compact_online_ = torch.ops.orpo_kernels.softmax_compact_online_
compact_weight_gradient = torch.ops.orpo_kernels.compact_weight_gradient
linear_lse = torch.ops.orpo_kernels.linear_lse

NATIVE = tuple(name for name in SCHEMAS if name != "linear_lse")
"""Operations with a C++ kernel for a CPU."""
