"""Fusings of one model: a stack for everybody, and what a thread enters for itself."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orpo_kernels import ORPOLoss
from orpo_kernels.integrations.transformers import fuse_head, unfuse_head
from tests.integrations.helpers import make_batch
from tests.tiny_models import build

WEAK, STRONG = ORPOLoss(0.1), ORPOLoss(5.0)


def weight_of(model: nn.Module) -> float | None:
    """The beta that serves a call now, read off its result; None: the model's own loss."""
    batch = make_batch()
    if "fused" not in repr(model):
        batch.pop("nll_labels")
    output = model(**batch)
    if not hasattr(output, "orpo"):
        return None
    orpo = output.orpo
    return round(float((orpo.loss.detach() - orpo.nll_loss) / orpo.or_loss), 4)


def test_leaving_an_inner_fusing_restores_the_outer_one() -> None:
    model = build("llama")
    with fuse_head(model, loss=WEAK):
        assert weight_of(model) == 0.1
        with fuse_head(model, loss=STRONG):
            assert weight_of(model) == 5.0
        assert weight_of(model) == 0.1
    assert weight_of(model) is None


def test_a_second_fusing_does_not_change_the_first_ones_options() -> None:
    model = build("llama")
    first = fuse_head(model, loss=WEAK, mean_logits=True)
    second = fuse_head(model, loss=STRONG)
    assert model(**make_batch()).mean_logits is None
    second.unfuse()
    assert weight_of(model) == 0.1
    assert model(**make_batch()).mean_logits.shape == (4,)
    first.unfuse()
    assert weight_of(model) is None


@pytest.mark.parametrize("leave", [0, 1])
def test_fusings_are_undone_in_any_order(leave: int) -> None:
    model = build("llama")
    fused = [fuse_head(model, loss=WEAK), fuse_head(model, loss=STRONG)]
    fused[1 - leave].unfuse()
    assert weight_of(model) == (0.1, 5.0)[leave]
    fused[1 - leave].unfuse()  # a second call does nothing
    assert weight_of(model) == (0.1, 5.0)[leave]
    fused[leave].unfuse()
    assert weight_of(model) is None
    assert "forward" not in model.__dict__
    assert "forward" not in model.lm_head.__dict__


def test_unfuse_head_undoes_them_all_and_a_handle_fuses_again() -> None:
    model = build("llama")
    first, _ = fuse_head(model, loss=WEAK), fuse_head(model, loss=STRONG)
    unfuse_head(model)
    unfuse_head(model)
    assert weight_of(model) is None
    assert not first.is_fused
    first.fuse()
    first.fuse()
    assert weight_of(model) == 0.1
    first.unfuse()
    assert weight_of(model) is None
    with first, first:
        assert weight_of(model) == 0.1
    assert not first.is_fused


def test_leaving_the_inner_of_two_withs_of_one_handle_keeps_it_fused() -> None:
    model = build("llama")
    with fuse_head(model, loss=WEAK) as fused:
        with fused:
            pass
        assert weight_of(model) == 0.1
    assert weight_of(model) is None


def test_paused_calls_are_the_unfused_models() -> None:
    model = build("llama")
    batch = make_batch(pairs=1)
    inputs = {"input_ids": batch["input_ids"], "labels": batch["input_ids"]}
    expected = model(**inputs)
    one = {name: value[:1] for name, value in inputs.items()}
    expected_one = model(**one)
    with fuse_head(model, loss=WEAK) as fused:
        with fused.paused():
            output = model(**inputs)
            assert type(output) is type(expected)
            assert torch.equal(output.loss, expected.loss)
            assert torch.equal(output.logits, expected.logits)
            assert torch.equal(model(**one).loss, expected_one.loss)
            assert "fused" not in repr(model)
            with fused.active():
                assert weight_of(model) == 0.1
            assert weight_of(model) is None
        assert weight_of(model) == 0.1


def test_active_fuses_for_a_call_at_a_time() -> None:
    model = build("llama")
    fused = fuse_head(model, loss=WEAK)
    fused.unfuse()
    for _ in range(2):
        with fused.active():
            assert weight_of(model) == 0.1
        assert weight_of(model) is None
        assert "forward" not in model.__dict__
        assert "forward" not in model.lm_head.__dict__


def test_two_trainers_on_one_model_are_kept_apart() -> None:
    model = build("llama")
    trainers = [fuse_head(model, loss=loss) for loss in (WEAK, STRONG)]
    for fused in trainers:
        fused.unfuse()
    for _ in range(2):
        for fused, beta in zip(trainers, (0.1, 5.0), strict=True):
            with fused.active():
                assert weight_of(model) == beta
    fuse_head(model, loss=ORPOLoss(2.0))  # what the user fuses is not the trainers' either
    with trainers[0].active(), trainers[1].active():
        assert weight_of(model) == 5.0
    assert weight_of(model) == 2.0


