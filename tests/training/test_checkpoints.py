"""Save, interrupt, resume: bit-identical continuation, and folders that must not be mixed up."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from orpo_kernels.training.checkpoints import incomplete_files, last_complete_checkpoint
from tests.tiny_models import build
from tests.training.runs import make, pairs

LORA = LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
SAVING = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6, "logging_steps": 2}


def parameters(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


CASES = {
    "full": "llama",
    "lora": "llama",
    "accumulation": "llama",
    "dropout": "llama",
    "by length": "llama",
    "experts": "mixtral",  # saved one by one, trained as one tensor: Trainer would not load them
    "vision": "gemma3_vl",  # saved under other names than it is trained under
}


@pytest.mark.parametrize("case", CASES)
def test_resume_is_bit_identical(case: str, tmp_path: Path) -> None:
    # 8 rows in batches of 2: step 3 is within an epoch, whose order the resumed run must find.
    options: dict[str, Any] = {"train_dataset": pairs(8), **SAVING}
    if case == "lora":
        options["peft_config"] = LORA
    if case == "accumulation":
        options |= {"gradient_accumulation_steps": 2, "loss_normalization": "global"}
    if case == "by length":  # step 3 of 2 in an epoch: the second epoch has another order
        options |= {"train_sampling_strategy": "group_by_length", "train_dataset": pairs(8, 5)}
        options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    if case == "dropout":  # the random state has to come back too
        options |= {"disable_dropout": False}
    start = {"attention_dropout": 0.5} if case == "dropout" else {}
    straight = make(tmp_path / "straight", build(CASES[case], **start), **options)
    straight.train()
    first = make(tmp_path / "cut", build(CASES[case], **start), **options)
    first.train()  # the schedule is that of 6 steps; what is after step 3 is thrown away
    shutil.rmtree(tmp_path / "cut" / "checkpoint-6")
    resumed = make(tmp_path / "cut", build(CASES[case], **start), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    expected, got = parameters(straight), parameters(resumed)
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name
    last, other = straight.state.log_history[-2], resumed.state.log_history[-2]
    same = ("loss", "grad_norm", "nll_loss", "rewards/margins")
    assert [last[name] for name in same] == [other[name] for name in same]


def saved_run(folder: Path, **options: Any) -> Any:
    trainer = make(folder, **{**SAVING, **options})
    trainer.train()
    return trainer


def test_files_of_a_checkpoint(tmp_path: Path) -> None:
    saved_run(tmp_path)
    names = {path.name for path in (tmp_path / "checkpoint-6").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "trainer_state.json", "tokenizer.json"} <= names
    assert not any(name.startswith("pytorch_model") for name in names)
    assert incomplete_files(tmp_path / "checkpoint-6") == []


@pytest.mark.parametrize("broken", ["model.safetensors", "optimizer.pt", "trainer_state.json"])
def test_last_complete_checkpoint_survives(broken: str, tmp_path: Path, caplog: Any) -> None:
    saved_run(tmp_path)
    path = tmp_path / "checkpoint-6" / broken
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])  # killed while writing
    resumed = make(tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert f"checkpoint-6 is incomplete and not used: {broken}: cut short" in caplog.text
    assert resumed._initial_global_step == 3
    assert incomplete_files(tmp_path / "checkpoint-6") == []  # written anew


def test_killed_before_the_last_file(tmp_path: Path) -> None:
    saved_run(tmp_path)
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-3"
    with pytest.raises(ValueError, match=r"got trainer_state.json: not there; resume_from_check"):
        make(tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="found none; start without resume_from_checkpoint"):
        make(tmp_path).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("lora", [False, True])
def test_checkpoint_of_another_model(lora: bool, tmp_path: Path) -> None:
    peft = {"peft_config": LORA} if lora else {}
    saved_run(tmp_path, **peft)
    if lora:
        wider = LoraConfig(r=4, target_modules=["q_proj", "lm_head"])
        others = [make(tmp_path, **SAVING), make(tmp_path, peft_config=wider, **SAVING)]
    else:
        model = build("llama", vocab_size=400)
        others = [make(tmp_path, model, **SAVING), make(tmp_path, peft_config=LORA, **SAVING)]
    for other in others:
        before = parameters(other)
        with pytest.raises(ValueError, match=r"must be of the model that is trained .* do not fit"):
            other.train(resume_from_checkpoint=True)
        assert all(torch.equal(value, before[name]) for name, value in parameters(other).items())


def test_best_model_of_a_mixture_is_loaded(tmp_path: Path) -> None:
    # The NLL falls and the highest is called the best, so that it is not the last.
    trainer = make(
        tmp_path,
        "mixtral",
        eval_dataset=pairs(4),
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_nll_loss",
        greater_is_better=True,
        **{**SAVING, "save_steps": 1, "max_steps": 3},
    )
    trainer.train()
    assert trainer.state.best_global_step == 1
    best = trainer.state.best_metric
    assert trainer.evaluate()["eval_nll_loss"] == pytest.approx(best, rel=1e-6)


def test_tied_head_resumes(tmp_path: Path) -> None:
    saved_run(tmp_path, model="gemma2")  # its head is saved once, as the embedding
    shutil.rmtree(tmp_path / "checkpoint-6")
    resumed = make(tmp_path, "gemma2", **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


def test_output_folder_of_another_run(tmp_path: Path) -> None:
    trainer = saved_run(tmp_path)
    trainer.train()  # the same trainer may go on in its own folder
    with pytest.raises(FileExistsError, match=r"holds checkpoint-3 .* overwrite_output_dir=True"):
        make(tmp_path).train()
    assert (tmp_path / "checkpoint-6").exists()
    make(tmp_path, overwrite_output_dir=True).train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_finished_model_is_not_overwritten(tmp_path: Path) -> None:
    trainer = make(tmp_path)
    trainer.train()
    trainer.save_model()
    with pytest.raises(FileExistsError, match=r"holds model.safetensors \(1 checkpoints and"):
        make(tmp_path).train()


def test_folder_with_other_files_is_fine(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "checkpoint-best").mkdir()
    make(tmp_path).train()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_oldest_checkpoints_are_rotated_out(tmp_path: Path) -> None:
    saved_run(tmp_path, save_steps=1, save_total_limit=2)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-5",
        "checkpoint-6",
    ]
