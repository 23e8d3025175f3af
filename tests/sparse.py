"""The sparse gradient by its definition, of everything a call of `linear_logps` may be given."""

import torch

from orpo_kernels import reference


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
    ranks = [name for name in ("hidden", "hidden_r") if name in inputs]
    hidden = torch.cat([inputs[name] for name in ranks], 1)
    weight = torch.cat([inputs[name.replace("hidden", "weight")] for name in ranks], 1)
    ignored = torch.where(labels >= 0, labels, reference.IGNORE_INDEX)

    def gradients(head_mask=None):
        return reference.sparse_gradients(
            hidden, weight, tuple(ignored), tuple(upstream.double()), inputs.get("bias"),
            eps=eps, groups=groups, columns=columns, head_mask=head_mask,
            logit_scale=options.get("logit_scale", 1.0), softcap=options.get("softcap"),
        )  # fmt: skip

    found = gradients()
    if unstored is not None:
        exact = unstored[:, (labels >= 0).any(0)].repeat_interleave(columns, 0).t()
        found = gradients(found.softmax.mask | exact[:, : weight.shape[0]])
    widths = [inputs[name].shape[1] for name in ranks]
    named = {"bias": found.dbias} if "bias" in inputs else {}
    for name, of_rows, of_head in zip(
        ranks, found.dhidden.split(widths, 1), found.dweight.split(widths, 1), strict=True
    ):
        named[name], named[name.replace("hidden", "weight")] = of_rows, of_head
    return named
