"""Adapters of the other implementations: each one's own public API, called as its authors mean it.

A primitive that returns log-probs per token gets the scored rows only, `hidden[mask]`, as its own
users pass them, and the ORPO terms from `orpo_math`. An implementation of the whole loss gets the
padded batch. Nothing here is faster than its authors would make it, and nothing slower.
"""

import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.workloads import Workload
from orpo_kernels.constants import IGNORE_INDEX

BETA = 0.1
Forward = Callable[[], Tensor]


def always_there(workload: Workload, device: str) -> str | None:
    """Nothing to install, nothing it cannot express."""
    del workload, device
    return None


def needs(module: str, *, softcap: bool = True) -> Callable[[Workload, str], str | None]:
    """Why a peer that lives in `module` cannot run; `softcap=False`: it has no logit softcap."""

    def missing(workload: Workload, device: str) -> str | None:
        del device
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed; `make setup-race` makes an environment that has it"
        if workload.softcap is not None and not softcap:
            return f"{module} has no softcap in this loss"
        return None

    return missing


def torch_lce_missing(workload: Workload, device: str) -> str | None:
    """`F.linear_cross_entropy` came with torch 2.13 and has no softcap."""
    del device
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy; it came with 2.13"
    return "F.linear_cross_entropy has no softcap" if workload.softcap is not None else None


def orpo_math(token_logps: Tensor, workload: Workload) -> Tensor:
    """The ORPO loss of `token_logps` (2P, T) float32, as a user of a primitive writes it."""
    odds, nll = workload.labels != IGNORE_INDEX, workload.nll_labels != IGNORE_INDEX
    chosen, rejected = ((token_logps * odds).sum(-1) / odds.sum(-1)).chunk(2)
    log_odds = (chosen - rejected) - (torch.log1p(-chosen.exp()) - torch.log1p(-rejected.exp()))
    nll_loss = -(token_logps * nll).sum() / nll.sum()
    return nll_loss - BETA * F.logsigmoid(log_odds).mean()


def _compact(workload: Workload, token_logps: Callable[[Tensor, Tensor], Tensor]) -> Forward:
    """The forward of a per-token primitive `(N, H), (N,) -> (N,)` on the scored rows."""
    labels = workload.union_labels
    mask = labels != IGNORE_INDEX
    targets = labels[mask]

    def forward() -> Tensor:
        logps = token_logps(workload.hidden[mask], targets).float()
        return orpo_math(logps.new_zeros(mask.shape).masked_scatter(mask, logps), workload)

    return forward


def eager(workload: Workload) -> Forward:
    """All logits of the scored rows, float32 log-softmax, autograd."""

    def token_logps(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = (hidden @ workload.weight.t()).float()
        if workload.softcap is not None:
            logits = workload.softcap * torch.tanh(logits / workload.softcap)
        return logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]

    return _compact(workload, token_logps)


def trl_chunked(workload: Workload) -> Forward:
    """TRL's fused primitive (trl/kernels/chunked_logprob.py) with TRL's own chunk size."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK_SIZE

    def token_logps(hidden: Tensor, targets: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(
            hidden, workload.weight, None, targets, 1.0, CHUNK_SIZE, workload.softcap, 1.0,
            ("log_probs",),
        )[0]  # fmt: skip

    return _compact(workload, token_logps)


class _OnlyHead(torch.nn.Module):
    """As much of a causal LM as `add_fused_lm_head` asks for; its backbone is a tensor."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        text = SimpleNamespace(final_logit_softcapping=workload.softcap)
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self._head = SimpleNamespace(weight=workload.weight, bias=None)
        self._hidden = workload.hidden

    def base_model(self, **kwargs: Any) -> SimpleNamespace:
        del kwargs
        return SimpleNamespace(last_hidden_state=self._hidden)

    def get_output_embeddings(self) -> SimpleNamespace:
        return self._head


def trl_fused(workload: Workload) -> Forward:
    """The head that TRL gives a model, log-probs and mean logits, which its ORPO metrics take.

    It reads the scored rows on a device with Triton, every row of the padded batch elsewhere.
    """
    from trl.trainer import add_fused_lm_head

    model: Any = _OnlyHead(workload)
    add_fused_lm_head(model, outputs=("log_probs", "mean_logits"))

    def forward() -> Tensor:
        output = model.forward(shift_labels=workload.union_labels, fused_lm_head=True)
        return orpo_math(output.log_probs, workload)

    return forward


