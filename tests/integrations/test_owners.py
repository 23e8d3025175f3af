"""Whose functions stand in a model's places, and where that is said."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from liger_kernel.transformers import apply_liger_kernel_to_llama
from transformers.models.llama import modeling_llama
from trl.trainer.utils import add_fused_lm_head

from orpo_kernels import ORPOLoss, cli, fuse_head
from orpo_kernels.environment import environment_report
from orpo_kernels.integrations import trl
from orpo_kernels.integrations.owners import class_owners, head_owners
from tests.integrations.helpers import make_batch
from tests.tiny_models import build

MODEL = "LlamaForCausalLM"


def names(owners: Any) -> list[tuple[str, str]]:
    return [(owner.name, owner.place) for owner in owners]


def function_of(module: str) -> Any:
    """A forward that returns no logits of a head, compiled in another module."""
    source = "def forward(self, input_ids=None, attention_mask=None, **kwargs):\n    return None\n"
    namespace = {"__name__": module}
    exec(source, namespace)
    return namespace["forward"]


def test_an_untouched_model_is_its_own() -> None:
    for family in ("llama", "gemma2", "gpt2", "mixtral"):
        assert head_owners(build(family)) == ()


def test_liger_on_the_model() -> None:
    model = build("llama")
    apply_liger_kernel_to_llama(model=model, rope=False, rms_norm=False, swiglu=False)
    assert names(head_owners(model)) == [("Liger", f"{MODEL}.forward of this model")]
    assert "liger_kernel.transformers.model.llama.lce_forward" in str(head_owners(model)[0])
    # Liger calls the head where it is given no labels, and the fused head takes them out.
    with fuse_head(model, loss=ORPOLoss()):
        assert torch.isfinite(model(**make_batch()).loss)
        assert [each.name for each in head_owners(model)][:2] == ["orpo_kernels", "Liger"]


def test_liger_on_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = modeling_llama.LlamaForCausalLM
    monkeypatch.setattr(kind, "forward", kind.forward)  # put back afterwards
    apply_liger_kernel_to_llama(rope=False, rms_norm=False, swiglu=False)
    assert ("Liger", f"{MODEL}.forward") in names(class_owners())
    assert names(head_owners(build("llama"))) == [("Liger", f"{MODEL}.forward")]


def test_trls_fused_head() -> None:
    model = build("llama")
    add_fused_lm_head(model)  # whose wrapper has the names of the model's own forward
    assert names(head_owners(model)) == [("TRL", f"{MODEL}.forward of this model")]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("cut_cross_entropy.transformers.llama", "Cut Cross Entropy"),
        ("unsloth_compiled_module_llama", "Unsloth"),
        ("axolotl.monkeypatch.models", "Axolotl"),
    ],
)
def test_the_error_of_a_head_that_is_not_called_names_the_owner(
    module: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    model.forward = types.MethodType(function_of(module), model)
    monkeypatch.setenv("UNSLOTH_RETURN_HIDDEN_STATES", "1")
    with (
        fuse_head(model, loss=ORPOLoss()),
        pytest.raises(
            RuntimeError,
            match=rf"without calling its output head.* {name} \(.*{module}.forward.*STATES=1",
        ),
    ):
        model(**make_batch())


def test_the_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("UNSLOTH_RETURN_LOGITS", "1")
    monkeypatch.setenv("UNSLOTH_IGNORED_TOKENIZER_NAMES", "one\ntwo")  # it sets lines
    monkeypatch.setenv("SOME_TOKEN", "secret")
    trl.patch_trl()
    try:
        model = build("llama")
        add_fused_lm_head(model)
        report = environment_report(model, "cpu")
    finally:
        trl.unpatch_trl()
    for said in (
        "orpo_kernels ", "torch ", "UNSLOTH_RETURN_LOGITS=1", "TOKENIZER_NAMES=one two", "cpu: ",
        "orpo_kernels (trl.experimental.orpo.ORPOTrainer.concatenated_forward is",
        f"TRL ({MODEL}.forward of this model is trl.trainer.utils",
    ):  # fmt: skip
        assert said in report
    assert "secret" not in report
    assert cli.main(["env", "--device", "cpu", "--import", "json"]) == 0
    assert "nobody, so far" in capsys.readouterr().out
    assert cli.main(["env", "--import", "no_such_module"]) == 2
    assert "No module named 'no_such_module'" in capsys.readouterr().err
