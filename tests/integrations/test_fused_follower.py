"""The self-check changes nothing that a call computes or saves: its logits take no part."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orpo_kernels import ORPOLoss
from orpo_kernels.integrations.follower import Followed, followed, released
from orpo_kernels.integrations.transformers import fuse_head
from tests.integrations.helpers import BETA, assert_near, fused_step, make_batch, unfused_step
from tests.tiny_models import build

LOSS = ORPOLoss(BETA)


def batch_for(name: str) -> dict[str, Tensor]:
    batch = make_batch()
    # Gemma 3's multimodal class insists on it in training; all text.
    types = {"token_type_ids": torch.zeros_like(batch["input_ids"])}
    return {**batch, **(types if name == "gemma3_vl" else {})}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gemma2",  # its softcap saves a tensor for the backward
        "cohere",
        "granite",
        "mixtral",
        "gemma3_vl",  # its config is misread at first: the call runs twice
    ],
)
def test_the_whole_first_call_under_a_checkpoint(name: str, reentrant: bool) -> None:
    # The recomputation, in the backward, runs the call again, without a check.
    model, batch = build(name), batch_for(name)
    expected = unfused_step(build(name), batch)
    start = torch.zeros((), requires_grad=True)  # reentrant checkpoints need an input with gradient
    with fuse_head(model, loss=LOSS):
        loss = checkpoint(lambda zero: model(**batch).loss + zero, start, use_reentrant=reentrant)
        loss.backward()
    for key, gradient in expected.gradients.items():
        assert_near(key, model.get_parameter(key).grad, gradient, 1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "qwen3_moe"])
def test_a_checked_call_saves_what_any_call_saves(name: str) -> None:
    model, batch = build(name), batch_for(name)

    def saved() -> list[tuple[torch.Size, torch.dtype]]:
        shapes: list[tuple[torch.Size, torch.dtype]] = []

        def pack(tensor: Tensor) -> Tensor:
            shapes.append((tensor.shape, tensor.dtype))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(**batch)
        return shapes

    with fuse_head(model, loss=LOSS, mean_logits=True) as fused:
        first = saved()
        assert fused.transform is not None
        assert saved() == first


class Marked(torch.autograd.Function):
    """As ZeRO-3 puts around the output of every module."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@pytest.mark.parametrize("change", [Marked.apply, lambda logits: logits.clone(), torch.relu])
def test_logits_follow_through_hooks_of_the_head(change: Callable[[Tensor], Tensor]) -> None:
    model, batch = build("gemma2"), make_batch()
    model.lm_head.register_forward_hook(lambda module, args, logits: change(logits))
    if change is torch.relu:  # another objective
        with fuse_head(model, loss=LOSS), pytest.raises(RuntimeError, match="Gemma2ForCausalLM"):
            model(**batch)
        return
    expected = unfused_step(model, batch)
    with fuse_head(model, loss=LOSS):
        assert_near("loss", fused_step(model, batch).loss, expected.loss, 1e-5)


class Rebuilt(transformers.LlamaForCausalLM):
    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output.logits = torch.from_numpy(output.logits.detach().numpy())
        return output


def test_logits_that_get_lost_are_refused() -> None:
    model = build("llama")
    model.__class__ = Rebuilt
    with fuse_head(model, loss=LOSS), pytest.raises(RuntimeError, match="follow the logits of Reb"):
        model(**make_batch())


def test_a_cache_is_not_extended_twice_in_silence() -> None:
    model, batch = build("gemma3_vl").eval(), batch_for("gemma3_vl")
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "nll_labels")}
    with fuse_head(model, loss=LOSS) as fused:
        with pytest.raises(RuntimeError, match="after this call had extended past_key_values"):
            model(**batch, past_key_values=transformers.DynamicCache())
        cache = transformers.DynamicCache()
        with torch.no_grad():
            loss = model(**batch, past_key_values=cache).loss
        assert cache.get_seq_length() == inputs["input_ids"].shape[1]
        expected = unfused_step(build("gemma3_vl").eval(), batch)
        assert_near("loss", loss, expected.loss, 1e-5)
        assert fused.transform is not None


def test_a_follower_goes_where_the_tensor_goes() -> None:
    leaf = torch.zeros(2, 0, requires_grad=True)
    tensor = followed(leaf.clone(), torch.arange(6.0).view(1, 6))
    node = tensor.grad_fn
    assert isinstance(tensor, Followed)
    assert tensor.shape == (2, 0)
    assert tensor._base is None
    changed = 2 * torch.tanh((tensor / 2).to(torch.float64))
    changed = changed.clone()
    changed[..., 2:4] = -1
    changed += 1
    (low,) = torch.split(changed, 6, dim=-1)
    expected = 2 * torch.tanh(torch.arange(6.0, dtype=torch.float64) / 2)
    expected[2:4] = -1
    outcome = released(low)
    assert torch.equal(outcome, (expected + 1)[None])
    assert not outcome.requires_grad
    assert type(low) is Tensor
    assert low.requires_grad
    assert released(tensor).shape == (1, 6)
    assert tensor.grad_fn is node
    low.sum().backward()
    assert leaf.grad.shape == (2, 0)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits + torch.linspace(0, 1, logits.shape[-1]),
        lambda logits: logits.view(logits.shape),
        lambda logits: nn.functional.pad(logits, (0, 1)).split(1, dim=-1)[0],
        lambda logits: logits.index_fill_(-1, torch.tensor([], dtype=torch.int64), 0).reshape(2, 0),
    ],
)
def test_what_depends_on_the_size_of_the_logits_is_noticed(change: Any) -> None:
    assert isinstance(released(change(followed(torch.zeros(2, 0), torch.zeros(1, 6)))), Exception)
