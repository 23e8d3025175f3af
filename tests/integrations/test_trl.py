"""TRL's own trainer with one method replaced: every number it logs, step by step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, T5Config
from transformers import T5ForConditionalGeneration as T5
from trl.experimental.orpo import ORPOTrainer as TRLTrainer

from orpo_kernels.integrations import trl
from tests.helpers import peak_bytes
from tests.tiny_models import VOCAB_SIZE, build, tiny_tokenizer
from tests.training.runs import CLOCKS, TRLConfig, history, make, pairs, settings

TOLERANCE = 1e-5  # relative where a value is above 1; the largest seen is 2e-6

FAMILIES = {
    "llama": "the plain case",
    "qwen2": "biases in attention",
    "gemma2": "softcap, tied head, scaled embeddings",
    "phi": "bias in the head",
    "gpt2": "learned positions, tied head",
    "cohere": "logit scale",
    "granite": "logit divisor",
    "mixtral": "auxiliary loss",
    "qwen2_moe": "auxiliary loss, shared expert",
}


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    trl.unpatch_trl()


def difference(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> float:
    """Over all logs, |ours - theirs| / max(1, |theirs|); both must log the same names."""
    assert len(ours) == len(theirs) > 5
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        assert set(one) == set(other)
        for name, value in other.items():
            if not name.endswith(CLOCKS):
                assert math.isfinite(value), (name, other)
                worst = max(worst, abs(one[name] - value) / max(1.0, abs(value)))
    return worst


def compare(folder: Path, model: Any = "llama", **options: Any) -> float:
    """TRL's trainer before and after the patch. `model`: a family, or makes the model."""
    logs = []
    for name in ("theirs", "ours"):
        if name == "ours":
            trl.patch_trl()
        torch.manual_seed(0)  # TRL 1.9 draws adapters before it seeds
        start = model if isinstance(model, str) else model()
        logs.append(history(make(folder / name, start, trl=True, **options)))
    return difference(logs[1], logs[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning(family: str, tmp_path: Path) -> None:
    # Micro-batches of different lengths: padding, which the mean logits count, differs.
    assert compare(tmp_path, family, gradient_accumulation_steps=2) < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_lora(family: str, tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.3)
    options = {"peft_config": lora, "gradient_accumulation_steps": 2, "learning_rate": 2e-2}
    assert compare(tmp_path, family, **options) < TOLERANCE


def test_lora_on_the_head(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    assert compare(tmp_path, peft_config=lora, learning_rate=2e-2) < TOLERANCE


def test_qlora(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    # 64: nf4 quantises blocks of 64 weights, and the CPU kernel wants whole ones.
    build("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")

    def nf4() -> Any:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
        )
        return AutoModelForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantization, dtype=torch.float32,
            device_map={"": "cpu"},
        )  # fmt: skip

    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    options = {"peft_config": lora, "gradient_checkpointing": True}
    assert compare(tmp_path, nf4, **options) < TOLERANCE


def test_evaluation(tmp_path: Path) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "eval_dataset": pairs(7, seed=1)}
    assert compare(tmp_path, "qwen2", **options) < TOLERANCE


def test_another_beta_and_padding_value(tmp_path: Path) -> None:
    assert compare(tmp_path, beta=0.7, padding_value=7) < TOLERANCE


def test_the_subclass(tmp_path: Path) -> None:
    theirs = history(make(tmp_path / "theirs", trl=True))
    args = TRLConfig(**settings(tmp_path / "ours"))
    trainer = trl.ORPOTrainer(
        build("llama"), args, train_dataset=pairs(24), processing_class=tiny_tokenizer()
    )
    assert difference(history(trainer), theirs) < TOLERANCE
    assert "fused" not in repr(trainer.model)  # between its calls the model is as it was


def test_one_method_is_replaced_and_put_back() -> None:
    before = dict(vars(TRLTrainer))
    trl.patch_trl()
    trl.patch_trl(mean_logits=False)
    changed = {name for name, value in vars(TRLTrainer).items() if before[name] is not value}
    assert changed == {"concatenated_forward"}
    trl.unpatch_trl()
    trl.unpatch_trl()
    assert dict(vars(TRLTrainer)) == before


def test_a_patch_on_top_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    trl.patch_trl()
    with monkeypatch.context() as patched:
        patched.setattr(TRLTrainer, "concatenated_forward", lambda *_: None)
        with pytest.raises(RuntimeError, match=r"concatenated_forward was replaced again"):
            trl.unpatch_trl()


def test_options_reach_the_head(tmp_path: Path) -> None:
    trl.patch_trl(mean_logits=False, gradient="sparse", eps=1.0)
    trainer = make(tmp_path, trl=True)
    logs = history(trainer)[:5]
    assert all(math.isnan(log["logits/chosen"]) for log in logs)
    calls = vars(trainer)["_orpo_kernels_calls"]
    assert calls._options == {"mean_logits": False, "gradient": "sparse", "eps": 1.0}


def test_no_logits(tmp_path: Path) -> None:
    # V 20,000 with 2 P T of about 160 tokens: their logits are 12 MiB, and their softmax again.
    def peak(patched: bool) -> int:
        if patched:
            trl.patch_trl(workspace_bytes=2**20)
        model = build("llama", vocab_size=20_000)
        model.lm_head.weight.requires_grad_(False)
        trainer = make(tmp_path, model, trl=True, per_device_train_batch_size=4)
        batch = next(iter(trainer.get_train_dataloader()))

        def step() -> None:
            trainer.get_batch_loss_metrics(trainer.model, batch)[0].backward()

        step()  # gradients exist, the self-check is made
        return int(peak_bytes(step))

    theirs, ours = peak(False), peak(True)
    assert ours < 8 * 2**20 < 24 * 2**20 < theirs


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=VOCAB_SIZE, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    trl.patch_trl()
    trainer = make(tmp_path, T5(config), trl=True)
    with pytest.raises(NotImplementedError, match="T5ForConditionalGeneration is an encoder-dec"):
        trainer.train()


def test_empty_answers_are_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path, trl=True)
    batch = next(iter(trainer.get_train_dataloader()))
    batch["rejected_labels"][1] = -100  # as truncation leaves it
    assert math.isnan(trainer.get_batch_loss_metrics(trainer.model, batch)[0])
    trl.patch_trl()
    with pytest.raises(ValueError, match=r"no token of these answers is left in .* rejected 1;"):
        trainer.get_batch_loss_metrics(trainer.model, batch)


def test_another_trl_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TRLTrainer, "odds_ratio_loss", lambda self, logits: logits)
    with pytest.raises(NotImplementedError, match=r"odds_ratio_loss takes \('self', 'logits'\)"):
        trl.patch_trl()
    assert TRLTrainer.concatenated_forward.__module__.startswith("trl.")
