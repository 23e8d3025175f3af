"""Fused models drawn at random, beside the same model on its own logits, in float64.

What no list of cases thought of: families, adapters, what is frozen, checkpoints, layouts, batches
and options in any combination. A search of this kind, over 136 families, with calls in 16 bits and
changes between calls, found twelve faults (November 2026); these are few enough for every run.
"""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orpo_kernels import ORPOLoss
from orpo_kernels.integrations.transformers import fuse_head
from tests.integrations.helpers import BETA, FIRST_ID, assert_same_step, fused_step, unfused_step
from tests.tiny_models import CAUSAL, build

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out"),  # GPT-2's layers beside its head
    pytest.mark.filterwarnings("ignore:`lora_bias=True`"),
    pytest.mark.filterwarnings("ignore:None of the inputs"),  # the layout's check, checkpointed
]


def drawn_by(seed: int) -> dict[str, Any]:
    """A model, what trains of it, a batch and options; the numbers themselves by the same seed."""
    choose = random.Random(seed).choice
    return {
        "family": choose(sorted(CAUSAL)),
        "tied": choose((True, False)),
        "vocab_size": choose((61, 128, 331)),
        "adapter": choose(("none", "none", "body", "head", "saved", "two")),
        "frozen": choose(("nothing", "head", "body", "half")),
        "checkpoints": choose((None, None, False, True)),  # True: reentrant
        "train": choose((True, False)),
        "pairs": choose((1, 2, 3)),
        "length": choose((2, 5, 9, 24)),  # to beyond the windows of 16
        "unscored": choose((0.0, 0.3)),
        "empty": choose((None, None, 0, -1)),  # the row without a scored token
        "layout": choose(("padded", "packed", "shared_prompt")),
        "workspace_bytes": choose((None, 2**19)),
        "mean_logits": choose((True, False)),
        "seed": seed,
    }


@pytest.mark.parametrize("seed", range(60))
def test_any_model(seed: int) -> None:
    drawn = drawn_by(seed)
    torch.manual_seed(seed)
    model, batch = model_of(drawn), batch_of(drawn)
    # Eager attention is NaN in float64 where a row of its mask is empty; Gemma 2 has no other.
    padded = drawn["layout"] == "padded" or drawn["family"] == "gemma2"
    options = {"workspace_bytes": drawn["workspace_bytes"]}
    options["layout"] = "padded" if padded else drawn["layout"]
    options["mean_logits"] = drawn["mean_logits"] and padded  # of rows they are others
    names = list(model.state_dict())
    expected = unfused_step(model, batch, use_cache=False)
    with fuse_head(model, loss=ORPOLoss(BETA), **options) as fused:
        for _ in range(2):  # with the self-check, and without
            found = fused_step(model, batch, use_cache=False)
            # Softmax and norms of layers are float32 in any model, and other sums in rows.
            assert_same_step(found, expected, 1e-9 if padded else 1e-5)
        with fused.paused():
            assert_same_step(unfused_step(model, batch, use_cache=False), expected, 0.0)
        assert list(model.state_dict()) == names
    assert_same_step(unfused_step(model, batch, use_cache=False), expected, 0.0)


def model_of(drawn: dict[str, Any]) -> nn.Module:
    """The model in float64, without dropout."""
    settings = {"tie_word_embeddings": drawn["tied"], "vocab_size": drawn["vocab_size"]}
    settings["attn_implementation"] = "eager" if drawn["family"] == "gemma2" else "sdpa"
    model: Any = build(drawn["family"], seed=drawn["seed"], **settings)
    for module in model.modules():
        for name in [name for name in vars(module) if "dropout" in name]:
            if isinstance(getattr(module, name), float):
                setattr(module, name, 0.0)
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if drawn["checkpoints"] is not None:
        how = {"use_reentrant": drawn["checkpoints"]}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        model.enable_input_require_grads()
    if drawn["adapter"] == "none":
        head = set(model.get_output_embeddings().parameters())
        parameters = list(model.parameters())
        frozen = {"nothing": [], "head": head, "half": parameters[1::2]}
        frozen["body"] = [each for each in parameters if each not in head]
        for parameter in frozen[drawn["frozen"]]:
            parameter.requires_grad_(False)
    else:
        model = adapted(model, drawn["adapter"])
    return model.double().train(drawn["train"])  # type: ignore[no-any-return]


def adapted(model: Any, adapter: str) -> Any:
    """With a LoRA on two layers of the body, and what `adapter` says of the head."""
    head = model.get_output_embeddings()
    linear = [name for name, each in model.named_modules() if isinstance(each, nn.Linear)]
    body = [name for name in linear if model.get_submodule(name) is not head]
    (name,) = [name for name in linear if name not in body]
    targets = [*body[:2], *([name] if adapter in ("head", "two") else [])]
    saved = [name] if adapter == "saved" else None
    if not body:  # GPT-2's layers are Conv1D
        targets += ["c_attn"]
    config = peft.LoraConfig(
        r=3, target_modules=targets, modules_to_save=saved, lora_bias=adapter == "head"
    )
    model = peft.get_peft_model(model, config)
    if adapter == "two":
        model.add_adapter("second", peft.LoraConfig(r=2, target_modules=[name], use_rslora=True))
        model.base_model.set_adapter(["default", "second"])
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # B and its bias are 0 at first, which hides the rest
            nn.init.normal_(parameter, std=0.2)
    return model


def batch_of(drawn: dict[str, Any]) -> dict[str, Tensor]:
    """Stacked pairs that begin alike, padded on the right, scored here and there."""
    pairs, length = drawn["pairs"], drawn["length"]
    ids = torch.randint(FIRST_ID, drawn["vocab_size"], (2, pairs, length))
    shared = torch.arange(length) < torch.randint(length, (pairs, 1))
    ids[1] = torch.where(shared, ids[0], ids[1])
    real = torch.arange(length) < torch.randint(2, length + 1, (2, pairs, 1))
    labels = ids.masked_fill(~real | (torch.rand(ids.shape) < drawn["unscored"]), -100)
    nll_labels = labels.clone()
    nll_labels[1] = -100
    labels = labels.masked_fill(shared, -100).flatten(0, 1)
    if drawn["empty"] is not None:
        labels[drawn["empty"]] = -100
    return {
        "input_ids": ids.flatten(0, 1),
        "attention_mask": real.flatten(0, 1).long(),
        "labels": labels,
        "nll_labels": nll_labels.flatten(0, 1),
    }
