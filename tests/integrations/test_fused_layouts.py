"""A model computes in rows what it computes padded, family by family, and every gradient."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from orpo_kernels import ORPOLoss
from orpo_kernels.integrations.transformers import fuse_head
from orpo_kernels.layout import BatchLayout
from tests.integrations.helpers import BETA, assert_same_step, fused_step, unfused_step
from tests.integrations.layouts import ragged_pairs
from tests.tiny_models import FACTORIES, build

LAYOUTS = ("packed", "shared_prompt")
NO_DROPOUT = {
    "gpt2": {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
    "opt": {"dropout": 0.0},
}
# Windows of 8 tokens, where the family has one: every row of `ragged_pairs` is longer.
WINDOWS = {name: {"sliding_window": 8} for name in ("mistral", "gemma2", "gemma3", "phi3")}
SDPA = [name for name in FACTORIES if name != "gemma2"]  # whose softcap sdpa does not have


def model_of(name, attention, **changes):
    changes = {**NO_DROPOUT.get(name, {}), **WINDOWS.get(name, {}), **changes}
    model = build(name, attn_implementation=attention, **changes)
    if "_vl" in name:  # whose tests fix the attention
        model.set_attn_implementation(attention)
    return model


def extra_of(name, batch):
    # Gemma 3's multimodal class insists on it in training; all text.
    return {"token_type_ids": torch.zeros_like(batch["input_ids"])} if name == "gemma3_vl" else {}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("name", "attention"),
    [*((name, "eager") for name in FACTORIES), *((name, "sdpa") for name in SDPA)],
)
def test_equals_the_unfused_model(name, attention, layout):
    model, batch = model_of(name, attention), ragged_pairs()
    extra = extra_of(name, batch)
    expected = unfused_step(model, batch, **extra)
    with fuse_head(model, loss=ORPOLoss(BETA), layout=layout):
        first = fused_step(model, batch, **extra)
        second = fused_step(model, batch, **extra)  # neither self-check in this one
    assert_same_step(first, expected)
    assert_same_step(second, expected)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "phi"])
def test_mean_logits_are_over_tokens(name, layout):
    # opt and phi: a position table, and a head with a bias, whose padding is not 0.
    model, batch = model_of(name, "eager"), ragged_pairs()
    with torch.no_grad():
        logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1].mean(-1)
        real = batch["attention_mask"][:, :-1]
        expected = (logits * real).sum(1) / real.sum(1)
        with fuse_head(model, loss=ORPOLoss(BETA), layout=layout, mean_logits=True):
            means = model(**batch).mean_logits
    torch.testing.assert_close(means, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_lora_checkpointing_and_a_second_adapter(layout):
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    torch.manual_seed(0)
    model, batch = get_peft_model(model_of("llama", "sdpa"), config), ragged_pairs()
    expected = unfused_step(model, batch)
    for reentrant in (False, True):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with fuse_head(model, loss=ORPOLoss(BETA), layout=layout):
            assert_same_step(fused_step(model, batch, use_cache=False), expected)


def test_a_limit_of_the_row():
    model, batch = model_of("llama", "sdpa"), ragged_pairs()
    expected = unfused_step(model, batch)
    rows = {}
    for limit in (1, 80, 1000):
        with fuse_head(model, loss=ORPOLoss(BETA), layout=BatchLayout("shared_prompt", limit)):
            assert_same_step(fused_step(model, batch), expected)
            rows[limit] = int(model(**batch).layout_terms["computed_tokens"])
    # Pieces of 69, 40, 12, 11, 11 and 5, pairs that share one token or none in two: in rows as long
    # as the longest, or in two of 74; one of 148 would cost more by its mask.
    assert rows == {1: 3 * 69, 80: 2 * 74, 1000: 2 * 74}


def test_pairs_travel_as_ever():
    model, batch = model_of("llama", "sdpa"), ragged_pairs()
    pairs = len(batch["labels"]) // 2
    in_pairs = {k: torch.stack((v[:pairs], v[pairs:]), 1) for k, v in batch.items()}
    with fuse_head(model, loss=ORPOLoss(BETA)):
        expected = model(**in_pairs)
    with fuse_head(model, loss=ORPOLoss(BETA), layout="shared_prompt"):
        output = model(**in_pairs)
        assert output.token_logps.shape == in_pairs["labels"].shape
        torch.testing.assert_close(output.token_logps, expected.token_logps)
        first, second = ({k: v[s] for k, v in in_pairs.items()} for s in (slice(1), slice(1, None)))
        cut = [model(**part).token_logps for part in (first, second)]
    torch.testing.assert_close(torch.cat(cut), expected.token_logps)


def test_what_the_layout_saved_is_on_the_output():
    model, batch = model_of("llama", "sdpa"), ragged_pairs()
    with fuse_head(model, loss=ORPOLoss(BETA), layout="shared_prompt"):
        terms = model(**batch).layout_terms
    assert {name: term.tolist() for name, term in terms.items()} == {
        "computed_tokens": [2 * 74],  # see above
        "padded_tokens": [batch["labels"].numel()],
        "unshared_pairs": [2],
    }
    with fuse_head(model, loss=ORPOLoss(BETA)):
        assert model(**batch).layout_terms is None


def test_hidden_states_and_router_logits_come_back_padded():
    model, batch = model_of("mixtral", "sdpa"), ragged_pairs()
    asked = {"output_hidden_states": True, "output_router_logits": True}
    with fuse_head(model, loss=ORPOLoss(BETA)):
        expected = model(**batch, **asked)
    with fuse_head(model, loss=ORPOLoss(BETA), layout="shared_prompt"):
        output = model(**batch, **asked)
    real = batch["attention_mask"].bool()
    for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours[real], theirs[real])
        assert not ours[~real].any()
    for ours, theirs in zip(output.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(ours[real.flatten()], theirs[real.flatten()])


def test_the_model_is_as_it_was_afterwards():
    model, batch = model_of("mistral", "sdpa"), ragged_pairs()
    modules = [model, model.model, model.lm_head]
    before = [set(module.__dict__) for module in modules]
    fused = fuse_head(model, loss=ORPOLoss(BETA), layout="packed")
    model(**batch)
    assert "forward" in model.model.__dict__
    fused.unfuse()
    assert [set(module.__dict__) for module in modules] == before
    assert model.config.sliding_window == 8  # the check makes it smaller
    with fused.active():
        model(**batch)
    assert [set(module.__dict__) for module in modules] == before


def test_a_sparse_gradient_and_nll_labels_of_their_own():
    model, batch = model_of("llama", "sdpa"), ragged_pairs()
    for options in ({"gradient": "sparse"}, {"workspace_bytes": 2**20}):
        with fuse_head(model, loss=ORPOLoss(BETA), **options):
            expected = fused_step(model, batch)
        with fuse_head(model, loss=ORPOLoss(BETA), layout="shared_prompt", **options):
            assert_same_step(fused_step(model, batch), expected, 2e-5)