def unsloth(workload: Workload) -> Forward:
    """Unsloth's masked log-probs, which its ORPO trainer takes."""
    os.environ["UNSLOTH_IS_PRESENT"] = "1"  # without its main package it does not import
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", tempfile.mkdtemp())  # it writes on import
    # On a CPU it leaves a Triton behind with which the others do not import any more.
    for other in ("cut_cross_entropy", "liger_kernel.chunked_loss", "trl.kernels"):
        if importlib.util.find_spec(other.split(".")[0]) is not None:
            importlib.import_module(other)
    if not workload.hidden.is_cuda:
        os.environ["UNSLOTH_ZOO_DISABLE_GPU_INIT"] = "1"
    from unsloth_zoo.fused_losses import unsloth_masked_logprobs

    labels = workload.union_labels
    mask = labels != IGNORE_INDEX

    def forward() -> Tensor:
        logps = unsloth_masked_logprobs(
            workload.hidden, workload.weight, labels, mask=mask,
            logit_softcapping=workload.softcap or 0.0,
        )  # fmt: skip
        return orpo_math(logps, workload)

    return forward


def cce(workload: Workload) -> Forward:
    """Apple's cut cross-entropy: the Triton kernels on a GPU, its torch.compile form elsewhere."""
    from cut_cross_entropy import linear_cross_entropy

    impl = "cce" if workload.hidden.is_cuda else "torch_compile"

    def token_logps(hidden: Tensor, targets: Tensor) -> Tensor:
        return -linear_cross_entropy(
            hidden, workload.weight, targets, softcap=workload.softcap, reduction="none", impl=impl
        )

    return _compact(workload, token_logps)


def torch_lce(workload: Workload) -> Forward:
    """`F.linear_cross_entropy`, chunked, with its own default options.

    Only `reduction="none"` can express a loss that weighs tokens by what the pair says.
    """
    options = torch.nn.LinearCrossEntropyOptions()

    def token_logps(hidden: Tensor, targets: Tensor) -> Tensor:
        return -F.linear_cross_entropy(
            hidden, workload.weight, targets, reduction="none", options=options
        )

    return _compact(workload, token_logps)


def liger(*, compiled: bool) -> Callable[[Workload], Forward]:
    """Liger's fused linear ORPO loss on the padded batch, one pair per chunk (its default)."""

    def prepare(workload: Workload) -> Forward:
        from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

        loss = LigerFusedLinearORPOLoss(
            ignore_index=IGNORE_INDEX, beta=BETA, compiled=compiled, chunk_size=1
        )

        def forward() -> Tensor:
            return loss(
                workload.weight, workload.hidden, workload.labels, nll_target=workload.nll_labels
            )[0]

        return forward

    return prepare


def trl_trainer(device: torch.device | str) -> Any:
    """TRL's `ORPOTrainer`, for its `get_batch_loss_metrics(model, batch)`, metrics included.

    Made without its constructor, which wants a model and a dataset.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.orpo import ORPOTrainer

    trainer: Any = object.__new__(ORPOTrainer)
    trainer.is_encoder_decoder = trainer.aux_loss_enabled = False
    trainer.padding_value, trainer.beta = 0, BETA
    trainer.accelerator = SimpleNamespace(
        device=torch.device(device), gather_for_metrics=lambda value: value
    )
    return trainer


def trl_orpo(workload: Workload) -> Forward:
    """The loss of TRL's `ORPOTrainer` itself, on the full logits of a model that is only a head."""
    trainer = trl_trainer(workload.hidden.device)

    def model(input_ids: Tensor, **kwargs: Any) -> SimpleNamespace:
        del input_ids, kwargs
        logits = workload.hidden @ workload.weight.t()
        if workload.softcap is not None:  # as transformers' Gemma 2 does it
            logits = torch.tanh(logits / workload.softcap) * workload.softcap
        return SimpleNamespace(logits=logits)

    batch = _trl_batch(workload)
    return lambda: trainer.get_batch_loss_metrics(model, batch)[0]


def _trl_batch(workload: Workload) -> dict[str, Tensor]:
    """Labels back in the position of their token, the form TRL's collator hands to the trainer."""
    pairs = workload.labels.shape[0] // 2

    def unshift(labels: Tensor) -> Tensor:
        return F.pad(labels[:, :-1], (1, 0), value=IGNORE_INDEX)

    input_ids = unshift(workload.union_labels).clamp(min=0)
    labels = unshift(workload.labels)
    batch = {}
    for side, rows in (("chosen", slice(None, pairs)), ("rejected", slice(pairs, None))):
        batch[f"{side}_input_ids"] = input_ids[rows]
        batch[f"{side}_attention_mask"] = workload.attention[rows]
        batch[f"{side}_labels"] = labels[rows]
    return batch
