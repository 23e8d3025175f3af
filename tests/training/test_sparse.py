"""Training with the sparse gradient: what reaches the op, what is logged, how close it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig

from orpo_kernels.engine.sparse import plan
from orpo_kernels.integrations.transformers import fuse_head
from orpo_kernels.loss import ORPOLoss
from tests.integrations.helpers import make_batch
from tests.tiny_models import build
from tests.training.runs import history, make

METRICS = ("sparse/kept_share", "sparse/tail_mass", "sparse/residual_rms")


@pytest.fixture(autouse=True)
def _any_density(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "live_share", lambda device: 1.0)  # tiny models are flat


@pytest.mark.parametrize("trained", ["all", "lora", "head"])
def test_a_run_is_close_to_the_exact_one(trained: str, tmp_path: Path) -> None:
    targets = {"lora": ["q_proj"], "head": ["q_proj", "lm_head"]}.get(trained)

    def run(gradient: str, eps: float) -> list[dict[str, float]]:
        lora = None if targets is None else LoraConfig(r=2, target_modules=targets)
        return history(
            make(tmp_path / f"{gradient}{eps}", gradient=gradient, sparse_eps=eps, peft_config=lora)
        )

    exact, sparse_run, coarse = run("exact", 0.0), run("sparse", 1e-3), run("sparse", 1.0)
    for log in sparse_run[:-1]:
        assert 0 < log["sparse/kept_share"] < 1
        assert 0 < log["sparse/tail_mass"] < 0.9
        assert 0 < log["sparse/residual_rms"] <= 1e-3**0.5
    assert coarse[0]["sparse/kept_share"] == 0
    assert not any(name in log for log in exact for name in METRICS)
    # The first loss is that of the same model: after it, gradients differ.
    assert sparse_run[0]["loss"] == exact[0]["loss"]
    assert sparse_run[-2]["loss"] != exact[-2]["loss"]
    assert sparse_run[-2]["loss"] == pytest.approx(exact[-2]["loss"], rel=0.02)


def test_a_fused_call_averages_chosen_and_rejected_apart() -> None:
    batch = make_batch()
    dweights = []
    for halves in (True, False):
        model = build("llama")
        with fuse_head(model, loss=ORPOLoss(0.1), gradient="sparse", eps=0.01):
            if halves:
                output = model(**batch)
                assert output.orpo.sparse.tail_mass > 0
                output.loss.backward()
            else:
                with pytest.MonkeyPatch.context() as patch:
                    name = "orpo_kernels.integrations.call.tail_groups"
                    patch.setattr(name, lambda labels, *_: torch.zeros_like(labels))
                    model(**batch).loss.backward()
        dweights.append(model.get_output_embeddings().weight.grad)
    assert not torch.equal(*dweights)
    with fuse_head(build("llama"), loss=ORPOLoss(0.1), gradient="sparse") as fused, torch.no_grad():
        assert fused.model(**batch).orpo.sparse is None
