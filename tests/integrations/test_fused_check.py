"""The self-check finds a transform that the config does not name; what cannot work is refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from orpo_kernels import ORPOLoss
from orpo_kernels.integrations.head import LogitTransform, logit_transforms
from orpo_kernels.integrations.transformers import fuse_head
from tests.integrations.helpers import (
    BETA,
    assert_near,
    assert_same_step,
    fused_step,
    make_batch,
    unfused_step,
)
from tests.tiny_models import VOCAB_SIZE, build

LOSS = ORPOLoss(BETA)


class NormalisedHead(nn.Linear):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(F.normalize(hidden, dim=-1))


class UnknownScale(transformers.LlamaForCausalLM):
    factor = 0.9

    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output.logits = output.logits * self.factor
        return output


class UnknownBias(transformers.LlamaForCausalLM):
    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output.logits = output.logits + torch.linspace(0, 0.1, output.logits.shape[-1])
        return output


class UnknownSoftcap(transformers.LlamaForCausalLM):
    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output.logits = 30.0 * torch.tanh(output.logits / 30.0)
        return output


class TrimmedVocabulary(transformers.LlamaForCausalLM):
    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output.logits = output.logits[..., : VOCAB_SIZE - 3]
        return output


class MaskedVocabulary(transformers.LlamaForCausalLM):
    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        output.logits = output.logits.clone()
        output.logits[..., 5:150] = -torch.inf
        return output


class OwnLogits(transformers.LlamaForCausalLM):
    def forward(self, input_ids: Tensor, **inputs: Any) -> Any:
        hidden = self.model(input_ids=input_ids).last_hidden_state
        logits = hidden @ self.lm_head.weight.T
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)


class TwoHeads(transformers.LlamaForCausalLM):
    def forward(self, **inputs: Any) -> Any:
        output = super().forward(**inputs)
        self.lm_head(torch.zeros(1, 1, self.config.hidden_size))
        return output


def recast(kind: type[nn.Module]) -> nn.Module:
    model = build("llama")
    model.__class__ = kind
    return model


@pytest.mark.parametrize("kind", [UnknownScale, UnknownBias, MaskedVocabulary])
def test_a_transform_that_no_config_names_is_refused(kind: type[nn.Module]) -> None:
    model = recast(kind)
    batch = make_batch()
    with fuse_head(model, loss=LOSS):
        for _ in range(2):  # refused for good, not only once
            with pytest.raises(
                RuntimeError, match=rf"logits of {kind.__name__}: .* train this model"
            ):
                model(**batch)
        assert model(input_ids=batch["input_ids"]).logits.shape[-1] == VOCAB_SIZE


def test_a_norm_inside_the_head_is_refused() -> None:
    model = build("llama")
    model.lm_head.__class__ = NormalisedHead
    with fuse_head(model, loss=LOSS), pytest.raises(RuntimeError, match="LlamaForCausalLM"):
        model(**make_batch())


def test_a_trimmed_vocabulary_is_refused() -> None:
    model = recast(TrimmedVocabulary)
    with (
        fuse_head(model, loss=LOSS),
        pytest.raises(RuntimeError, match=r"TrimmedVocabulary turned"),
    ):
        model(**make_batch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_softcap_is_seen_however_small_the_logits(dtype: torch.dtype) -> None:
    # Logits of 1e-3, as at initialisation, are changed by 1e-12 under a cap of 30.
    model = recast(UnknownSoftcap).to(dtype)
    model.lm_head.weight.data.mul_(1e-3)
    with fuse_head(model), pytest.raises(RuntimeError, match="UnknownSoftcap"):
        model(**make_batch())


def test_check_can_be_switched_off() -> None:
    model = recast(UnknownScale)
    plain = unfused_step(build("llama"), make_batch())
    with fuse_head(model, loss=LOSS, check=False):
        assert_near("loss", model(**make_batch()).loss, plain.loss, 1e-5)  # the config's objective


def test_a_head_that_is_not_called_or_called_twice_is_refused() -> None:
    with (
        fuse_head(recast(OwnLogits)) as fused,
        pytest.raises(RuntimeError, match=r"OwnLogits\.forward"),
    ):
        fused.model(**make_batch())
    with fuse_head(recast(TwoHeads)) as fused, pytest.raises(NotImplementedError, match="twice"):
        fused.model(**make_batch())


def test_the_check_draws_no_random_number_and_runs_no_second_forward() -> None:
    model = build("gpt2")  # dropout 0.1 everywhere
    calls = []
    model.transformer.register_forward_hook(lambda *_: calls.append(None))
    states = []
    for check in (True, False):
        with fuse_head(model, check=check):
            torch.manual_seed(0)
            model(**make_batch())
            states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert len(calls) == 2
    assert model.training


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("cohere", lambda model: setattr(model, "logit_scale", 0.5)),
        ("granite", lambda model: setattr(model.config, "logits_scaling", 2.0)),
        ("gemma2", lambda model: setattr(model.config, "final_logit_softcapping", None)),
    ],
)
def test_a_transform_that_changes_after_the_check_is_noticed(
    name: str, change: Any, check: bool
) -> None:
    model, batch = build(name), make_batch()
    with fuse_head(model, loss=LOSS, mean_logits=True, check=check):
        before = fused_step(model, batch)
        change(model)
        after = fused_step(model, batch)
    expected = unfused_step(model, batch)
    assert_same_step(after, expected)
    assert abs(float(before.loss - expected.loss)) > 1e-2


def test_a_hook_on_the_head_that_comes_after_the_check_is_noticed() -> None:
    model = build("llama")
    with fuse_head(model, loss=LOSS):
        model(**make_batch())
        hook = model.lm_head.register_forward_hook(lambda _, inputs, logits: 0.5 * logits)
        with pytest.raises(RuntimeError, match="does not reproduce the logits of Llama"):
            model(**make_batch())
        hook.remove()
        model(**make_batch())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_logits_that_are_not_finite_are_no_other_objective(dtype: torch.dtype) -> None:
    model = build("llama").to(dtype)
    value = torch.nan if dtype == torch.float32 else 3e4  # overflows beneath the head
    model.model.norm.weight.data.fill_(value)
    with fuse_head(model), pytest.raises(RuntimeError, match="NaN or infinite, fused or not"):
        model(**make_batch())


@pytest.mark.parametrize("all_ignored", [True, False])
def test_one_or_no_scored_token_is_enough_for_the_check(all_ignored: bool) -> None:
    model = recast(UnknownScale)
    batch = make_batch()
    batch["labels"] = torch.full_like(batch["labels"], -100)
    if not all_ignored:
        batch["labels"][0, 5] = 7
    with fuse_head(model), pytest.raises(RuntimeError, match="UnknownScale"):
        model(**batch)


def test_readings_of_a_config() -> None:
    assert logit_transforms(build("llama")) == [LogitTransform()]
    assert logit_transforms(build("cohere"))[0] == LogitTransform(0.25)
    assert logit_transforms(build("granite"))[0] == LogitTransform(0.25)
    assert logit_transforms(build("gemma2"))[0] == LogitTransform(1.0, 2.0)
    assert logit_transforms(build("gemma3_vl"))[0] == LogitTransform(1.0, 3.0)  # nested config


SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    ("config", "settings", "expected"),
    [
        # multiplies by the key that Granite divides by
        ("HyperCLOVAXConfig", {"logits_scaling": 4.0}, LogitTransform(4.0)),
        ("NanoChatConfig", {"final_logit_softcapping": 5.0}, LogitTransform(1.0, 5.0)),
        # its third layer is the first with attention
        (
            "RecurrentGemmaConfig",
            {"logits_soft_cap": 5.0, "num_hidden_layers": 3},
            LogitTransform(1.0, 5.0),
        ),
        # divides the hidden states before the head by hidden_size / dim_model_base = 4
        ("MiniCPM3Config", {"dim_model_base": 8, "qk_rope_head_dim": 8}, LogitTransform()),
    ],
)
def test_transforms_of_other_families(
    config: str, settings: dict[str, Any], expected: LogitTransform
) -> None:
    kind = getattr(transformers, config, None)
    if kind is None:
        pytest.skip(f"this transformers has no {config}")
    model = transformers.AutoModelForCausalLM.from_config(kind(**{**SMALL, **settings})).train()
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    batch = make_batch()
    step = unfused_step(model, batch)
    for check in (True, False):  # known by name
        with fuse_head(model, loss=LOSS, check=check) as fused:
            assert_same_step(fused_step(model, batch), step)
            assert fused.transform == expected


def test_encoder_decoder_is_refused() -> None:
    config = transformers.T5Config(
        vocab_size=64,
        d_model=8,
        d_kv=4,
        d_ff=8,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    with pytest.raises(
        NotImplementedError, match="T5ForConditionalGeneration is an encoder-decoder"
    ):
        fuse_head(transformers.T5ForConditionalGeneration(config))


def test_a_model_without_head_is_refused() -> None:
    config = build("llama").config
    config.num_labels = 2
    for kind in (transformers.LlamaForSequenceClassification, transformers.LlamaModel):
        with pytest.raises(NotImplementedError, match=f"{kind.__name__} has no output head"):
            fuse_head(kind(config))
    with pytest.raises(NotImplementedError, match="Linear has no output head"):
        fuse_head(nn.Linear(2, 2))


def test_a_head_that_is_no_linear_is_refused() -> None:
    model = build("llama")
    model.lm_head = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, VOCAB_SIZE))
    with pytest.raises(NotImplementedError, match=r"LlamaForCausalLM is a torch.nn.*Sequential"):
        fuse_head(model)


@pytest.mark.parametrize("kind", ["Linear4bit", "Linear8bitLt"])
def test_a_quantised_head_is_refused(kind: str) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = build("llama")
    options = {} if kind == "Linear4bit" else {"has_fp16_weights": False}
    head = getattr(bitsandbytes.nn, kind)(32, VOCAB_SIZE, bias=False, **options)
    head.load_state_dict(model.lm_head.state_dict())
    model.lm_head = head.to("cpu")
    with pytest.raises(NotImplementedError, match=rf"quantised \(bitsandbytes.*{kind}"):
        fuse_head(model)


def test_data_parallel_and_options_of_the_loss_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="DistributedDataParallel"):
        fuse_head(nn.DataParallel(build("llama")))
    with pytest.raises(ValueError, match="logit_scale"):
        fuse_head(build("llama"), loss=ORPOLoss(logit_scale=2.0))


def test_a_reduced_compute_dtype_is_no_mismatch():
    # float32 weights, GEMMs asked for in bf16: off by 0.07 nats at logits of 64, and on purpose.
    model = build("llama")
    fuse_head(model, compute_dtype=torch.bfloat16)
    ids = torch.randint(0, VOCAB_SIZE, (2, 5))
    output = model(input_ids=ids, labels=ids)
    assert torch.isfinite(output.token_logps).all()
