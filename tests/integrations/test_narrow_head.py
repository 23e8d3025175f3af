"""A frozen head that holds 16-bit numbers in float32: kept in 16 bits as long as it is fused."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel, TrainerCallback

from orpo_kernels import ORPOLoss
from orpo_kernels.integrations import narrow
from orpo_kernels.integrations.transformers import fuse_head, unfuse_head
from tests.integrations.helpers import make_batch
from tests.tiny_models import VOCAB_SIZE, build
from tests.training.runs import history, make

BF16, F32 = torch.bfloat16, torch.float32


def prepared(dtype: torch.dtype = BF16) -> PreTrainedModel:
    """As `prepare_model_for_kbit_training` leaves it: frozen, float32, once saved in 16 bits."""
    model = build("llama").requires_grad_(False)
    head = model.get_output_embeddings()
    head.weight.data = head.weight.data.to(dtype).float()
    model.model.embed_tokens.requires_grad_(True)
    return model


def loss_and_gradient(model: nn.Module, **options: object) -> list[torch.Tensor]:
    with fuse_head(model, loss=ORPOLoss(), **options):
        loss = model(**make_batch()).loss
    loss.backward()  # after the head has its own dtype again
    (leaf,) = (each for each in model.parameters() if each.requires_grad)
    return [loss.detach(), leaf.grad]


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_it_is_kept_in_16_bits_while_it_is_fused(dtype: torch.dtype) -> None:
    model = prepared(dtype)
    head = model.get_output_embeddings()
    before, parameter, attributes = head.weight.detach().clone(), head.weight, set(vars(head))
    fused = fuse_head(model)
    assert head.weight is parameter
    assert head.weight.dtype == dtype
    assert "kept in" in repr(head)
    fused.unfuse()
    assert type(head) is nn.Linear
    assert head.weight is parameter
    assert torch.equal(head.weight, before)
    assert set(vars(head)) == attributes


@pytest.mark.parametrize("autocast", [False, True])
def test_nothing_that_is_computed_changes(autocast: bool) -> None:
    expected, found = prepared(), prepared()
    with torch.autocast("cpu", BF16, enabled=autocast):
        wide = loss_and_gradient(expected, narrow_head=False)
        narrowed = loss_and_gradient(found)
    for each, true in zip(narrowed, wide, strict=True):
        assert torch.equal(each, true)


def test_hidden_states_in_16_bits_are_multiplied_in_the_heads_own_dtype() -> None:
    # A model in bfloat16 but for its head: linear_logps multiplies in float32, then as now.
    models = [prepared().to(BF16) for _ in range(2)]
    for model in models:
        head = model.get_output_embeddings()
        head.weight.data = head.weight.data.float()
    wide = loss_and_gradient(models[0], narrow_head=False, check=False)
    narrowed = loss_and_gradient(models[1], check=False)
    assert torch.equal(narrowed[0], wide[0])
    error = (narrowed[1].float() - wide[1].float()).norm() / wide[1].float().norm()
    assert error < 4 * torch.finfo(BF16).eps  # rounded to bfloat16 in other places, then layers


@pytest.mark.parametrize("autocast", [False, True])
def test_the_unfused_model_answers_as_ever(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "_BLOCK_ELEMENTS", 1000)  # several blocks, the last one ragged
    model, batch = prepared(), make_batch()
    ids, mask = batch["input_ids"], batch["attention_mask"]

    def run() -> list[torch.Tensor]:
        model.zero_grad()
        with torch.autocast("cpu", BF16, enabled=autocast):
            logits = model(input_ids=ids, attention_mask=mask).logits
        logits.float().square().mean().backward()
        generated = model.generate(ids[:1, :4], max_new_tokens=3, do_sample=False)
        return [logits.detach(), model.model.embed_tokens.weight.grad, generated]

    expected = run()
    with fuse_head(model):
        assert model.get_output_embeddings().weight.dtype == BF16
        found = run()
    for each, true in zip(found, expected, strict=True):
        torch.testing.assert_close(each, true, rtol=1e-5, atol=1e-6)


def _is_narrowed(model: PreTrainedModel, **options: object) -> bool:
    with fuse_head(model, **options):
        return model.get_output_embeddings().weight.dtype != F32


def test_what_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _is_narrowed(prepared())
    assert not _is_narrowed(prepared(), narrow_head=False)
    inexact = prepared()
    inexact.get_output_embeddings().weight.data[-1, -1] += 1e-6
    assert not _is_narrowed(inexact)
    assert not _is_narrowed(prepared().requires_grad_(True))
    tied = prepared()
    tied.model.embed_tokens.weight = tied.get_output_embeddings().weight
    assert not _is_narrowed(tied)
    hooked = prepared()
    hooked.get_output_embeddings()._hf_hook = object()
    assert not _is_narrowed(hooked)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not _is_narrowed(prepared())


def test_a_model_that_reads_the_dtype_of_its_head_keeps_it() -> None:
    # Mamba casts its float32 hidden states to it: off by 1e-2 nats in 16 bits.
    config = transformers.MambaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=32, state_size=4, num_hidden_layers=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.MambaForCausalLM(config).requires_grad_(False)
    head, batch = model.get_output_embeddings(), make_batch()
    head.weight.data = 8 * head.weight.data.to(BF16).float()
    with fuse_head(model, narrow_head=False):
        expected = model(**batch).token_logps
    with fuse_head(model):
        assert head.weight.dtype == F32
        assert torch.equal(model(**batch).token_logps, expected)


def test_two_fusings_share_it() -> None:
    model = prepared()
    head = model.get_output_embeddings()
    first, second = fuse_head(model), fuse_head(model)
    first.unfuse()
    assert head.weight.dtype == BF16
    second.unfuse()
    assert head.weight.dtype == F32
    with first, second:
        unfuse_head(model)
        assert head.weight.dtype == F32
    assert type(head) is nn.Linear


def test_a_head_that_is_to_be_trained_gets_its_own_dtype_back() -> None:
    model = prepared()
    with fuse_head(model, loss=ORPOLoss()):
        head = model.get_output_embeddings()
        head.weight.requires_grad_(True)
        model(**make_batch()).loss.backward()
        assert head.weight.dtype == head.weight.grad.dtype == F32


@pytest.mark.parametrize("dtype", [torch.float64, BF16, F32])
def test_a_dtype_given_to_the_model_is_the_heads_for_good(dtype: torch.dtype) -> None:
    model, ids = prepared(), make_batch()["input_ids"]
    head = model.get_output_embeddings()
    with fuse_head(model):
        model.to(dtype)
        assert model.state_dict()["lm_head.weight"].dtype == dtype
        fused = model(ids).logits
    assert head.weight.dtype == fused.dtype == dtype
    assert torch.equal(model(ids).logits, fused)


def test_on_another_device_it_stays_as_narrow() -> None:
    model = prepared()
    with fuse_head(model):
        assert model.to("meta").get_output_embeddings().weight.dtype == BF16


@pytest.mark.parametrize("autocast", [False, True])
def test_it_trains_on_the_models_own_loss_too(autocast: bool) -> None:
    model, ids = prepared(), make_batch()["input_ids"]
    head = model.get_output_embeddings()
    with fuse_head(model) as fused, torch.autocast("cpu", BF16, enabled=autocast):
        assert head.weight.dtype == BF16
        head.weight.requires_grad_(True)
        with fused.paused():
            model(ids, labels=ids).loss.backward()
    assert head.weight.grad.dtype == head.weight.dtype == F32
    assert head.weight.grad.abs().max() > 0


def test_saved_loaded_and_copied_it_has_its_own_dtype(tmp_path: Path) -> None:
    model = prepared()
    head = model.get_output_embeddings()
    expected = head.weight.detach().clone()
    fused = fuse_head(model)
    assert torch.equal(model.state_dict()["lm_head.weight"], expected)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded.get_output_embeddings().weight, expected)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        unfuse_head(copied)
        assert torch.equal(copied.get_output_embeddings().weight, expected)
    other = {"lm_head.weight": torch.full_like(expected, 1 / 3)}
    model.load_state_dict(other, strict=False)
    assert torch.equal(head.weight, other["lm_head.weight"])
    fused.unfuse()
    assert torch.equal(head.weight, other["lm_head.weight"])


def test_without_room_for_both_it_goes_through_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = nn.Parameter(torch.randn(70, 9).to(BF16).float())
    monkeypatch.setattr(narrow, "_BLOCK_ELEMENTS", 100)
    expected, to = weight.detach().to(BF16), torch.Tensor.to

    def refused(self: torch.Tensor, *args: object) -> torch.Tensor:
        if args == (BF16,) and self.shape == weight.shape and weight.numel() > 0:
            raise torch.OutOfMemoryError
        return to(self, *args)

    monkeypatch.setattr(torch.Tensor, "to", refused)
    assert torch.equal(narrow._cast(weight, BF16), expected)


@pytest.mark.parametrize("with_init", [False, True], ids=["model", "model_init"])
def test_our_trainer_keeps_it_so_from_the_first_step_to_the_last(
    with_init: bool, tmp_path: Path
) -> None:
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, *args: object, model: PreTrainedModel, **kwargs: object) -> None:
            seen.append(model.get_output_embeddings().weight.dtype)

    given = (
        {"model": None, "model_init": lambda: prepared()} if with_init else {"model": prepared()}
    )
    logs = []
    for narrow_head in (True, False):
        options = {"narrow_head": narrow_head, "callbacks": [Look()], "max_steps": 2}
        trainer = make(tmp_path / str(narrow_head), **given, **options)
        logs.append([log.get("loss") for log in history(trainer)])
        assert type(trainer.model.get_output_embeddings()) is nn.Linear
        if not with_init:
            given = {"model": prepared()}
    assert seen == [BF16, BF16, F32, F32]
    assert logs[0] == logs[1]
