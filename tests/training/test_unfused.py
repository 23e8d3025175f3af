"""ORPOTrainer fuses the head for its own calls: everybody else sees the model that was given."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, pipeline

from orpo_kernels import ORPOLoss, fuse_head
from orpo_kernels.integrations.override import ForwardOverride
from orpo_kernels.integrations.peft import base_model
from tests.tiny_models import build, tiny_tokenizer
from tests.training.runs import history, make, pairs

EVENTS = (
    "on_train_begin", "on_step_begin", "on_pre_optimizer_step", "on_optimizer_step",
    "on_substep_end", "on_step_end", "on_prediction_step", "on_evaluate", "on_log", "on_save",
    "on_epoch_end", "on_train_end",
)  # fmt: skip


def ids_of(rows: int) -> Tensor:
    """(rows, 6); 1 and 3 rows are no pairs, 2 and 4 would pass for pairs."""
    return torch.randint(5, 300, (rows, 6), generator=torch.Generator().manual_seed(rows))


def assert_unfused(model: nn.Module) -> None:
    """Called with labels, any number of rows, it returns logits and their cross entropy."""
    for rows in (1, 2, 3, 4):
        ids = ids_of(rows)
        with torch.no_grad():
            output = model(input_ids=ids, labels=ids)
            logits = model(input_ids=ids).logits
        assert type(output).__name__ == "CausalLMOutputWithPast"
        expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert torch.equal(output.logits, logits)
        torch.testing.assert_close(output.loss, expected)
    assert "fused" not in repr(model)
    causal_lm = base_model(model)
    for module in causal_lm.modules():
        assert "forward" not in module.__dict__
    assert "accepts_loss_kwargs" not in causal_lm.__dict__


class Looks(TrainerCallback):
    """Looks at the model whenever it is shown to a callback."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        for event in EVENTS:
            setattr(self, event, self._look(event))

    def _look(self, event: str) -> Callable[..., None]:
        def look(args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            self.seen.add(event)
            assert_unfused(model)

        return look


@pytest.mark.parametrize("peft", [None, ["q_proj"], ["lm_head"]], ids=["full", "lora", "head"])
def test_callbacks_and_afterwards(peft: list[str] | None, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "max_steps": 2, "gradient_accumulation_steps": 2, "eval_dataset": pairs(4),
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
        "load_best_model_at_end": True,
        "peft_config": None if peft is None else LoraConfig(target_modules=peft),
    }  # fmt: skip
    looks = Looks()
    trainer = make(tmp_path / "a", callbacks=[looks], **options)
    assert_unfused(trainer.model)
    logs = history(trainer)
    assert looks.seen == set(EVENTS)
    assert_unfused(trainer.model)
    trainer.evaluate()
    assert_unfused(trainer.model)
    trainer.predict(pairs(3))
    assert_unfused(trainer.model)
    alone = history(make(tmp_path / "b", **options))  # looking changes nothing
    assert [log.get("loss") for log in logs] == [log.get("loss") for log in alone]


class OnPurpose(BaseException):
    """Not an Exception: what KeyboardInterrupt is."""


@pytest.mark.parametrize("place", ["forward", "backward", "callback", "collator", "evaluation"])
def test_whatever_is_raised(place: str, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise OnPurpose

    trainer = make(tmp_path, eval_dataset=pairs(4))
    norm = trainer.model.model.norm
    hooks = []
    if place in ("forward", "evaluation"):
        hooks.append(norm.register_forward_hook(fail))
    elif place == "backward":
        hooks.append(norm.register_full_backward_hook(fail))
    elif place == "callback":
        callback = TrainerCallback()
        callback.on_step_end = fail
        trainer.add_callback(callback)
    else:
        trainer.data_collator = fail
    with pytest.raises(OnPurpose):
        (trainer.evaluate if place == "evaluation" else trainer.train)()
    for hook in hooks:
        hook.remove()
    assert_unfused(trainer.model)


def test_a_model_that_the_user_has_fused_stays_fused(tmp_path: Path) -> None:
    model = build("llama")
    with fuse_head(model, loss=ORPOLoss(5.0)) as theirs:
        forward = model.__dict__["forward"]
        trainer = make(tmp_path, model, max_steps=1, beta=0.1)
        log = history(trainer)[0]
        assert model.__dict__["forward"] is forward
        assert theirs.is_fused
        with torch.no_grad():
            orpo = model(input_ids=ids_of(2), labels=ids_of(2)).orpo
        assert float((orpo.loss - orpo.nll_loss) / orpo.or_loss) == pytest.approx(5.0, rel=1e-3)
    assert log["loss"] == history(make(tmp_path / "b", max_steps=1))[0]["loss"]
    assert_unfused(model)


def test_two_trainers_on_one_model(tmp_path: Path) -> None:
    model = build("llama")
    trainers = [make(tmp_path / str(beta), model, max_steps=1, beta=beta) for beta in (0.1, 3.0)]
    losses = [trainer.evaluate(pairs(4))["eval_loss"] for trainer in (*trainers, trainers[0])]
    assert losses[0] == losses[2] != losses[1]
    with trainers[1].fused_head.active():
        batch = trainers[1].data_collator([trainers[1].train_dataset[0]])
        assert model(**batch).orpo is not None
    assert_unfused(model)


def test_a_model_of_model_init(tmp_path: Path) -> None:
    made = []

    def model_init() -> nn.Module:
        made.append(build("llama"))
        return made[-1]

    trainer = make(tmp_path, None, model_init=model_init, max_steps=1, callbacks=[Looks()])
    trainer.train()
    trainer.train()
    assert len(made) == 3
    assert trainer.model is made[-1]
    for model in made:
        assert_unfused(model)


def trained(folder: Path, **options: Any) -> Any:
    trainer = make(folder, max_steps=2, **options)
    trainer.train()
    return trainer


def test_plain_fine_tuning_afterwards(tmp_path: Path) -> None:
    model = trained(tmp_path).model
    twin = build("llama")
    twin.load_state_dict(model.state_dict())

    def collate(rows: list[Tensor]) -> dict[str, Tensor]:
        return {"input_ids": torch.stack(rows), "labels": torch.stack(rows)}

    def losses(model: nn.Module, name: str) -> list[float]:
        args = TrainingArguments(
            str(tmp_path / name), use_cpu=True, max_steps=3, logging_steps=1, report_to="none",
            per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="no",
            disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model, args, data_collator=collate, train_dataset=list(ids_of(16)))
        return [log["loss"] for log in history(trainer) if "loss" in log]

    assert losses(model, "after") == losses(twin, "twin")


def test_export_copies_and_pipelines_afterwards(tmp_path: Path) -> None:
    trainer = trained(tmp_path)
    model = trainer.model.eval()
    ids = ids_of(1)
    logits = model(input_ids=ids).logits
    program = torch.export.export(
        model, (), {"input_ids": ids, "use_cache": False}, strict=False
    ).module()
    torch.testing.assert_close(program(input_ids=ids, use_cache=False).logits, logits)
    assert_unfused(copy.deepcopy(model))
    trainer.save_model(str(tmp_path / "saved"))
    assert_unfused(type(model).from_pretrained(tmp_path / "saved"))
    text = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer(), device="cpu")
    assert text("the dog", max_new_tokens=2, do_sample=False)[0]["generated_text"]
    assert_unfused(model)


@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_merged_adapters_afterwards(target: str, tmp_path: Path) -> None:
    lora = LoraConfig(target_modules=[target])
    model = trained(tmp_path, peft_config=lora, learning_rate=0.1).model
    assert isinstance(model, PeftModel)
    model.eval()
    logits = model(input_ids=ids_of(2)).logits
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(input_ids=ids_of(2)).logits, logits, rtol=1e-4, atol=1e-5)
    assert_unfused(merged)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool, tmp_path: Path) -> None:
    options = {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }
    trainer = make(tmp_path / "a", max_steps=3, callbacks=[Looks()], **options)
    losses = [log.get("loss") for log in history(trainer)]
    assert losses == [log.get("loss") for log in history(make(tmp_path / "b", max_steps=3))]
    assert_unfused(trainer.model)


