"""`orpo-kernels profile`: parts that add up, the same steps as the run's, files that are there."""

from __future__ import annotations

import gc
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from orpo_kernels import cli
from orpo_kernels.training import profile_table
from orpo_kernels.training.options import OptionError
from orpo_kernels.training.profile_table import FUSED, LOGITS, Lengths, make_pairs, table
from orpo_kernels.training.profiling import (
    DATA,
    HEAD,
    LAYERS,
    OPTIMIZER,
    PARTS,
    REST,
    WARM_UP,
    LogitsTrainer,
    Plan,
    Profile,
    ProfilingTrainer,
    Timeline,
)
from tests.tiny_models import VOCAB_SIZE, build, tiny_tokenizer
from tests.training.runs import settings

LENGTHS = [Lengths(6, 5, 3)]
CONFIG = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip


def profiling(kind: type[ProfilingTrainer], folder: Path, plan: Plan, **changes: Any) -> Any:
    """A trainer that profiles a tiny Llama on two batches of two pairs a step."""
    changes = {"gradient_accumulation_steps": 2, "max_steps": plan.total, **changes}
    family = changes.pop("family", "llama")
    arguments = settings(folder, **changes)
    return kind(
        build(family),
        profile_table.parse_options([f"--{k}={v}" for k, v in arguments.items()]).training,
        train_dataset=make_pairs(LENGTHS, 4 * plan.total, VOCAB_SIZE),
        processing_class=tiny_tokenizer(),
    )


@pytest.mark.parametrize("layout", ["padded", "shared_prompt"])
def test_the_parts_add_up_to_the_steps(layout: str, tmp_path: Path) -> None:
    plan = Plan(3)
    trainer = profiling(ProfilingTrainer, tmp_path, plan, batch_layout=layout)
    ends: list[float] = []
    after_step = trainer.after_step

    def timed() -> None:
        after_step()
        ends.append(time.perf_counter())

    trainer.after_step = timed
    found = trainer.profile(plan)
    assert set(found.seconds) == set(PARTS)
    assert all(found.seconds[part] > 0 for part in (DATA, LAYERS, HEAD, OPTIMIZER))
    # From the end of the warm-up to the last step's; between is what Trainer does after a step.
    whole = ends[-1] - ends[WARM_UP - 1]
    assert 0.5 * whole < 3 * found.step_seconds <= whole
    assert trainer.state.global_step == plan.total


def test_parts_end_where_others_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((1.0, 3.0, 7.0, 8.0, 16.0))
    timeline = Timeline(torch.device("cpu"))
    monkeypatch.setattr(timeline, "_now", lambda: next(clock))
    timeline.begin(HEAD)  # not recorded yet
    timeline.start(DATA)
    for part in (LAYERS, HEAD, LAYERS):
        timeline.begin(part)
    timeline.stop()
    timeline.begin(HEAD)
    found = timeline.profile(steps=2)
    assert found.seconds == {DATA: 1.0, LAYERS: 6.0, HEAD: 0.5, OPTIMIZER: 0.0, REST: 0.0}
    assert found.step_seconds == 7.5


def test_time_goes_where_it_is_spent(tmp_path: Path) -> None:
    # A sleep in the decoder, one in the backward of the head, one in the optimizer, each its own.
    plan = Plan(1)
    trainer = profiling(ProfilingTrainer, tmp_path, plan, gradient_accumulation_steps=1)
    model = trainer.fused_head.model
    trainer.create_optimizer()
    model.model.layers[0].register_forward_pre_hook(lambda *_: time.sleep(0.2))
    trainer.optimizer.register_step_pre_hook(lambda *_: time.sleep(0.3))
    collate = trainer.data_collator

    def slowly(rows: Any) -> Any:
        time.sleep(0.4)
        return collate(rows)

    trainer.data_collator = slowly

    class SlowBackward(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, hidden: torch.Tensor) -> torch.Tensor:
            return hidden.clone()

        @staticmethod
        def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
            time.sleep(0.5)
            return gradient

    before_head: Any = SlowBackward.apply
    model.lm_head.register_forward_pre_hook(lambda _, args: (before_head(args[0]),))
    seconds = trainer.profile(plan).seconds
    for part, least in ((LAYERS, 0.2), (OPTIMIZER, 0.3), (DATA, 0.4), (HEAD, 0.5)):
        # 0.2 more would be another's sleep.
        assert least <= seconds[part] < least + 0.19, (part, seconds)


