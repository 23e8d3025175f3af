"""The fused head under PEFT: adapters on the body, copies of the head, and LoRA on the head."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from orpo_kernels import ORPOLoss
from orpo_kernels.integrations.transformers import fuse_head
from tests.integrations.helpers import (
    BETA,
    Step,
    assert_near,
    assert_same_step,
    fused_step,
    make_batch,
    unfused_step,
)
from tests.tiny_models import VOCAB_SIZE, build

peft = pytest.importorskip("peft")

# An adapter on one side of tied weights is what some tests are about.
pytestmark = pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")

LOSS = ORPOLoss(BETA)
BODY = ["q_proj", "v_proj", "down_proj"]


def randomised(model: nn.Module) -> nn.Module:
    """LoRA's B starts at zero, which would hide everything it does, and A's gradient."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.2)
    return model


def with_lora(name: str = "llama", tied: bool = False, **settings: Any) -> nn.Module:
    model = build(name, tie_word_embeddings=tied)
    return randomised(peft.get_peft_model(model, peft.LoraConfig(r=3, lora_alpha=7, **settings)))


def both_steps(model: nn.Module, **options: Any) -> tuple[Step, Step]:
    batch = make_batch()
    expected = unfused_step(model, batch)
    with fuse_head(model, loss=LOSS, mean_logits=True, **options):
        return fused_step(model, batch), expected


@pytest.mark.parametrize("fuse_first", [True, False])
def test_lora_on_the_body(fuse_first: bool) -> None:
    base = build("llama")
    if fuse_first:
        fused = fuse_head(base, loss=LOSS)
    model = randomised(peft.get_peft_model(base, peft.LoraConfig(target_modules=BODY)))
    if not fuse_first:
        fused = fuse_head(model, loss=LOSS)
    assert fused.model is base
    assert "fused" in repr(base)
    assert "fused" in repr(model)
    batch = make_batch()
    ours = fused_step(model, batch)
    through_base = base(**batch).loss  # PEFT itself skips the base model's __call__
    fused.unfuse()
    assert_same_step(ours, unfused_step(model, batch))
    assert all("lora_" in name for name in ours.gradients)
    assert torch.equal(through_base.detach(), ours.loss)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_modules_to_save_trains_the_active_copy_only(tied: bool) -> None:
    model = with_lora(tied=tied, target_modules=BODY, modules_to_save=["lm_head"])
    copy = model.base_model.model.lm_head.modules_to_save["default"]
    copy.weight.data.mul_(1.5)  # apart from the original
    ours, expected = both_steps(model)
    assert_same_step(ours, expected)
    heads = [name for name in ours.gradients if "lm_head" in name]
    assert heads == ["base_model.model.lm_head.modules_to_save.default.weight"]
    with model.disable_adapter():
        inputs = make_batch()
        expected = unfused_step_logps(model, inputs)
        with fuse_head(model):
            assert_near("original copy", model(**inputs).token_logps, expected, 1e-5)


