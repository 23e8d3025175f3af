"""Threads that share one fused model: each is served by its own call, and none is left behind."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orpo_kernels import ORPOLoss
from orpo_kernels.integrations.transformers import FusedHead, fuse_head
from tests.integrations.helpers import BETA, assert_near, make_batch, unfused_step
from tests.tiny_models import build

LOSS = ORPOLoss(BETA)
TIMEOUT = 60  # seconds; only a thread that waits for another's turn in vain takes them


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(functions)) as pool:
        return [future.result(TIMEOUT) for future in [pool.submit(f) for f in functions]]


@contextmanager
def meeting(model: nn.Module, parties: int = 2) -> Iterator[None]:
    """Calls of `model` wait for each other between the backbone and the head."""
    barrier = threading.Barrier(parties, timeout=TIMEOUT)

    def meet(*_: Any) -> None:
        barrier.wait()

    hook = model.model.norm.register_forward_hook(meet)
    try:
        yield
    finally:
        hook.remove()


class Halted:
    """A fused call in another thread, halted between the backbone and the head until resumed."""

    def __init__(self, model: nn.Module, call: Callable[[], Any]) -> None:
        self._halted, self._resumed = threading.Event(), threading.Event()
        self._pool = ThreadPoolExecutor(1)
        thread: list[int] = []

        def halt(*_: Any) -> None:
            if threading.get_ident() in thread:
                self._halted.set()
                assert self._resumed.wait(TIMEOUT)

        def run() -> Any:
            thread.append(threading.get_ident())
            return call()

        self._hook = model.model.norm.register_forward_hook(halt)
        self._future = self._pool.submit(run)
        assert self._halted.wait(TIMEOUT)

    def result(self) -> Any:
        self._resumed.set()
        try:
            return self._future.result(TIMEOUT)
        finally:
            self._hook.remove()
            self._pool.shutdown()


@pytest.fixture(params=[True, False], ids=["checked", "first"])
def fused(request: pytest.FixtureRequest) -> Iterator[FusedHead]:
    """A fused model, after its self-check and before it."""
    with fuse_head(build("llama"), loss=LOSS) as fused:
        if request.param:
            fused.model(**make_batch())
        yield fused


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def test_concurrent_fused_calls(fused: FusedHead) -> None:
    model = fused.model
    batches = [make_batch(), make_batch(pairs=1, length=6)]
    expected = [unfused_step(build("llama"), batch) for batch in batches]
    weight = model.lm_head.weight

    def step(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        output = model(**batch)
        return output.loss.detach(), torch.autograd.grad(output.loss, weight)[0]

    with meeting(model):
        results = in_threads(*(lambda batch=batch: step(batch) for batch in batches))
    for (loss, gradient), theirs in zip(results, expected, strict=True):
        assert_near("loss", loss, theirs.loss, 1e-5)
        assert_near("gradient", gradient, theirs.gradients["lm_head.weight"], 1e-5)
    fused.unfuse()
    assert "forward" not in model.lm_head.__dict__
    assert model(**inputs_of(batches[0])).logits.shape[-1] == weight.shape[0]


def test_generation_beside_a_step(fused: FusedHead) -> None:
    model = fused.model
    batch = make_batch()
    inputs = inputs_of(batch)
    logits = build("llama")(**inputs).logits
    tokens = build("llama").generate(**inputs, max_new_tokens=3, do_sample=False)
    step = Halted(model, lambda: model(**batch).loss)
    assert torch.equal(model(**inputs).logits, logits)
    assert torch.equal(model.generate(**inputs, max_new_tokens=3, do_sample=False), tokens)
    assert_near("loss", model(**batch).loss, unfused_step(build("llama"), batch).loss, 1e-5)
    assert_near("loss", step.result(), unfused_step(build("llama"), batch).loss, 1e-5)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_failing_call_beside_a_step(fused: FusedHead, error: type[BaseException]) -> None:
    model = fused.model
    batch = make_batch()
    step = Halted(model, lambda: model(**batch).loss)

    def fail(*_: Any) -> None:
        raise error("on purpose")

    hook = model.model.layers[0].register_forward_hook(fail)
    with pytest.raises(error, match="on purpose"):
        model(**batch)
    hook.remove()
    assert_near("loss", step.result(), unfused_step(build("llama"), batch).loss, 1e-5)
    assert_near("loss", model(**batch).loss, unfused_step(build("llama"), batch).loss, 1e-5)


def test_unfusing_waits_for_the_running_call(fused: FusedHead) -> None:
    model = fused.model
    batch = make_batch()
    own = build("llama")(**inputs_of(batch), labels=batch["input_ids"]).loss
    step = Halted(model, lambda: model(**batch).loss)
    fused.unfuse()
    assert torch.equal(model(**inputs_of(batch), labels=batch["input_ids"]).loss, own)
    assert_near("loss", step.result(), unfused_step(build("llama"), batch).loss, 1e-5)
    assert "forward" not in model.__dict__
    assert "forward" not in model.lm_head.__dict__


def test_what_a_thread_enters_is_its_own() -> None:
    model = build("llama")
    batch = make_batch()
    labelled = {**inputs_of(batch), "labels": batch["input_ids"]}
    own = model(**labelled).loss
    handles = [fuse_head(model, loss=ORPOLoss(beta)) for beta in (0.1, 5.0)]
    for fused in handles:
        fused.unfuse()

    def beta(fused: FusedHead) -> float:
        with fused.active():
            orpo = model(**batch).orpo
        return round(float((orpo.loss.detach() - orpo.nll_loss) / orpo.or_loss), 4)

    with meeting(model):
        assert in_threads(*(lambda fused=fused: beta(fused) for fused in handles)) == [0.1, 5.0]
    step = Halted(model, lambda: beta(handles[0]))
    assert torch.equal(model(**labelled).loss, own)  # beside it, the model is not fused
    assert beta(handles[1]) == 5.0
    assert step.result() == 0.1
    with fuse_head(model, loss=LOSS) as shared, shared.paused():
        assert torch.equal(model(**labelled).loss, own)
        assert in_threads(lambda: type(model(**batch)).__name__)[0].startswith("Fused")
    assert "forward" not in model.__dict__


def test_a_generator_closed_by_another_thread_leaves_its_own() -> None:
    model = build("llama")
    batch = make_batch()
    labelled = {**inputs_of(batch), "labels": batch["input_ids"]}
    fused = fuse_head(model, loss=LOSS)
    fused.unfuse()

    def steps() -> Iterator[Any]:
        with fused.active():
            yield model(**batch)

    generator = steps()
    assert "orpo_terms" in next(generator)
    in_threads(generator.close)
    assert type(model(**labelled)).__name__ == "CausalLMOutputWithPast"
    assert "forward" not in model.__dict__


def test_a_checkpoint_recomputed_by_another_thread(fused: FusedHead) -> None:
    # As on a GPU, where the backward, and with it the recomputation, has a thread of its own.
    model = fused.model
    batch = make_batch()
    expected = unfused_step(build("llama"), batch)
    loss = torch.utils.checkpoint.checkpoint(lambda: model(**batch).loss, use_reentrant=False)
    in_threads(loss.backward)
    for name, parameter in model.named_parameters():
        assert_near(name, parameter.grad, expected.gradients[name], 1e-5)


def test_a_dropout_of_the_heads_lora_is_left_alone_by_another_threads_check() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["lm_head"], lora_dropout=0.5)
    model = peft.get_peft_model(build("llama"), config).train()
    dropout = model.base_model.model.lm_head.lora_dropout["default"]
    seen: list[bool] = []
    own = dropout.forward
    dropout.forward = lambda hidden: (seen.append(dropout.training), own(hidden))[1]
    with fuse_head(model, loss=LOSS):
        model(**make_batch())
    assert len(seen) > 1
    assert all(seen)
