"""The fused head equals the model's own logits, log-probs and gradients, family by family."""

import pytest
import torch
import transformers

from orpo_kernels import ORPOLoss
from orpo_kernels.integrations.transformers import fuse_head
from tests.integrations.helpers import BETA, assert_same_step, fused_step, make_batch, unfused_step
from tests.tiny_models import FACTORIES, VOCAB_SIZE, build

# float64 through and through: nothing of a wrong scale, cap, bias or shift hides behind rounding.
TOLERANCE = 1e-9


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", FACTORIES)
def test_equals_the_unfused_model(name: str, tied: bool) -> None:
    model = build(name, tie_word_embeddings=tied).double()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.weight is head.weight) == tied
    batch = make_batch()
    # Gemma 3's multimodal class insists on it in training; all text.
    extra = {"token_type_ids": torch.zeros_like(batch["input_ids"])} if name == "gemma3_vl" else {}
    expected = unfused_step(model, batch, **extra)
    with fuse_head(model, loss=ORPOLoss(BETA), mean_logits=True):
        first = fused_step(model, batch, **extra)
        second = fused_step(model, batch, **extra)  # no self-check in this one
    assert_same_step(first, expected, TOLERANCE)
    assert_same_step(second, expected, TOLERANCE)


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi", "cohere", "qwen2_moe"])
def test_equals_the_unfused_model_in_float32(name: str) -> None:
    model = build(name)
    batch = make_batch()
    expected = unfused_step(model, batch)
    with fuse_head(model, loss=ORPOLoss(BETA), mean_logits=True):
        assert_same_step(fused_step(model, batch), expected)


def test_names_of_the_output() -> None:
    model = build("llama")
    batch = make_batch()
    with fuse_head(model):
        output = model(**batch)
        assert output.loss is None
        assert output.orpo is None
        assert output.mean_logits is None
        assert output.token_logps.dtype == torch.float32
        assert not output.token_logps[:, -1].any()
        assert not output.token_logps[:, :2].any()  # their labels, at 1 and 2, are ignored
        assert (output.token_logps[0, 2:-1] < 0).all()
        batch.pop("nll_labels")
        assert model(**batch).nll_token_logps is None
    with fuse_head(model, loss=ORPOLoss(BETA)):
        orpo = model(**make_batch()).orpo
        assert orpo.chosen_logps.shape == (2,)
        assert torch.equal(model(**make_batch()).loss, orpo.loss)


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_auxiliary_loss_is_added_as_trl_does(name: str) -> None:
    model = build(name)
    batch = make_batch()
    coefficient = model.config.router_aux_loss_coef
    with fuse_head(model, loss=ORPOLoss(BETA)):
        output = model(**batch)
        assert output.aux_loss > 0
        assert torch.allclose(output.loss, output.orpo.loss + coefficient * output.aux_loss)
        # One of two micro-batches: half of its own mean, so that the two sum to a mean.
        output = model(**batch, num_pairs=4, num_nll_tokens=100)
        assert torch.allclose(output.loss, output.orpo.loss + coefficient * output.aux_loss / 2)
        output = model(**batch, output_router_logits=False)
        assert torch.equal(output.loss, output.orpo.loss)


def test_auxiliary_loss_by_the_name_of_its_coefficient_in_jetmoe() -> None:
    config = transformers.JetMoeConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        kv_channels=8, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        output_router_logits=True, aux_loss_coef=0.5, experts_implementation="eager",
    )  # fmt: skip
    model = transformers.JetMoeForCausalLM(config)
    with fuse_head(model, loss=ORPOLoss(BETA)):
        output = model(**make_batch())
    assert torch.allclose(output.loss, output.orpo.loss + 0.5 * output.aux_loss)
    assert output.aux_loss > 0


def test_gradient_accumulation_with_global_counts() -> None:
    model = build("llama").double()
    batch = make_batch(pairs=2)
    whole = unfused_step(model, batch)
    counts = {"num_pairs": 2, "num_nll_tokens": int((batch["nll_labels"][:, 1:] != -100).sum())}
    with fuse_head(model, loss=ORPOLoss(BETA)):
        for pair in (0, 1):
            rows = {k: v[[pair, 2 + pair]] for k, v in batch.items()}
            model(**rows, **counts).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole.gradients[name], rtol=1e-9, atol=1e-12)


def test_auxiliary_loss_of_a_step_without_a_scored_pair_is_finite() -> None:
    model = build("mixtral")
    batch = make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    with fuse_head(model, loss=ORPOLoss(BETA)):
        output = model(**batch, num_pairs=torch.tensor(0), num_nll_tokens=torch.tensor(0))
    assert output.loss == 0