def unfused_step_logps(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {k: v for k, v in batch.items() if k not in ("labels", "nll_labels")}
    logps = model(**inputs).logits[:, :-1].log_softmax(-1)
    target = batch["labels"][:, 1:]
    picked = logps.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return torch.nn.functional.pad(picked.masked_fill(target == -100, 0.0), (0, 1)).detach()


@pytest.mark.parametrize(
    ("name", "tied", "settings"),
    [
        ("llama", False, {}),
        ("llama", True, {}),  # the term is the head's alone, the weight is shared
        ("gemma2", True, {}),  # softcap over the sum
        ("cohere", True, {}),  # scale over the sum
        ("phi", False, {"lora_bias": True}),  # lora_B has a bias beside the head's own
        ("llama", False, {"use_rslora": True}),
    ],
)
def test_lora_on_the_head(name: str, tied: bool, settings: dict[str, Any]) -> None:
    body = ["q_proj", "v_proj"]
    model = with_lora(name, tied, target_modules=[*body, "lm_head"], **settings)
    ours, expected = both_steps(model)
    assert_same_step(ours, expected)
    heads = sorted(n for n in ours.gradients if "lm_head" in n and n.endswith("weight"))
    assert [n.split(".")[-3] for n in heads] == ["lora_A", "lora_B"]
    assert all(ours.gradients[n].abs().max() > 1e-4 for n in heads)


def test_lora_dropout_on_the_head_draws_the_same_mask() -> None:
    model = with_lora(target_modules=["lm_head"], lora_dropout=0.5)
    ours, expected = both_steps(model)
    assert_same_step(ours, expected)
    assert model.base_model.model.lm_head.lora_dropout["default"].training
    with_other_mask = unfused_step(model, make_batch(), seed=1)
    assert not torch.allclose(with_other_mask.token_logps, expected.token_logps)


def test_several_adapters_on_the_head() -> None:
    model = with_lora(target_modules=["lm_head", "q_proj"])
    model.add_adapter("second", peft.LoraConfig(r=5, target_modules=["lm_head"]))
    model.add_adapter("elsewhere", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    randomised(model).base_model.set_adapter(["default", "second", "elsewhere"])
    ours, expected = both_steps(model)
    assert_same_step(ours, expected)
    assert sum("lm_head" in name for name in ours.gradients) == 4  # A and B of two


def test_disabled_and_merged_adapters_on_the_head() -> None:
    model = with_lora(target_modules=["lm_head"])
    batch = make_batch()
    active = unfused_step_logps(model, batch)
    with fuse_head(model):
        with model.disable_adapter():
            disabled = model(**batch).token_logps
        assert_near("active", model(**batch).token_logps, active, 1e-5)
        model.merge_adapter()
        assert_near("merged", model(**batch).token_logps, active, 1e-5)
        with model.disable_adapter():  # PEFT unmerges on the way
            again = model(**batch).token_logps
        assert_near("unmerged", again, disabled, 1e-5)
    with model.disable_adapter():
        assert_near("disabled", disabled, unfused_step_logps(model, batch), 1e-5)
    assert not torch.allclose(disabled, active)


def test_lora_on_the_head_added_to_a_fused_model() -> None:
    base = build("llama")
    with fuse_head(base, loss=LOSS, mean_logits=True):
        base(**make_batch())
        config = peft.LoraConfig(target_modules=["lm_head"])
        model = randomised(peft.get_peft_model(base, config))
        ours = fused_step(model, make_batch())
    assert_same_step(ours, unfused_step(model, make_batch()))


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_base_with_float32_adapters_on_the_head(autocast: bool) -> None:
    model = build("llama").to(torch.bfloat16)
    model = randomised(peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"])))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, expected = both_steps(model)
    # Logits of size 4 are rounded to 2^-8 of themselves by the model: 0.02 nats.
    assert_near("token_logps", ours.token_logps, expected.token_logps, 0.03)
    assert {g.dtype for g in ours.gradients.values()} == {torch.float32}


def test_adapters_and_hidden_states_in_another_16_bit_dtype_than_autocasts() -> None:
    # A bfloat16 checkpoint trained with fp16=True. Autocast joins no tensors of a third dtype.
    small = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1}
    mamba = transformers.MambaForCausalLM(transformers.MambaConfig(**small))
    config = peft.LoraConfig(target_modules=["lm_head"])
    for model in (mamba, randomised(peft.get_peft_model(build("llama"), config))):
        with torch.autocast("cpu", torch.float16):
            ours, expected = both_steps(model.to(torch.bfloat16))
        assert_near("token_logps", ours.token_logps, expected.token_logps, 0.03)
        assert {g.dtype for g in ours.gradients.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: peft.LoraConfig(target_modules=["lm_head"], use_dora=True), "DoraLinearVariant"),
        (lambda: peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]), "ia3"),
        (lambda: peft.LoHaConfig(target_modules=["lm_head"]), "loha"),
        (
            lambda: peft.LoraConfig(target_modules=BODY, trainable_token_indices={"lm_head": [7]}),
            "TrainableTokensWrapper",
        ),
        (
            lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "'default' is PromptTuningConfig",
        ),
        (
            lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
            "'default' is PrefixTuningConfig",
        ),
    ],
)
def test_other_adapters_are_refused_by_name(config: Any, message: str) -> None:
    model = peft.get_peft_model(build("llama"), config())
    with pytest.raises(NotImplementedError, match=message):
        fuse_head(model)


def test_an_adapter_that_keeps_the_forward_is_put_on_a_fused_model_only() -> None:
    base, batch = build("llama"), make_batch()
    config = peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=1, task_type="CAUSAL_LM")
    fused = fuse_head(base, loss=LOSS, mean_logits=True)
    model = peft.get_peft_model(base, config)
    ours = fused_step(model, batch)
    fused.unfuse()
    assert_same_step(ours, unfused_step(model, batch))
    model = peft.get_peft_model(build("llama"), config)
    with pytest.raises(NotImplementedError, match=r"AdaptionPromptModel kept the forward .* first"):
        fuse_head(model, loss=LOSS)


def test_mixed_batches_of_adapters_are_refused() -> None:
    model = with_lora(target_modules=["lm_head"]).eval()
    with fuse_head(model), pytest.raises(NotImplementedError, match="adapter_names"):
        model(**make_batch(), adapter_names=["default"] * 4)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    # 64: nf4 blocks hold 64 weights
    build("llama", hidden_size=64, intermediate_size=64).save_pretrained(path)
    return path


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("target", [BODY, [*BODY, "lm_head"]], ids=["body", "head"])
def test_nf4_base(saved_model: Path, target: list[str], autocast: bool) -> None:
    pytest.importorskip("bitsandbytes")
    quantised = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if autocast else torch.float32,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(
        saved_model, quantization_config=quantised, dtype=torch.bfloat16
    )
    model = peft.prepare_model_for_kbit_training(
        model, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    assert type(model.model.layers[0].mlp.down_proj).__name__ == "Linear4bit"
    assert model.lm_head.weight.dtype == torch.float32
    model = randomised(peft.get_peft_model(model, peft.LoraConfig(target_modules=target))).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours, expected = both_steps(model)
    if autocast:  # the unfused log-probs, down to -11, are bfloat16: neighbours are 1/16 apart
        assert_near("logps", ours.token_logps, expected.token_logps, 1 / 16)
        assert ours.gradients.keys() == expected.gradients.keys()
    else:
        assert_same_step(ours, expected)
