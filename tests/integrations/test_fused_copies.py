"""Copies, files and graphs of a model that is fused, and of one that has been."""

import copy
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from orpo_kernels import ORPOLoss
from orpo_kernels.integrations.transformers import fuse_head, unfuse_head
from tests.integrations.helpers import (
    BETA,
    assert_same_step,
    fused_step,
    make_batch,
    unfused_step,
)
from tests.tiny_models import build

LOSS = ORPOLoss(BETA)


def pickled(model: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def lora(**settings: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(init_lora_weights=False, **settings)
    return peft.get_peft_model(build("llama"), config)


def once_fused(model: nn.Module) -> nn.Module:
    """A model that was trained fused, in every way there is, and is not any more."""
    with fuse_head(model, loss=LOSS) as fused:
        model(**make_batch()).loss.backward()
        with fused.active(), fused.paused():
            model(**make_batch(), use_cache=False)
    with fused.active():
        model(**make_batch()).loss.backward()
    model.zero_grad()
    return model


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled}
MODELS = {
    "llama": lambda: build("llama", tie_word_embeddings=True),
    "lora": lambda: lora(target_modules=["q_proj", "lm_head"]),
    "modules_to_save": lambda: lora(target_modules=["q_proj"], modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_copy_of_a_fused_model_is_fused_by_itself(
    make: Callable[[], nn.Module], make_copy: Callable[[nn.Module], nn.Module]
) -> None:
    model, batch = make(), make_batch()
    expected = unfused_step(model, batch)
    fused = fuse_head(model, loss=ORPOLoss(2.0))
    with fuse_head(model, loss=LOSS):
        model(**batch)
        other = make_copy(model)
        fuse_head(model, loss=ORPOLoss(7.0))
        assert_same_step(fused_step(other, batch), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(2.0)
        doubled = unfused_step_of(other)
        assert_same_step(fused_step(other, batch), doubled)
    unfuse_head(model)
    assert_same_step(fused_step(other, batch), doubled)  # not the original's to undo
    unfuse_head(other)
    for each in (model, other):
        assert "fused" not in repr(each)
        assert not any("forward" in module.__dict__ for module in each.modules())
    assert not fused.is_fused
    assert_same_step(unfused_step_of(model), expected)


def unfused_step_of(model: nn.Module) -> Any:
    return unfused_step(copy.deepcopy(model), make_batch())


def test_a_copy_made_within_a_call_of_one_thread_is_not_fused() -> None:
    model, batch = build("llama"), make_batch()
    copies: list[Any] = []
    fused = fuse_head(model, loss=LOSS)
    fused.unfuse()
    hook = model.model.norm.register_forward_hook(lambda *_: copies.append(copy.deepcopy(model)))
    with fused.active():
        model(**batch)
    hook.remove()
    inputs = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
    copies[0].model.norm._forward_hooks.clear()
    assert torch.equal(copies[0](**inputs).loss, model(**inputs).loss)
    assert "fused" not in repr(copies[0])
    with fuse_head(copies[0], loss=LOSS):
        assert torch.equal(copies[0](**batch).loss, fused_step(model_of(fused), batch).loss)


def model_of(fused: Any) -> nn.Module:
    fused.fuse()
    return fused.model


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_of_a_fused_model_whose_head_was_replaced(how: str) -> None:
    model = build("llama")
    fused = fuse_head(model, loss=LOSS, mean_logits=True)
    model(**make_batch())
    model.resize_token_embeddings(model.config.vocab_size + 5, mean_resizing=False)
    copied = COPIES[how](model)
    fused.unfuse()
    assert_same_step(fused_step(copied, make_batch()), unfused_step(model, make_batch()))


def test_a_head_copied_by_peft_and_never_called_is_restored_too() -> None:
    peft = pytest.importorskip("peft")
    model = build("llama")
    with fuse_head(model, loss=LOSS):
        config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
        wrapped = peft.get_peft_model(model, config)
    assert not any("forward" in vars(module) for module in wrapped.modules())


def test_a_head_copied_by_peft_after_fusing_is_restored_too() -> None:
    peft = pytest.importorskip("peft")
    base = build("llama")
    with fuse_head(base, loss=LOSS):
        base(**make_batch())
        config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
        model = peft.get_peft_model(base, config)
        ours = fused_step(model, make_batch())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert_same_step(ours, unfused_step(model, make_batch()))


def export(model: nn.Module, strict: bool) -> None:
    inputs = {"input_ids": make_batch()["input_ids"], "use_cache": False}
    program = torch.export.export(model.eval(), (), inputs, strict=strict)
    assert torch.equal(program.module()(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_fused_model(strict: bool) -> None:
    model = build("llama", num_hidden_layers=0)  # tracing takes its time per layer
    with fuse_head(model, loss=LOSS):
        model(**make_batch())
        export(model, strict)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def push(model: nn.Module, folder: Path) -> None:
    """`push_to_hub` without a hub: what would be uploaded is copied to `folder`."""
    hub = transformers.utils.hub
    api = SimpleNamespace(create_repo=lambda name, **_: SimpleNamespace(repo_id=name))
    card = SimpleNamespace(save=lambda path: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub, "hf_api", lambda: api)
        patch.setattr(hub, "create_and_tag_model_card", lambda *_, **__: card)
        patch.setattr(
            type(model),
            "_upload_modified_files",
            lambda self, made, *_, **__: shutil.copytree(made, folder),
        )
        model.push_to_hub("somebody/model")


def test_files_and_copies_of_a_model_that_was_fused(tmp_path: Path) -> None:
    model, untouched = once_fused(build("llama")), build("llama")
    assert repr(model) == repr(untouched)
    assert list(model.__dict__) == list(untouched.__dict__)
    assert list(model.lm_head.__dict__) == list(untouched.lm_head.__dict__)
    model.save_pretrained(tmp_path / "ours")
    untouched.save_pretrained(tmp_path / "theirs")
    push(model, tmp_path / "pushed")
    assert files(tmp_path / "ours") == files(tmp_path / "theirs") == files(tmp_path / "pushed")
    inputs = {"input_ids": make_batch()["input_ids"]}
    expected = untouched(**inputs).logits
    for make_copy in COPIES.values():
        copied = make_copy(model)
        assert list(copied.__dict__) == list(untouched.__dict__)
        assert torch.equal(copied(**inputs).logits, expected)
    assert b"orpo_kernels" not in saved_bytes(model)


def saved_bytes(model: nn.Module) -> bytes:
    stream = io.BytesIO()
    torch.save(model, stream)
    return stream.getvalue()


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_model_that_was_fused(strict: bool) -> None:
    export(once_fused(build("llama", num_hidden_layers=0)), strict)


@pytest.mark.parametrize("fused_meanwhile", [False, True])
def test_merge_and_unload(fused_meanwhile: bool) -> None:
    settings = {"target_modules": ["q_proj", "lm_head"]}
    inputs = {"input_ids": make_batch()["input_ids"], "labels": make_batch()["input_ids"]}
    expected = lora(**settings).merge_and_unload()
    model = lora(**settings)
    if fused_meanwhile:
        fuse_head(model, loss=LOSS)
        model(**make_batch())
        merged = model.merge_and_unload().requires_grad_(True)
        expected.requires_grad_(True)
        assert "fused" in repr(merged)
        assert_same_step(fused_step(merged, make_batch()), unfused_step(expected, make_batch()))
        unfuse_head(merged)
    else:
        merged = once_fused(model).merge_and_unload()
    assert repr(merged) == repr(expected)
    assert torch.equal(merged(**inputs).loss, expected(**inputs).loss)
    assert not any("forward" in module.__dict__ for module in merged.modules())