def test_a_checkpoint_around_the_whole_call(tmp_path: Path) -> None:
    model = build("llama")
    trainer = make(tmp_path / "a", model, max_steps=3, callbacks=[Looks()])
    compute_loss = trainer.compute_loss

    def recomputed(*args: Any, **kwargs: Any) -> Tensor:
        return torch.utils.checkpoint.checkpoint(compute_loss, *args, use_reentrant=False, **kwargs)

    trainer.compute_loss = recomputed
    losses = [log.get("loss") for log in history(trainer)]
    assert losses == [log.get("loss") for log in history(make(tmp_path / "b", max_steps=3))]


class Perplexity(TrainerCallback):
    """The model's own loss after every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        with torch.no_grad():
            self.seen.append(float(kwargs["model"](input_ids=ids_of(2), labels=ids_of(2)).loss))


def test_torch_compile(tmp_path: Path) -> None:
    runs = []
    for name, options in (
        ("eager", {}),
        ("compiled", {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    ):
        torch._dynamo.reset()
        perplexity = Perplexity()
        trainer = make(
            tmp_path / name, build("llama", num_hidden_layers=1), max_steps=3,
            callbacks=[perplexity], eval_dataset=pairs(4), **options,
        )  # fmt: skip
        losses = [log["loss"] for log in history(trainer) if "loss" in log]
        runs.append([*losses, *perplexity.seen, trainer.evaluate()["eval_loss"]])
        assert_unfused(trainer.model)
    torch._dynamo.reset()
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


def test_autocast(tmp_path: Path) -> None:
    # accelerate leaves its autocast around the model's forward, as it does after any trainer.
    trainer = trained(tmp_path, bf16=True, eval_dataset=pairs(4))
    trainer.evaluate()
    output = trainer.model(input_ids=ids_of(3), labels=ids_of(3))
    assert type(output).__name__ == "CausalLMOutputWithPast"
    assert output.logits.shape[-1] > 0
    assert ForwardOverride.on(trainer.model) is ForwardOverride.on(trainer.model.lm_head) is None
    unwrapped = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    del unwrapped.forward  # accelerate's, without its autocast
    assert_unfused(unwrapped)
