"""Compiled training equals eager training, and a fused model compiles into one graph."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import Trainer, TrainingArguments

from orpo_kernels import ORPOLoss
from orpo_kernels.integrations.override import THREAD
from orpo_kernels.integrations.transformers import fuse_head
from tests.integrations.helpers import (
    BETA,
    Step,
    assert_same_step,
    fused_step,
    make_batch,
    unfused_step,
)
from tests.integrations.layouts import ragged_pairs
from tests.tiny_models import build

LOSS = ORPOLoss(BETA)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_step(compiled: Any, batch: dict[str, Tensor]) -> Step:
    step = fused_step(compiled, batch, use_cache=False)
    names = {name: name.removeprefix("_orig_mod.") for name in step.gradients}
    return step._replace(gradients={names[n]: gradient for n, gradient in step.gradients.items()})


def shallow(name: str) -> nn.Module:
    """Embedding, norm and head: tracing takes seconds per layer, and no layer is ours."""
    return build(name, num_hidden_layers=0)


@pytest.mark.parametrize(
    ("backend", "model"),
    [
        ("aot_eager", build("llama", num_hidden_layers=1)),
        ("aot_eager", shallow("gemma2")),  # softcap over the head's output, and in the mean logit
        ("inductor", shallow("cohere")),  # the logit scale
    ],
    ids=["llama", "gemma2", "cohere"],
)
def test_equals_the_unfused_model(backend: str, model: nn.Module) -> None:
    batch = make_batch()
    expected = unfused_step(model, batch)
    compiled = torch.compile(model, backend=backend)
    with fuse_head(compiled, loss=LOSS, mean_logits=True) as fused:
        assert fused.model is model
        for _ in range(2):  # with the self-check, which runs eagerly, and without
            assert_same_step(compiled_step(compiled, batch), expected)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["packed", "shared_prompt"])
def test_a_layout_breaks_the_graph_once(layout: str) -> None:
    model = build("llama", num_hidden_layers=1, attn_implementation="sdpa")
    batches = [ragged_pairs(), ragged_pairs(((5, 6, 7), (9, 3, 12)))]
    expected = [unfused_step(model, batch) for batch in batches]
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    with fuse_head(compiled, loss=LOSS, layout=layout):
        compiled_step(compiled, batches[0])  # with its checks, which run eagerly
        torch._dynamo.utils.counters.clear()
        for batch, step in zip(batches, expected, strict=True):
            assert_same_step(compiled_step(compiled, batch), step)
    (reason,) = torch._dynamo.utils.counters["graph_break"]
    assert "ModelOverride._rows" in reason


def test_a_graph_that_breaks_between_the_backbone_and_the_head() -> None:
    model, batch = shallow("llama"), make_batch()
    expected = unfused_step(model, batch)
    model.model.norm.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    compiled = torch.compile(model, backend="eager")
    with fuse_head(compiled, loss=LOSS):
        for _ in range(2):
            assert_same_step(compiled_step(compiled, batch), expected)


def test_lora_on_the_head_compiled_in_place() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    model, batch = peft.get_peft_model(shallow("llama"), config), make_batch()
    expected = unfused_step(model, batch)
    model.compile(backend="aot_eager")
    with fuse_head(model, loss=LOSS, mean_logits=True):
        for _ in range(2):
            assert_same_step(compiled_step(model, batch), expected)


@pytest.mark.parametrize(
    ("name", "called_before"), [("llama", True), ("gemma2", False)], ids=["checked", "check=False"]
)
def test_one_graph_whatever_the_length(name: str, called_before: bool) -> None:
    model = shallow(name)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    batches = [make_batch(length=length) for length in (9, 12, 14, 11)]
    expected = [unfused_step(model, batch) for batch in batches]
    with fuse_head(model, loss=LOSS, mean_logits=True, check=called_before):
        if called_before:
            model(**batches[0], use_cache=False)
        for batch, theirs in zip(batches, expected, strict=True):
            assert_same_step(compiled_step(compiled, batch), theirs)
    assert counter.frame_count == 2  # the first length, then any length


def test_the_self_check_asks_for_an_eager_call_first() -> None:
    compiled = torch.compile(shallow("llama"), backend="eager", fullgraph=True)
    with (
        fuse_head(compiled, loss=LOSS),
        pytest.raises(torch._dynamo.exc.Unsupported, match="call the model once"),
    ):
        compiled(**make_batch(), use_cache=False)


def test_fusing_for_each_call_compiles_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # A context that another thread has closed stays there, dead, until this one leaves one.
    monkeypatch.setattr(THREAD, "entered", ())
    model = shallow("llama")
    batch = make_batch()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logits = model(**inputs, use_cache=False).logits
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    fused = fuse_head(model, loss=LOSS, check=False)
    fused.unfuse()
    losses = []
    for _ in range(3):
        with fused.active():
            losses.append(float(compiled(**batch, use_cache=False).loss.detach()))
        assert torch.equal(compiled(**inputs, use_cache=False).logits, logits)
        with fused.paused():
            assert torch.equal(compiled(**inputs, use_cache=False).logits, logits)
    assert len(set(losses)) == 1
    assert counter.frame_count <= 3  # fused, not fused, and fused but paused


def test_the_mean_logit_is_an_operation_of_its_own() -> None:
    hidden, weight, bias = torch.randn(2, 5, 4), torch.randn(7, 4), torch.randn(7)
    low_rank = (torch.randn(2, 5, 3), torch.randn(7, 3))
    for scale, softcap in ((2.0, None), (1.0, 3.0)):
        for lora in ((None, None), low_rank):
            torch.library.opcheck(
                torch.ops.orpo_kernels.head_mean_logits,
                (hidden, weight, bias, *lora, scale, softcap, None),
                test_utils=("test_schema", "test_faketensor"),
            )


def trained(model: nn.Module, folder: Path, **settings: Any) -> list[float]:
    ids = make_batch(pairs=4)["input_ids"]
    pairs = [ids[[row, 4 + row]] for row in range(4)]

    def collate(batch: list[Tensor]) -> dict[str, Tensor]:
        stacked = torch.cat([torch.stack([pair[side] for pair in batch]) for side in (0, 1)])
        return {"input_ids": stacked, "labels": stacked}

    args = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, max_steps=3,
        per_device_train_batch_size=2, learning_rate=1e-2, logging_steps=1, save_strategy="no",
        remove_unused_columns=False, **settings,
    )  # fmt: skip
    with fuse_head(model, loss=LOSS):
        trainer = Trainer(model, args, data_collator=collate, train_dataset=pairs)
        trainer.train()
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_a_trainer_with_torch_compile(tmp_path: Path) -> None:
    losses = [
        trained(shallow("llama"), tmp_path, **settings)
        for settings in ({}, {"torch_compile": True, "torch_compile_backend": "aot_eager"})
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0]
