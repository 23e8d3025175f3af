"""What the trainer accepts, refuses, evaluates and reports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
import transformers
from datasets import IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from orpo_kernels import PRESETS
from orpo_kernels.pair_batch import stack_batch
from orpo_kernels.training import ORPOConfig, ORPOTrainer, PreferenceCollator, prepare_dataset
from tests.tiny_models import VOCAB_SIZE, build, tiny_tokenizer
from tests.training.runs import history, make, pairs, settings


class Recorder(TrainerCallback):
    """What a reporting integration gets."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_callbacks_get_plain_numbers(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = make(tmp_path, callbacks=[recorder], logging_steps=2, max_steps=4)
    trainer.train()
    assert len(recorder.logs) == 3  # two windows and the end of training
    for log in recorder.logs:
        assert all(isinstance(value, int | float) for value in log.values())
    assert recorder.logs[-1]["train_tokens"] > 0
    assert recorder.logs[-1]["train_tokens_per_second"] > 0


def test_tokens_are_counted_without_padding(tmp_path: Path) -> None:
    trainer = make(tmp_path, max_steps=2, train_dataset=pairs(4), per_device_train_batch_size=2)
    result = trainer.train()
    rows = trainer.train_dataset
    expected = sum(len(row[f"{s}_labels"]) for row in rows for s in ("chosen", "rejected"))
    assert result.metrics["train_tokens"] == expected


def test_dropout_is_switched_off_everywhere(tmp_path: Path) -> None:
    model = build("opt", dropout=0.5, attention_dropout=0.5)  # numbers on modules
    lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.5)
    trainer = make(tmp_path, model, peft_config=lora)
    first, second = losses(trainer)
    assert torch.equal(first, second)
    trainer = make(tmp_path, build("opt", dropout=0.5), disable_dropout=False)
    first, second = losses(trainer)
    assert not torch.equal(first, second)


def losses(trainer: Any) -> list[torch.Tensor]:
    with trainer.fused_head.active():
        return [trainer.model(**batch(trainer)).loss for _ in range(2)]


def batch(trainer: Any) -> dict[str, torch.Tensor]:
    return trainer.data_collator([trainer.train_dataset[i] for i in range(2)])


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_logits_in_training_and_evaluation(tmp_path: Path) -> None:
    # 5,003 tokens: logits of 4 sequences of 20 tokens would be more than twice the weight (V, H).
    vocabulary = 5003
    trainer = make(
        tmp_path,
        build("llama", vocab_size=vocabulary),
        eval_dataset=pairs(4),
        compute_metrics=lambda prediction: {"pairs": len(prediction.predictions)},
        max_steps=1,
        per_device_eval_batch_size=2,
        optim="sgd",
        workspace_bytes=500_000,
    )
    trainer.train()  # the first call checks two tokens
    for run in (trainer.evaluate, trainer.train):
        with LargestTensor() as largest:
            run()
        assert largest.elements <= vocabulary * 32
    _, output = trainer.compute_loss(trainer.model, batch(trainer), return_outputs=True)
    assert output.logits.shape[-1] == 0


