"""Two processes on gloo: the loss runs inside the wrapped forward, gradients are synchronised."""

import faulthandler
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from orpo_kernels import ORPOLoss
from orpo_kernels.integrations.transformers import fuse_head
from tests.helpers import leave
from tests.integrations.helpers import BETA, make_batch, unfused_step
from tests.tiny_models import build

peft = pytest.importorskip("peft")

WORLD = 2


def lora_on_the_head() -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    return peft.get_peft_model(build("llama"), config)


def sharded(model: nn.Module, head_apart: bool) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer)
    if head_apart:  # its weight is freed after its forward, and gathered again for the backward
        fully_shard(model.lm_head)
    return fully_shard(model)


find_unused = partial(DistributedDataParallel, find_unused_parameters=True)
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "ddp": (partial(build, "llama"), DistributedDataParallel),
    # text only leaves the vision tower unused; the first call finds the config misread, runs twice
    "ddp-unused": (partial(build, "gemma3_vl"), find_unused),
    "ddp-static": (
        partial(build, "qwen2_moe"),
        partial(DistributedDataParallel, static_graph=True),
    ),
    "ddp-lora": (lora_on_the_head, DistributedDataParallel),
    "fsdp": (partial(build, "llama", tie_word_embeddings=True), partial(sharded, head_apart=False)),
    "fsdp-head-apart": (partial(build, "llama"), partial(sharded, head_apart=True)),
}


def pair(rank: int) -> dict[str, Tensor]:
    """One of two pairs, of unequal lengths."""
    batch = {k: v[[rank, 2 + rank]] for k, v in make_batch().items()}
    return {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}


def without_types(name: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    needs_types = name == "ddp-unused"  # Gemma 3's multimodal class insists on it in training
    return {k: v for k, v in batch.items() if needs_types or k != "token_type_ids"}


def whole(gradient: Tensor) -> Tensor:
    return gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient


def train(rank: int, folder: str) -> None:
    faulthandler.enable()  # a rank that is killed says where it was
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD)
    results, models = {}, []
    for name, (make, wrap) in CASES.items():
        model = make()
        wrapped = wrap(model)
        models.append(wrapped)  # kept: DDP's reducer, ending, may wait for a thread of gloo's
        fused = fuse_head(wrapped, loss=ORPOLoss(BETA))
        for context in (nullcontext(), fused.active()):  # with the self-check and without
            wrapped.zero_grad()
            with context:
                loss = wrapped(**without_types(name, pair(rank))).loss
            fused.unfuse()
            loss.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results[name] = {n: whole(grad) for n, grad in grads.items()}
    torch.save(results, f"{folder}/{rank}.pt")
    leave()


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.spawn(train, (str(folder),), nprocs=WORLD)
    return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(WORLD)]


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("name", CASES)
def test_gradients_are_the_same_on_every_rank_and_in_one_process(
    gradients: list[dict[str, dict[str, Tensor]]], name: str
) -> None:
    first, second = (each[name] for each in gradients)
    model = CASES[name][0]()
    steps = [unfused_step(model, without_types(name, pair(rank))) for rank in range(WORLD)]
    assert steps[0].gradients.keys() <= first.keys()
    for key in steps[0].gradients:
        assert torch.equal(first[key], second[key])
        mean = sum(step.gradients[key] for step in steps) / WORLD
        torch.testing.assert_close(first[key], mean, rtol=1e-4, atol=1e-6)
