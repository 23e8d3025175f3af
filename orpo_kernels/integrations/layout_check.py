"""Two small pairs in rows, compared with the same pairs padded, once for each model.

A wrong mask trains another objective without a word: a model may ignore a mask it is given, count
positions by the place in the row, or read its window in another way than the config says. The
hidden states of a few made-up tokens show it. Windows are made small for that time, or the pairs
would have to be longer than they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from orpo_kernels.integrations.attention import REACHES, text_config
from orpo_kernels.integrations.decoder import in_batch, in_rows, laid_out
from orpo_kernels.integrations.selfcheck import TF32_EPS, WithoutDropout
from orpo_kernels.layout import BatchLayout, Rows

_LENGTHS = ((7, 9, 6), (3, 4, 8))  # of prompt, chosen and rejected answer
_SMALL_REACH = 5  # of a window or a chunk: less than an answer, so that prompts fall out of it
_FLOAT32 = 1e-4  # relative; layers of float32 differ by 1e-6 between shapes
_ROUNDINGS = 16  # of another dtype: measured 1 to 4 for 24 layers in bfloat16


def check_layout(
    decoder: nn.Module,
    own: Callable[..., Any],
    layout: BatchLayout,
    name: str,
    device: torch.device,
) -> None:
    """Refuse a model that computes other hidden states in rows.

    Args:
        decoder: of the model.
        own: its forward.
        layout: "packed" or "shared_prompt".
        name: of the model, for the message.
        device: of the tokens it is called with.

    Raises:
        NotImplementedError: the hidden states differ, or the forward fails on the mask of rows.
        RuntimeError: those of the padded batch are not finite.

    Note:
        Until it returns, the window in the model's config is another.
    """
    ids, mask = _tokens(decoder, device)
    batch = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad(), WithoutDropout(), _small_reach(text_config(decoder)):
        truth = _hidden(own(**batch, use_cache=False))
        _refuse_unless_finite(truth[mask.bool()], name)
        rows = laid_out(decoder, layout, [ids], mask)
        try:
            ours = _hidden(in_batch(rows, own(**in_rows(decoder, rows, batch))))
            leaking = _hidden(in_batch(rows, own(**in_rows(decoder, _leaking(rows), batch))))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of any kind: the forward is somebody else's
            raise NotImplementedError(
                f"{name} cannot compute rows of several sequences: {type(error).__name__}: "
                f"{error}; set batch_layout='padded' for this model"
            ) from error
    scored = mask.bool()
    off, wrong = (_distance(each[scored], truth[scored]) for each in (ours, leaking))
    allowed = _tolerance(decoder, truth)
    if not off <= allowed or (wrong > allowed and off > wrong / 4):
        raise NotImplementedError(
            f"{name} computes other hidden states with batch_layout={layout.name!r}: off by "
            f"{off:.2g} of their size on two small pairs, where {allowed:.2g} is rounding. It "
            "carries something past the end of a sequence, or has a mask that its config does not "
            "tell (windows, biases by distance); set batch_layout='padded' for this model"
        )


def _refuse_unless_finite(hidden: Tensor, name: str) -> None:
    if not bool(hidden.isfinite().all()):
        raise RuntimeError(
            f"the hidden states of {name} are NaN or infinite for two small padded pairs, with any "
            "batch_layout: its weights are, it overflows their dtype (float16 ends at 65,504), or "
            "its attention cannot do with padding in this dtype; load it in bfloat16 or float32"
        )


def _tokens(decoder: nn.Module, device: torch.device) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask (4, T) of two pairs, padded."""
    weight: Any = decoder.get_input_embeddings().weight  # type: ignore[operator]
    vocabulary = getattr(weight, "ds_shape", weight.shape)[0]  # ZeRO-3 keeps the real one aside
    width = max(p + answer for p, *answers in _LENGTHS for answer in answers)
    ids = torch.zeros(4, width, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for pair, (prompt, *answers) in enumerate(_LENGTHS):
        for side, answer in enumerate(answers):
            row, length = 2 * side + pair, prompt + answer
            at = torch.arange(length, device=ids.device)
            seed = 7 * pair + torch.where(at < prompt, 0, 1 + side)
            ids[row, :length] = (seed * 101 + at * 37 + 11) % vocabulary
            mask[row, :length] = 1
    return ids, mask


@contextmanager
def _small_reach(config: Any) -> Iterator[None]:
    found: dict[str, Any] = {name: getattr(config, name, None) for name in REACHES}
    before = {name: reach for name, reach in found.items() if reach is not None}
    try:
        for name, reach in before.items():
            setattr(config, name, min(reach, _SMALL_REACH))
        yield
    finally:
        for name, reach in before.items():
            setattr(config, name, reach)


def _leaking(rows: Rows) -> Rows:
    """Rows whose mask does not tell the sequences apart."""
    zeros = torch.zeros_like(rows.groups)
    return rows._replace(groups=zeros, branches=zeros, starts=(0, rows.computed))


def _hidden(output: Any) -> Tensor:
    return output[0].float()  # type: ignore[no-any-return]


def _distance(ours: Tensor, truth: Tensor) -> float:
    """Root mean square over tokens of the error, relative to the size of the hidden state."""
    size = truth.norm(dim=-1).clamp(min=1e-30)
    return float(((ours - truth).norm(dim=-1) / size).square().mean().sqrt())


def _tolerance(decoder: nn.Module, hidden: Tensor) -> float:
    kind = hidden.device.type
    dtypes = {p.dtype if p.is_floating_point() else torch.bfloat16 for p in decoder.parameters()}
    if torch.is_autocast_enabled(kind):
        dtypes.add(torch.get_autocast_dtype(kind))
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    if hidden.is_cuda:
        eps = max(eps, TF32_EPS)
    return max(_FLOAT32, _ROUNDINGS * eps)
