"""The sparse gradient by its definition, in float64 and with whole (N, V) matrices."""

import torch

from orpo_kernels import reference


def sparse_softmax(z, slope, labels, eps, groups, columns):
    """What stands for p d in each row's gradient, (N, V); the mass dropped by block; q (G, V).

    Labels (K, N) are exact. Which entries are kept in a block of `columns` is decided by the sum up
    to and with it, the labels' exponentials in it from the start.
    """
    V = z.shape[1]
    is_label = torch.zeros_like(z, dtype=torch.bool)
    for each in labels:
        is_label |= each[:, None] == torch.arange(V)
    u = torch.softmax(z, 1) * slope
    known = z.masked_fill(~is_label, -torch.inf).logsumexp(1, keepdim=True)
    substitute, tail, dropped = u.clone(), torch.zeros(int(groups.max()) + 1, V), []
    tail = tail.double()
    for v0 in range(0, V, columns):
        block = slice(v0, min(v0 + columns, V))
        others = z[:, block].masked_fill(is_label[:, block], -torch.inf)
        known = torch.logaddexp(known, others.logsumexp(1, keepdim=True))
        by_known = torch.exp(z[:, block] - known) * slope[:, block]
        drop = (by_known <= eps) & ~is_label[:, block]
        tail[:, block].index_add_(0, groups, torch.where(drop, by_known, 0.0))
        dropped.append(torch.where(drop, u[:, block], 0.0).sum(1))
        substitute[:, block] = torch.where(drop, 0.0, u[:, block])
    total = tail.sum(1, keepdim=True)
    return substitute, torch.stack(dropped), torch.where(total > 0, tail / total, 0.0)


def sparse_gradients(inputs, labels, upstream, options, eps, groups, columns, unstored=None):
    """Gradients by name, in float64, of `sum(upstream * logps)`; tensors are flat, (N, ...).

    Args:
        inputs: hidden (N, H), weight, and optionally bias, hidden_r, weight_r.
        labels: (K, N), ignored ones negative.
        upstream: (K, N).
        options: logit_scale, softcap.
        eps: as in `linear_logps`.
        groups: (N,).
        columns: of a vocabulary block.
        unstored: (blocks, N) bool, the tiles whose weight gradient is exact.
    """
    inputs = {name: each.detach().double() for name, each in inputs.items()}
    low_rank = (inputs["hidden_r"], inputs["weight_r"]) if "hidden_r" in inputs else None
    raw = reference.logits(
        inputs["hidden"], inputs["weight"], inputs.get("bias"), low_rank=low_rank
    )
    z, slope = reference.transform(raw, options.get("logit_scale", 1.0), options.get("softcap"))
    scored = (labels >= 0).any(0)
    z, slope, labels, upstream = z[scored], slope[scored], labels[:, scored], upstream[:, scored]
    a = torch.where(labels >= 0, upstream.double(), 0.0)
    substitute, dropped, q = sparse_softmax(z, slope, labels, eps, groups[scored], columns)
    of_row = q[groups[scored]]
    target = torch.zeros_like(z)
    for each, coefficient in zip(labels, a, strict=True):
        target.scatter_add_(1, each.clamp(min=0)[:, None], coefficient[:, None])
    target *= slope
    total = a.sum(0)[:, None]
    dlogits = target - total * (substitute + dropped.sum(0)[:, None] * of_row)
    h, w = inputs["hidden"][scored], inputs["weight"]
    gradients = {"hidden": torch.zeros_like(inputs["hidden"])}
    gradients["hidden"][scored] = dlogits @ w
    if low_rank is not None:
        gradients["hidden_r"] = torch.zeros_like(low_rank[0])
        gradients["hidden_r"][scored] = dlogits @ low_rank[1]
    if unstored is not None:
        exact = torch.softmax(z, 1) * slope
        missing = unstored[:, scored]
        at = missing.repeat_interleave(columns, 0)[: z.shape[1]].t()
        substitute = torch.where(at, exact, substitute)
        mass = torch.where(missing, 0.0, dropped).sum(0)[:, None]
        dlogits = target - total * (substitute + mass * of_row)
    gradients["weight"] = dlogits.t() @ h
    if "bias" in inputs:
        gradients["bias"] = dlogits.sum(0)
    if low_rank is not None:
        gradients["weight_r"] = dlogits.t() @ low_rank[0][scored]
    return gradients
