"""Every implementation of the ORPO loss that is measured, ours first: one adapter, one signature.

`prepare(workload)` puts the batch into the form the implementation wants, untimed, and returns the
timed call: no arguments, the loss as a 0-dim tensor, with a graph when the inputs require
gradients. `missing(workload, device)` says in a sentence why it cannot run here, or None. The
harness, not the adapter, asks for gradients and calls backward.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks import peers
from benchmarks.heads import MODES
from benchmarks.workloads import Workload
from orpo_kernels import use_backend
from orpo_kernels.engine.tiles import native
from orpo_kernels.kernels import gpu_backend

Forward = Callable[[], Tensor]
BETA = peers.BETA
KEPT_SLACK = 256 << 20  # bytes over N V 2: the tile and its float32 work, so that P is kept


@dataclass(frozen=True)
class Implementation:
    """One row of a table.

    `peer`: somebody else's, so that an error over our own limits is recorded and shown instead of
    being refused. `compiled`: goes through torch.compile; counted by the profiler and run in fewer
    cases. `reads_logits`: its time depends on the values of the logits; the others are measured on
    trained-like logits only. `modes`: where it differs from the other rows. `around`: a context in
    which forward and backward run.
    """

    name: str
    title: str
    prepare: Callable[[Workload], Forward]
    missing: Callable[[Workload, str], str | None]
    peer: bool = True
    compiled: bool = False
    reads_logits: bool = False
    modes: tuple[str, ...] = field(default=MODES)
    around: Callable[[], AbstractContextManager[object]] = nullcontext


def _ours(gradient: str, *, keep: bool = False) -> Callable[[Workload], Forward]:
    def prepare(workload: Workload) -> Forward:
        from orpo_kernels import orpo_loss

        options: dict[str, Any] = {"gradient": gradient}
        if keep:
            options["workspace_bytes"] = kept_workspace(workload)

        def forward() -> Tensor:
            return orpo_loss(
                workload.hidden, workload.weight, workload.labels, nll_labels=workload.nll_labels,
                beta=BETA, softcap=workload.softcap, **options,
            ).loss  # fmt: skip

        return forward

    return prepare


def kept_workspace(workload: Workload) -> int:
    """Bytes that hold P for all scored rows, in the dtype of the weight, and one tile beside it."""
    entries = workload.labels.numel() * workload.weight.shape[0]
    return entries * workload.weight.element_size() + KEPT_SLACK


def _never_missing(workload: Workload, device: str) -> None:
    del workload, device


def _plain_missing(workload: Workload, device: str) -> str | None:
    backend = native.cpu_backend() if device == "cpu" else gpu_backend()
    if backend != "torch":
        return None
    return "this machine has no other backend: `ours-exact` is the plain-torch form itself"


IMPLEMENTATIONS = {
    each.name: each
    for each in (
        Implementation(
            "ours-exact", "orpo_kernels, exact", _ours("exact"), _never_missing,
            peer=False, reads_logits=True,
        ),
        Implementation(
            "ours-exact-kept", "orpo_kernels, exact, P kept", _ours("exact", keep=True),
            _never_missing, peer=False, reads_logits=True, modes=("trainable",),
        ),
        Implementation(
            "ours-exact-torch", "orpo_kernels, exact, tiles in plain torch", _ours("exact"),
            _plain_missing, peer=False, modes=("frozen",), around=partial(use_backend, "torch"),
        ),
        Implementation(
            "ours-sparse", "orpo_kernels, sparse", _ours("sparse"), _never_missing,
            peer=False, reads_logits=True, modes=("frozen", "trainable"),
        ),
        Implementation("eager", "plain torch, all logits", peers.eager, peers.always_there),
        Implementation("trl-orpo", "TRL ORPO", peers.trl_orpo, peers.needs("trl")),
        Implementation(
            "trl-chunked", "TRL ChunkedLogProbFunction", peers.trl_chunked, peers.needs("trl"),
        ),
        Implementation(
            "trl-fused", "TRL add_fused_lm_head", peers.trl_fused, peers.needs("trl"),
        ),
        Implementation(
            "unsloth", "Unsloth masked log-probs", peers.unsloth, peers.needs("unsloth_zoo"),
        ),
        Implementation(
            "liger", "Liger ORPO", peers.liger(compiled=False),
            peers.needs("liger_kernel", softcap=False),
        ),
        Implementation(
            "liger-compiled", "Liger ORPO, compiled", peers.liger(compiled=True),
            peers.needs("liger_kernel", softcap=False), compiled=True,
        ),
        Implementation(
            "cce", "Apple CCE", peers.cce, peers.needs("cut_cross_entropy"),
            compiled=True, reads_logits=True,
        ),
        Implementation(
            "torch-lce", "torch linear_cross_entropy", peers.torch_lce, peers.torch_lce_missing,
        ),
    )
}  # fmt: skip