@pytest.mark.parametrize(
    ("family", "normalization"),
    [("llama", "micro_batch"), ("llama", "global"), ("mixtral", "micro_batch")],
)
def test_logits_are_the_same_steps(family: str, normalization: str, tmp_path: Path) -> None:
    losses = {}
    for kind in (ProfilingTrainer, LogitsTrainer):
        plan = Plan(2)
        options = {"family": family, "loss_normalization": normalization}
        trainer = profiling(kind, tmp_path / kind.__name__, plan, **options)
        trainer.profile(plan)
        losses[kind] = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses[LogitsTrainer]) == WARM_UP + 2
    assert losses[LogitsTrainer] == pytest.approx(losses[ProfilingTrainer], rel=1e-5)


def test_memory_goes_where_it_is_held(tmp_path: Path) -> None:
    plan = Plan(1)
    trainer = profiling(ProfilingTrainer, tmp_path, plan, gradient_accumulation_steps=1)
    trainer.create_optimizer()
    held: list[torch.Tensor] = []

    def hold(*_: Any) -> None:
        # 256 MiB: what earlier tests left may be given back meanwhile, which hides as much.
        held.append(torch.ones(256 << 18))
        time.sleep(0.2)

    trainer.optimizer.register_step_pre_hook(hold)
    trainer.optimizer.register_step_post_hook(lambda *_: held.clear())
    gc.collect()
    peaks = trainer.profile(plan).peak_bytes
    assert peaks[OPTIMIZER] > 60 << 20
    assert peaks[OPTIMIZER] - peaks[DATA] > 50 << 20


def command(folder: Path, *words: str) -> list[str]:
    """A profile of a tiny shape with random weights."""
    config = folder / "config.json"
    config.write_text(json.dumps(CONFIG))
    return [
        "profile", f"--model={config}", "--use_cpu", "--use_peft", "--steps=1", "--pairs=1",
        "--lengths", "6", "5", "3", "4", "2", "7", f"--picture={folder}/p.png", *words,
    ]  # fmt: skip


def test_the_command_leaves_a_table_a_picture_and_a_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = command(tmp_path, f"--trace={tmp_path}/t.json", "--batch_layout=shared_prompt")
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "1 x 1 pairs a step of 6 + 5 | 3, 4 + 2 | 7 tokens" in printed
    for word in (*PARTS, FUSED, LOGITS, "tokens/s", "times the speed"):
        assert word in printed
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert any("orpo_kernels" in str(event.get("name")) for event in events)
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "p.png", "t.json"}


def test_without_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(command(tmp_path, "--no-logits")) == 0
    assert LOGITS not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lengths", "3", "4"], "--lengths takes the tokens of prompt"),
        (["--lengths", "3", "4", "0"], "each at least 1"),
        (["--load_in_4bit"], "a shape without weights"),
        (["--torch_compile"], "leave torch_compile out"),
        (["--model=no/such/folder"], "no such model folder"),
        (["--max_lenght=3"], "did you mean"),
    ],
)
def test_what_is_refused(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(command(tmp_path, *words)) == cli.BAD_INPUT
    assert message in capsys.readouterr().err


def test_lengths_beyond_a_models_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = profile_table.parse_options(["--model_name_or_path=gpt2", "--use_cpu"])
    monkeypatch.setattr(profile_table, "_model", lambda *_: build("gpt2"))
    with pytest.raises(OptionError, match="256 positions"):
        profile_table.run(options, [Lengths(200, 57, 1)], Plan(1))


def test_a_run_that_does_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Profile:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(LogitsTrainer, "profile", fails)
    plan = Plan(1)
    monkeypatch.setattr(profile_table, "_model", lambda *_: build("llama"))
    arguments = settings(tmp_path, max_steps=plan.total)
    options = profile_table.parse_options([f"--{k}={v}" for k, v in arguments.items()])
    found = profile_table.run(options, LENGTHS, plan)
    assert found[LOGITS] is None
    assert "out of memory" in table(found, 20)


def test_pairs_share_their_prompt_and_nothing_more() -> None:
    rows = make_pairs([Lengths(3, 4, 2), Lengths(1, 1, 5)], 3, 50)
    for row, (prompt, chosen, rejected) in zip(
        rows, [(3, 4, 2), (1, 1, 5), (3, 4, 2)], strict=True
    ):
        sides = row["chosen_input_ids"], row["rejected_input_ids"]
        assert [len(side) for side in sides] == [prompt + chosen, prompt + rejected]
        assert sides[0][:prompt] == sides[1][:prompt]
        assert sides[0][prompt] != sides[1][prompt]
        assert row["chosen_labels"][:prompt] == [-100] * prompt
