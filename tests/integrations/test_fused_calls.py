"""How a fused model may be called, wrapped, copied and saved, and that nothing is left behind."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from orpo_kernels import ORPOLoss
from orpo_kernels.integrations.transformers import fuse_head, unfuse_head
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


def attributes(model: nn.Module) -> dict[str, dict[str, int]]:
    """Every attribute of every module, by identity."""
    return {
        name: {key: id(value) for key, value in module.__dict__.items()}
        for name, module in model.named_modules()
    }


def test_leaves_no_trace() -> None:
    model = build("llama")
    batch = make_batch()
    before, keys = attributes(model), list(model.state_dict())
    with fuse_head(model, loss=LOSS) as fused:
        assert fused.model is model
        model(**batch).loss.backward()
        between = attributes(model)
        for name in ("forward", "accepts_loss_kwargs", "extra_repr"):
            assert between[""].pop(name)
        assert between["lm_head"].pop("forward")
        assert between == before
        assert list(model.state_dict()) == keys
    model.zero_grad()
    assert attributes(model) == before


def test_without_labels_the_model_is_the_unfused_one() -> None:
    model = build("llama").eval()
    inputs = {k: v for k, v in make_batch().items() if k in ("input_ids", "attention_mask")}
    expected = model(**inputs)
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    with fuse_head(model, loss=LOSS):
        model(**make_batch())
        output = model(**inputs)
        assert type(output) is type(expected)
        assert torch.equal(output.logits, expected.logits)
        assert torch.equal(model(**inputs, logits_to_keep=2).logits, expected.logits[:, -2:])
        assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), tokens)
        assert torch.equal(model(*inputs.values(), labels=None).logits, expected.logits)


def test_labels_by_position_and_logits_to_keep() -> None:
    model = build("llama")
    batch = make_batch()
    expected = unfused_step(model, batch)
    ids, mask, labels, nll_labels = batch.values()
    with fuse_head(model, loss=LOSS):
        by_position = model(ids, mask, None, None, None, labels, nll_labels=nll_labels)
        assert_near("token_logps", by_position.token_logps, expected.token_logps, 1e-5)
        kept = model(
            **batch, logits_to_keep=1
        )  # a generation setting; the head needs every position
        assert_near("token_logps", kept.token_logps, expected.token_logps, 1e-5)


def test_the_models_own_loss_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mixtral")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model's own loss ran")

    monkeypatch.setattr(model, "_loss_function", refuse, raising=False)
    with pytest.raises(AssertionError, match="own loss ran"):
        model(**{k: v for k, v in make_batch().items() if k != "nll_labels"})
    with fuse_head(model, loss=LOSS):
        assert model(**make_batch()).loss > 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"labels": None}, ValueError, "nll_labels came without labels"),
        (
            {"labels": [[1, 2, 3]]},
            TypeError,
            r"labels must be an integer tensor \(B, T\), got list",
        ),
        ({"labels": torch.ones(4)}, TypeError, r"labels must be an integer tensor .* got \(4,\)"),
        ({"labels": torch.ones(4, 9)}, TypeError, "labels must be integer, got torch.float32"),
        ({"labels": torch.ones(4, 9) > 0}, TypeError, "labels must be integer.*torch.bool"),
        ({"nll_labels": torch.ones(4, 9) > 0}, TypeError, "nll_labels must be integer.*bool"),
        (
            {"labels": torch.ones(4, 7, dtype=torch.int64)},
            ValueError,
            r"labels .* \(4, 9\).* \(4, 7\)",
        ),
        (
            {"nll_labels": torch.ones(2, 9, dtype=torch.int64)},
            ValueError,
            r"nll_labels .* \(2, 9\)",
        ),
        ({"labels": torch.full((4, 9), VOCAB_SIZE)}, ValueError, rf"\[0, {VOCAB_SIZE}\)"),
        ({"return_dict": False}, TypeError, "return_dict=True"),
    ],
)
def test_wrong_input_is_named_and_leaves_no_trace(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = build("llama")
    batch = make_batch()
    expected = unfused_step(model, batch)
    with fuse_head(model, loss=LOSS):
        between = attributes(model)
        with pytest.raises(error, match=message):
            model(**{**batch, **change})
        assert attributes(model) == between
        assert_same_step(fused_step(model, batch), expected)


def test_an_error_inside_the_backbone_leaves_no_trace() -> None:
    model = build("llama")
    with fuse_head(model, loss=LOSS):
        between = attributes(model)
        handle = model.model.norm.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**make_batch())
        handle.remove()
        assert attributes(model) == between
        assert model(**make_batch()).loss > 0


def test_signature_for_the_columns_of_trainer() -> None:
    model = build("llama")
    own = inspect.signature(model.forward)
    with fuse_head(model):
        names = list(inspect.signature(model.forward).parameters)
    assert [n for n in names if n not in ("nll_labels", "num_nll_tokens", "num_pairs")] == list(
        own.parameters
    )
    assert {"nll_labels", "num_nll_tokens", "num_pairs"} < set(names)
    assert inspect.signature(model.forward) == own


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model = build("llama")
    batch = make_batch()
    expected = unfused_step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with fuse_head(model, loss=LOSS):
        assert_same_step(fused_step(model, batch, use_cache=False), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name", ["gemma2", "cohere"]
)  # softcap and scale are rounded in 16 bits too
def test_16_bit_models_pass_the_check_and_stay_close(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    batch = make_batch()
    expected = unfused_step(model, batch)
    with fuse_head(model, loss=LOSS):
        ours = fused_step(model, batch)
    assert ours.token_logps.dtype == torch.float32
    # Logits of size 4 are rounded to 2^-8 of themselves by the model, not by us: 0.02 nats.
    assert_near("token_logps", ours.token_logps, expected.token_logps, 0.03)
    assert ours.gradients["model.embed_tokens.weight"].dtype == dtype


def test_autocast_keeps_gradients_in_the_parameters_dtype() -> None:
    model = build("llama")
    batch = make_batch()
    exact = unfused_step(model, batch)
    with fuse_head(model, loss=LOSS), torch.autocast("cpu", torch.bfloat16):
        ours = fused_step(model, batch)
    assert ours.token_logps.dtype == torch.float32
    assert_near("token_logps", ours.token_logps, exact.token_logps, 0.1)
    assert all(gradient.dtype == torch.float32 for gradient in ours.gradients.values())
    assert not torch.equal(ours.token_logps, exact.token_logps)  # the head's GEMM ran in bfloat16


@pytest.mark.parametrize("fuse_first", [True, False])
def test_accelerate_mixed_precision(fuse_first: bool) -> None:
    accelerate = pytest.importorskip("accelerate")
    # One state per process: what an earlier test's trainer left would refuse another precision.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    model = build("llama")
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    if fuse_first:
        fused = fuse_head(model, loss=LOSS)
    prepared = accelerator.prepare_model(model)
    if not fuse_first:
        fused = fuse_head(prepared, loss=LOSS)
    assert fused.is_fused  # found beneath accelerate's wrappers
    output = prepared(**make_batch())
    assert output.token_logps.dtype == torch.float32
    assert output.orpo.pair_mask.dtype == torch.bool
    output.loss.backward()
    inputs = {"input_ids": make_batch()["input_ids"]}
    assert prepared(**inputs).logits.shape[-1] == VOCAB_SIZE
    fused.unfuse()
    assert "token_logps" not in prepared(**inputs, labels=inputs["input_ids"])
    with fused.active():
        assert torch.equal(prepared(**make_batch()).loss, output.loss)
    assert "token_logps" not in prepared(**inputs, labels=inputs["input_ids"])
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert unwrapped(**inputs).logits.shape[-1] == VOCAB_SIZE
    unfuse_head(unwrapped)
    if fuse_first:
        assert "forward" not in unwrapped.__dict__
    assert "token_logps" not in unwrapped(**inputs, labels=inputs["input_ids"])
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("offloaded", [False, True], ids=["split", "offloaded"])
def test_device_map_hooks(offloaded: bool) -> None:
    # One device, but accelerate's hooks all the same: they wrap the forward of every module, and
    # an offloaded weight exists only inside the wrapped forward of its module.
    accelerate = pytest.importorskip("accelerate")
    # One state per process: what an earlier test's trainer left would refuse another precision.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    model = build("llama")
    batch = make_batch()
    expected = unfused_step(model, batch)
    if offloaded:
        model.requires_grad_(False)
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        parts = ("model.embed_tokens", "model.rotary_emb", "model.layers", "model.norm", "lm_head")
        accelerate.dispatch_model(model, dict.fromkeys(parts, "cpu"), force_hooks=True)
    before = attributes(model)
    with fuse_head(model, loss=LOSS):
        output = model(**batch)
        assert_near("token_logps", output.token_logps, expected.token_logps, 1e-5)
    assert attributes(model) == before


@pytest.mark.parametrize("hooked_first", [True, False])
def test_hooks_that_come_and_go_while_the_head_is_fused(hooked_first: bool) -> None:
    # PEFT dispatches a model again when it loads an adapter, and accelerate takes hooks off.
    accelerate = pytest.importorskip("accelerate")
    model = build("llama")
    batch = make_batch()
    expected = unfused_step(model, batch)
    parts = ("model.embed_tokens", "model.rotary_emb", "model.layers", "model.norm", "lm_head")

    def dispatch() -> None:
        accelerate.dispatch_model(model, dict.fromkeys(parts, "cpu"), force_hooks=True)

    if hooked_first:
        dispatch()
    with fuse_head(model, loss=LOSS):
        assert_same_step(fused_step(model, batch), expected)
        dispatch()
        assert_same_step(fused_step(model, batch), expected)
        accelerate.hooks.remove_hook_from_submodules(model)
        assert_same_step(fused_step(model, batch), expected)
        dispatch()
    assert "token_logps" not in model(input_ids=batch["input_ids"], labels=batch["input_ids"])
    accelerate.hooks.remove_hook_from_submodules(model)
    # A bound method is what accelerate leaves behind.
    assert model.__dict__["forward"] == type(model).forward.__get__(model)
    assert model.lm_head.__dict__["forward"] == nn.Linear.forward.__get__(model.lm_head)
    assert "token_logps" not in model(input_ids=batch["input_ids"], labels=batch["input_ids"])


def test_save_pretrained_of_a_fused_model(tmp_path: Path) -> None:
    model = build("llama", tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "unfused")
    with fuse_head(model, loss=LOSS):
        model(**make_batch())
        model.save_pretrained(tmp_path / "fused")
    one, two = (
        {p.name: p.read_bytes() for p in (tmp_path / name).iterdir()}
        for name in ("unfused", "fused")
    )
    assert one == two
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert torch.equal(reloaded.lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_resized_vocabulary(tied: bool) -> None:
    model = build("llama", tie_word_embeddings=tied)
    with fuse_head(model, loss=LOSS, mean_logits=True):
        model(**make_batch())
        model.resize_token_embeddings(
            VOCAB_SIZE + 14
        )  # 345, no multiple of 64; ids above the old V
        batch = make_batch(vocab_size=VOCAB_SIZE + 14)
        batch["labels"][0, 4] = batch["input_ids"][0, 4] = VOCAB_SIZE + 13
        ours = fused_step(model, batch)
    assert_same_step(ours, unfused_step(model, batch))


def test_frozen_head_gets_no_gradient() -> None:
    model = build("phi")
    model.lm_head.requires_grad_(False)
    batch = make_batch()
    expected = unfused_step(model, batch)
    with fuse_head(model, loss=LOSS):
        ours = fused_step(model, batch)
    assert "lm_head.weight" not in ours.gradients
    assert_same_step(ours, expected)


def test_evaluation_builds_no_graph() -> None:
    model = build("llama").eval()
    with fuse_head(model, loss=LOSS), torch.inference_mode():
        output = model(**make_batch())
    assert not output.loss.requires_grad
    assert output.logits.numel() == 0


def test_on_top_of_ligers_forward() -> None:
    # Liger replaces the causal LM's forward; without labels it calls the head like anybody.
    patches = pytest.importorskip("liger_kernel.transformers")
    model = build("llama")
    batch = make_batch()
    expected = unfused_step(model, batch)
    parts = {"rope": False, "rms_norm": False, "swiglu": False}  # Triton kernels need a GPU
    patches.apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=True, **parts)
    assert "liger" in inspect.unwrap(model.forward).__module__
    with fuse_head(model, loss=LOSS):
        assert_same_step(fused_step(model, batch), expected)


def test_a_call_from_within_a_fused_call_finds_the_models_own_head() -> None:
    model = build("llama")
    batch = make_batch()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    expected, plain = unfused_step(model, batch), model(**inputs).logits
    inner: list[Any] = []

    def call_again(*_: Any) -> None:
        if not inner:
            inner.append(None)
            inner.extend([model(**inputs).logits, model(**batch).token_logps])

    with fuse_head(model, loss=LOSS):
        model.model.norm.register_forward_hook(call_again)
        assert_same_step(fused_step(model, batch), expected)
    assert torch.equal(inner[1], plain)
    assert_near("inner", inner[2], expected.token_logps, 1e-5)