def test_model_is_itself_without_labels(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.train()
    trainer.model.eval()
    ids = torch.tensor([[1, 70, 71]])
    logits = trainer.model(input_ids=ids).logits
    assert logits.shape == (1, 3, VOCAB_SIZE)
    assert trainer.model.generate(ids, max_new_tokens=2, do_sample=False).shape[1] <= 5
    with trainer.fused_head.active():
        assert torch.equal(trainer.model(input_ids=ids).logits, logits)


def test_presets_change_the_loss(tmp_path: Path) -> None:
    losses = {
        preset: history(make(tmp_path, preset=preset, max_steps=1))[0]["nll_loss"]
        for preset in PRESETS
    }
    assert losses["trl"] == losses["paper"]
    assert len(set(losses.values())) == 3


def test_workspace_and_dtype_reach_the_head(tmp_path: Path) -> None:
    options = {"workspace_bytes": 256_000, "compute_dtype": "bfloat16", "log_mean_logits": False}
    log = history(make(tmp_path, max_steps=1, **options))[0]
    reference = history(make(tmp_path, max_steps=1))[0]
    assert "logits/chosen" not in log
    assert log["loss"] != reference["loss"]
    assert log["loss"] == pytest.approx(reference["loss"], rel=0.02)  # bfloat16 logits


def test_bf16_autocast_on_a_cpu(tmp_path: Path) -> None:
    log = history(make(tmp_path, max_steps=2, bf16=True))[0]
    reference = history(make(tmp_path, max_steps=2))[0]
    assert log["loss"] == pytest.approx(reference["loss"], rel=0.02)


def test_evaluation_is_a_mean_over_rows(tmp_path: Path) -> None:
    # 7 rows: the last batch is smaller, and must not weigh as much as a full one.
    metrics = {}
    for size in (1, 3, 7):
        trainer = make(tmp_path, eval_dataset=pairs(7), per_device_eval_batch_size=size)
        metrics[size] = trainer.evaluate()
    names = [n for n in metrics[1] if re.search("rewards|logps/|log_odds", n)]
    assert len(names) == 8
    for name in names:
        assert metrics[3][name] == pytest.approx(metrics[1][name], rel=1e-5)
        assert metrics[7][name] == pytest.approx(metrics[1][name], rel=1e-5)


def test_evaluation_counts_skipped_pairs(tmp_path: Path) -> None:
    trainer = make(tmp_path, eval_dataset=pairs(8), max_length=20)
    metrics = trainer.evaluate()
    assert 0 < metrics["eval_skipped_pairs"] < 8
    assert np.isfinite(metrics["eval_loss"])
    assert np.isfinite(metrics["eval_logps/rejected"])


def test_several_evaluation_sets(tmp_path: Path) -> None:
    sets = {"near": pairs(4), "far": pairs(4, seed=5)}
    trainer = make(tmp_path, eval_dataset=sets, eval_strategy="steps", eval_steps=2, max_steps=2)
    logs = history(trainer)
    assert any("eval_near_rewards/accuracies" in log for log in logs)
    assert any("eval_far_nll_loss" in log for log in logs)
    assert not any("eval_nll_loss" in log for log in logs)


def test_raw_dataset_in_evaluate_and_predict(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    assert np.isfinite(trainer.evaluate(pairs(3))["eval_rewards/margins"])
    prediction = trainer.predict(pairs(3))
    assert prediction.predictions.shape == (3, 2)
    assert prediction.label_ids.tolist() == [0, 0, 0]
    assert np.isfinite(prediction.metrics["test_nll_loss"])


def test_early_stopping_on_reward_accuracy(tmp_path: Path) -> None:
    trainer = make(
        tmp_path,
        eval_dataset=pairs(8, seed=1),
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_rewards/accuracies",
        learning_rate=1e-9,  # nothing gets better
        max_steps=20,
    )
    trainer.train()
    assert trainer.args.greater_is_better
    assert trainer.state.global_step == 3
    assert trainer.state.best_metric == trainer.state.log_history[1]["eval_rewards/accuracies"]


def test_compute_metrics_gets_log_probs(tmp_path: Path) -> None:
    seen = []

    def accuracy(prediction: Any) -> dict[str, float]:
        seen.append(prediction)
        kept = prediction.label_ids != -100
        right = prediction.predictions.argmax(-1) == prediction.label_ids
        return {"mine": float(right[kept].mean())}

    # 20 tokens: some pairs have no answer left.
    trainer = make(tmp_path, eval_dataset=pairs(10), compute_metrics=accuracy, max_length=20)
    metrics = trainer.evaluate()
    assert seen[0].predictions.shape == (10, 2)
    assert set(seen[0].label_ids.tolist()) == {0, -100}
    assert metrics["eval_mine"] == pytest.approx(metrics["eval_rewards/accuracies"])


def test_compute_metrics_that_needs_logits(tmp_path: Path) -> None:
    def perplexity(prediction: Any) -> dict[str, float]:
        return {"x": prediction.predictions[0, 0, prediction.label_ids[0]]}

    trainer = make(tmp_path, eval_dataset=pairs(2), compute_metrics=perplexity)
    with pytest.raises(ValueError, match=r"without logits.*predictions \(N, 2\), the mean log"):
        trainer.evaluate()
    with pytest.raises(NotImplementedError, match="preprocess_logits_for_metrics needs logits"):
        make(tmp_path, preprocess_logits_for_metrics=lambda logits, labels: logits)


@pytest.mark.parametrize("adapter", [True, False])
def test_nothing_trainable_is_refused_before_the_first_step(adapter: bool, tmp_path: Path) -> None:
    model = build("llama").requires_grad_(False)
    remedy = r"model.requires_grad_\(True\), or pass a peft_config"
    if adapter:  # loaded the default way, which is for inference
        get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(
            tmp_path / "adapter"
        )
        model = PeftModel.from_pretrained(build("llama"), tmp_path / "adapter")
        remedy = r"PeftModel.from_pretrained\(..., is_trainable=True\)"
    trainer = make(tmp_path / "run", model, eval_dataset=pairs(4))
    assert trainer.evaluate()["eval_loss"] > 0  # which trains nothing either
    with pytest.raises(ValueError, match=f"nothing is trainable: .*{remedy}"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_frozen_model_from_model_init_is_refused(tmp_path: Path) -> None:
    trainer = make(tmp_path, None, model_init=lambda: build("llama").requires_grad_(False))
    with pytest.raises(ValueError, match="nothing is trainable"):
        trainer.train()


def test_prepared_dataset_and_own_collator(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    prepared = prepare_dataset(pairs(24), tokenizer, max_length=64)
    collator = PreferenceCollator(tokenizer)
    ours = history(make(tmp_path, train_dataset=prepared, data_collator=collator))
    assert ours[0]["loss"] == history(make(tmp_path))[0]["loss"]
    with pytest.raises(ValueError, match=r"nll_scope is 'prompt\+completion' but .* 'completion'"):
        make(tmp_path, data_collator=collator, nll_scope="completion")
    wrong = make(tmp_path, data_collator=lambda rows: {"input_ids": torch.ones(2, 3).long()})
    with pytest.raises(ValueError, match=r"and labels, got \['input_ids'\]; use Pref"):
        wrong.train()
    stacked = make(tmp_path, data_collator=lambda rows: stack_batch(collator(rows)))
    with pytest.raises(ValueError, match=r"must be \(P, 2, T\), .* got \(4, .*; use Pref"):
        stacked.train()


def test_stream(tmp_path: Path) -> None:
    stream = IterableDataset.from_generator(lambda: iter(pairs(12)))
    assert len(history(make(tmp_path, train_dataset=stream, max_steps=2))) == 3


def test_grouping_by_length(tmp_path: Path) -> None:
    trainer = make(tmp_path, train_sampling_strategy="group_by_length", max_steps=2)
    assert len(history(trainer)) == 3


def test_model_by_name(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    trainer = make(
        tmp_path / "run",
        processing_class=None,
        model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "eager"},
        name=str(tmp_path / "model"),
    )
    assert trainer.model.dtype == torch.bfloat16
    assert trainer.processing_class.eos_token == "</s>"
    assert np.isfinite(history(trainer)[0]["loss"])


def test_weights_that_are_not_safetensors_are_refused(tmp_path: Path) -> None:
    model = build("llama")
    model.config.save_pretrained(tmp_path / "model")
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        make(tmp_path / "run", name=str(tmp_path / "model"))


def test_remote_code_is_only_run_when_asked(tmp_path: Path, monkeypatch: Any) -> None:
    asked = []

    def load(name: str, **kwargs: Any) -> Any:
        asked.append(kwargs["trust_remote_code"])
        return build("llama")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    for trust in (False, True):
        make(tmp_path, name="someone/model", trust_remote_code=trust)
    assert asked == [False, True]


def test_model_init(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 2}
    trainer = make(tmp_path, None, model_init=lambda: build("llama"), **options)
    assert history(trainer)[0]["loss"] == history(make(tmp_path, **options))[0]["loss"]


def test_peft_model_given_directly(tmp_path: Path) -> None:
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(build("llama"), lora)
    trainer = make(tmp_path, model)
    before = {n: p.clone() for n, p in model.named_parameters()}
    trainer.train()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if "lora_" in n}
    with pytest.raises(ValueError, match="is a PeftModel and peft_config was passed too; pass the"):
        make(tmp_path, model, peft_config=lora)
    with pytest.raises(TypeError, match=r"peft_config must be a peft.PeftConfig .* got dict"):
        make(tmp_path, peft_config={"r": 2})


def test_models_are_tagged(tmp_path: Path) -> None:
    trainer = make(tmp_path, peft_config=LoraConfig(r=2, target_modules=["q_proj"]))
    assert {"orpo", "orpo-kernels"} <= set(trainer.model.model_tags)


def test_refused_arguments(tmp_path: Path) -> None:
    model, tokenizer = build("llama"), tiny_tokenizer()
    with pytest.raises(TypeError, match="args must be an ORPOConfig, got TrainingArguments"):
        ORPOTrainer(model, TrainingArguments(str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="exactly one of model and model_init"):
        make(tmp_path, None)
    with pytest.raises(ValueError, match="exactly one of model and model_init"):
        make(tmp_path, model_init=lambda: model)
    with pytest.raises(ValueError, match="model_init_kwargs are for a model given by name"):
        make(tmp_path, model_init_kwargs={"dtype": "float32"})
    with pytest.raises(ValueError, match="processing_class is needed"):
        make(tmp_path, processing_class=None)
    with pytest.raises(
        ValueError, match=r"train_dataset must have the columns .*'chosen'. missing"
    ):
        make(tmp_path, train_dataset=pairs(2).remove_columns("chosen"))
    with pytest.raises(ValueError, match=r"eval_dataset\['b'\] has no rows"):
        make(tmp_path, eval_dataset={"a": pairs(2), "b": pairs(2).select([])})
    with pytest.raises(ValueError, match=r"dtype'. must be 'auto' or the name of a torch dtype"):
        make(tmp_path, name="x", model_init_kwargs={"dtype": "float33"})
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="pad token is needed"):
        make(tmp_path, processing_class=tokenizer)
    assert make(tmp_path, processing_class=tokenizer, padding_value=0)


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    model = build("llama", vocab_size=100)
    with pytest.raises(
        ValueError, match=r"vocabulary of 100, got .* in train_dataset from a token"
    ):
        make(tmp_path, model)


def test_encoder_decoder_model(tmp_path: Path) -> None:
    config = transformers.T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, vocab_size=331)
    with pytest.raises(NotImplementedError, match="T5ForConditionalGeneration is an encoder-deco"):
        make(tmp_path, transformers.T5ForConditionalGeneration(config))


def test_default_arguments(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    trainer = ORPOTrainer(build("llama"), processing_class=tiny_tokenizer())
    assert isinstance(trainer.args, ORPOConfig)
    assert settings(tmp_path)["max_length"] != trainer.args.max_length