def test_the_self_check_of_a_handle_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    from orpo_kernels.integrations import call

    checks: list[Any] = []
    own = call.SelfCheck

    def counted(*args: Any) -> Any:
        checks.append(None)
        return own(*args)

    monkeypatch.setattr(call, "SelfCheck", counted)
    model = build("llama")
    fused = fuse_head(model, loss=WEAK)
    assert fused.transform is None
    for _ in range(2):
        model(**make_batch())
        fused.unfuse()
        with fused.active():
            model(**make_batch())
        with fused:
            model(**make_batch())
        fused.fuse()
    assert fused.transform is not None
    assert len(checks) == 1


def test_a_failing_call_leaves_the_fusing_it_entered() -> None:
    model = build("llama")
    fused = fuse_head(model, loss=WEAK)
    fused.unfuse()
    for context in (fused.active, lambda: fused):
        hook = model.model.norm.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt), context():
            model(**make_batch())
        hook.remove()
        assert weight_of(model) is None
        assert "forward" not in model.lm_head.__dict__


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def test_entering_is_refused_before_anything_is_changed() -> None:
    model = build("llama")
    fused = fuse_head(model, loss=WEAK)
    fused.unfuse()
    head, model.lm_head = model.lm_head, nn.Identity()
    before = dict(model.__dict__)
    with pytest.raises(NotImplementedError, match="Identity"), fused.active():
        pass
    assert dict(model.__dict__) == before
    model.lm_head = head
    with fused.active():
        assert weight_of(model) == 0.1


def test_generators_that_take_turns_each_keep_their_own() -> None:
    model = build("llama")
    trainers = [fuse_head(model, loss=loss) for loss in (WEAK, STRONG)]
    for fused in trainers:
        fused.unfuse()

    def steps(fused: Any) -> Any:
        with fused.active():
            while True:
                yield weight_of(model)

    one, other = (steps(fused) for fused in trainers)
    assert [next(one), next(other)] == [0.1, 5.0]
    one.close()  # not the one that was entered last
    assert next(other) == 5.0
    other.close()
    assert weight_of(model) is None
    assert "forward" not in model.__dict__


def test_repr_says_that_the_head_is_fused() -> None:
    model = build("llama")
    own = repr(model)
    with fuse_head(model, loss=WEAK):
        assert "head fused by orpo_kernels" in repr(model)
        assert repr(WEAK) in repr(model)
    assert repr(model) == own
    with fuse_head(model):
        assert "returns log-probs" in repr(model)
        assert "ORPOLoss" not in repr(model)


def test_repr_keeps_what_the_model_says_itself() -> None:
    model = build("llama")
    model.extra_repr = lambda: "its own words"
    with fuse_head(model):
        assert "its own words\n" in repr(model)
        assert "fused" in repr(model)
    assert "its own words" in repr(model)
    assert "fused" not in repr(model)


def test_an_odd_batch_is_told_that_the_head_is_fused() -> None:
    model = build("llama")
    ids = make_batch()["input_ids"][:3]
    with fuse_head(model, loss=WEAK) as fused:
        with pytest.raises(ValueError, match=r"LlamaForCausalLM is fused.*got 3.*fused\.paused"):
            model(input_ids=ids, labels=ids)
        with fused.paused():
            assert model(input_ids=ids, labels=ids).loss > 0
    with fuse_head(model):  # no loss, no pairs
        assert model(input_ids=ids, labels=ids).token_logps.shape == ids.shape


@pytest.mark.parametrize("prepare", [lambda model: None, lambda model: fuse_head(model, loss=WEAK)])
def test_a_model_is_freed_by_del(prepare: Callable[[nn.Module], Any]) -> None:
    gc.collect()
    gc.disable()
    try:
        model = build("llama")
        fused = prepare(model)
        output = model(**{k: v for k, v in make_batch().items() if fused or k != "nll_labels"})
        output.loss.backward()
        if fused:
            with fused.active(), fused.paused():
                pass
        alive = weakref.ref(model)
        del model, fused, output
        assert alive() is None
    finally:
        gc.enable()


def test_a_handle_keeps_its_model() -> None:
    fused = fuse_head(build("llama"), loss=WEAK)
    assert weight_of(fused.model) == 0.1


def test_small_tensors_name_their_device() -> None:
    # Where somebody has set a default device, a tensor that does not say where it belongs is lost.
    model = build("mixtral")
    batch: dict[str, Tensor] = make_batch()
    with fuse_head(model, loss=WEAK, mean_logits=True):
        expected = model(**batch, num_pairs=4, num_nll_tokens=40)
    with fuse_head(model, loss=WEAK, mean_logits=True), torch.device("meta"):
        output = model(**batch, num_pairs=4, num_nll_tokens=40)
        output.loss.backward()
        assert torch.equal(output.loss, expected.loss)
        assert torch.equal(output.mean_logits, expected.mean_logits)
        for name, value in output.orpo_terms.items():
            assert value.device.type == "cpu", name
