"""What the backward passes of the two ops of `linear_logps`, exact and sparse, share."""

import torch
from torch import Tensor

from orpo_kernels.engine.chunks import Columns, spans, workspace_budget
from orpo_kernels.engine.selection import score
from orpo_kernels.engine.weight_gradient import label_shares, present


@torch.library.custom_op("orpo_kernels::linear_logps_dhidden_", mutates_args=("g", "g_r"))
def linear_logps_dhidden_(  # noqa: PLR0913 - a schema has no dataclasses
    g: Tensor,
    g_r: Tensor,
    dlogps: Tensor,
    statistics: Tensor,
    weight: Tensor,
    labels: Tensor,
    weight_r: Tensor | None,
    ignore_index: int,
    compute_dtype: torch.dtype,
    workspace_bytes: int | None,
    tail: Tensor | None = None,
    groups: Tensor | None = None,
) -> None:
    """Turns g into dhidden in place: a (1 - p) g, plus the entries of two differing labels.

    With `tail`, q W (G, H + r) of the sparse gradient, g is first completed by it: row t lacks
    `statistics[7, t]` times the row of its group, `groups` (N) or all of one.
    """
    with torch.amp.autocast(weight.device.type, enabled=False):
        scored = score(labels, ignore_index)
        a = scored.coefficients(dlogps)
        columns = Columns((weight,) if weight_r is None else (weight, weight_r), compute_dtype)
        shares = None
        if scored.labels.second is not None:
            distinct = scored.labels.second >= 0
            shares = [
                torch.where(distinct, share, 0.0) for share in label_shares(statistics[:7], a)
            ]
        factor = a.total * statistics[2]
        # Widened rows, label entries and their cast; a few MiB are as fast as more.
        row_bytes = (g.shape[1] + g_r.shape[1]) * factor.element_size() * 4
        budget = min(workspace_budget(workspace_bytes, weight.device), 2**24)
        for start, stop in spans(g.shape[0], max(1, budget // max(1, row_bytes))):
            wide = factor[start:stop, None] * torch.cat((g[start:stop], g_r[start:stop]), 1)
            if tail is not None:
                share = factor[start:stop] * statistics[7, start:stop]
                of_row = tail if groups is None else tail[groups.reshape(-1)[start:stop]]
                wide -= share[:, None] * of_row
            if shares is not None:
                for each, share in zip(present(list(scored.labels)), shares, strict=True):
                    rows = columns.rows(each[start:stop], wide.dtype)
                    wide.addcmul_(rows, share[start:stop, None])
            g[start:stop] = wide[:, : g.shape[1]]
            g_r[start:stop] = wide[:, g.shape[1] :]


def empty_weight_gradients(
    weight: Tensor, bias: Tensor | None, weight_r: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Like weight, bias and the low-rank weight, to be filled; (0,) for what needs no gradient."""

    def empty(tensor: Tensor | None, need: bool) -> Tensor:
        like = weight if tensor is None else tensor
        return like.new_empty(like.shape if need and tensor is not None else (0,))

    return empty(weight, needs[0]), empty(bias, needs[1]), empty(weight_r, needs[2])


def refuse_second_derivatives() -> None:
    """An error in a backward that is itself recorded."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "second derivatives of linear_logps are not available: backward with create_graph=False"
        )


def consumable(g: Tensor, g_r: Tensor, had_gradient: bool, consume: bool) -> tuple[Tensor, Tensor]:
    """What may be turned into dhidden in place: g and its low-rank part, or copies of them."""
    if not had_gradient:
        raise RuntimeError("the op was called with needs_dhidden=False; call linear_logps")
    kept_graph = torch._C._autograd._get_current_graph_task_keep_graph()
    # Traced (a subclass stands for g), what is mutated must not be an output of the forward.
    if kept_graph or not consume or type(g) is not Tensor:
        return g.clone(), g_r.clone()
    return g, g_r
