"""examples/objectives.py: each objective is TRL's own method, loss and gradient."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from trl import DPOTrainer, GRPOTrainer, KTOTrainer
from trl.experimental.cpo import CPOTrainer

from examples import objectives
from tests.tiny_models import VOCAB_SIZE, build

P, T = 3, 7  # three pairs of seven tokens


def drawn(*, requires_grad=True):
    """(2P, T) log-probs of answers of one to seven tokens, and which those are."""
    mask = torch.arange(T) < torch.randint(1, T + 1, (2 * P, 1))
    logps = torch.where(mask, -3 * torch.rand(2 * P, T), 0.0)
    return logps.requires_grad_(requires_grad), mask


def fields(**given):
    """A trainer of TRL's as its loss sees it; what only metrics read is a mock."""
    trainer = MagicMock()
    trainer.accelerator.device = torch.device("cpu")
    trainer.accelerator.gather_for_metrics = trainer.accelerator.gather = lambda each: each
    for name, value in {"aux_loss_enabled": False, "ld_alpha": None, **given}.items():
        setattr(trainer, name, value)
    return trainer


def scored(logps, mask):
    """A model of TRL's fused head, and its inputs with a prompt of one token."""
    model = MagicMock(return_value=SimpleNamespace(log_probs=logps, **dict.fromkeys(
        ("is_top1", "label_mask", "entropy", "mean_logits", "aux_loss", "loss"), mask
    )))  # fmt: skip
    completion = torch.cat((torch.zeros(2 * P, 1), mask), 1).long()
    ids = torch.zeros(2 * P, T + 1).long()
    return model, {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": completion,
    }  # fmt: skip


def agree(ours, theirs, logps, mask):
    losses = (ours, theirs)
    gradients = [torch.autograd.grad(loss, logps, retain_graph=True)[0][mask] for loss in losses]
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)
    assert gradients[0].any()


@pytest.mark.parametrize("kind", ["sigmoid", "ipo"])
def test_dpo_and_ipo(kind):
    (logps, mask), (ref, _) = drawn(), drawn(requires_grad=False)
    ref = ref * mask
    trainer = fields(
        beta=0.3, loss_types=[kind], loss_weights=[1.0], f_divergence_type="reverse_kl",
        precompute_ref_logps=True, label_smoothing=0.0, use_weighting=False,
    )  # fmt: skip
    model, inputs = scored(logps, mask)
    inputs["ref_chosen_logps"], inputs["ref_rejected_logps"] = ref.sum(1).chunk(2)
    theirs = DPOTrainer._compute_loss(trainer, model, inputs, False)
    ours = objectives.dpo(logps, ref, 0.3)
    if kind == "ipo":
        ours = objectives.ipo(logps, ref, mask, 0.3)
    agree(ours, theirs, logps, mask)


@pytest.mark.parametrize("shift", [-3.0, 3.0])  # a KL estimate below 0 counts as 0
def test_kto(shift):
    (logps, mask), (ref, _) = drawn(), drawn(requires_grad=False)
    ref = ref * mask
    desirable = torch.tensor([True, False, True, True, False, False])
    kl_logps, ref_kl_logps = torch.rand(2 * P) + shift, torch.rand(2 * P)
    trainer = fields(
        beta=0.3, loss_type="kto", precompute_ref_logps=True, calculate_KL=True,
        desirable_weight=1.0, undesirable_weight=1.0, _compute_kl_logps=lambda *_: kl_logps,
    )  # fmt: skip
    model, inputs = scored(logps, mask)
    inputs |= {"label": desirable, "ref_logps": ref.sum(1), "ref_KL_logps": ref_kl_logps}
    theirs = KTOTrainer._compute_loss(trainer, model, inputs, False)
    kl = (kl_logps - ref_kl_logps).mean()
    agree(objectives.kto(logps, ref, desirable, kl, 0.3), theirs, logps, mask)


@pytest.mark.parametrize("kind", ["simpo", "sigmoid"])
def test_simpo_and_cpo(kind):
    logps, mask = drawn()
    trainer = fields(beta=0.3, alpha=0.0, loss_type=kind, simpo_gamma=0.5, label_smoothing=0.0)
    sums = logps.sum(1) / mask.sum(1) if kind == "simpo" else logps.sum(1)
    theirs, *_ = CPOTrainer.cpo_loss(trainer, *sums.chunk(2))
    ours = objectives.simpo(logps, mask, 0.3, 0.5)
    if kind == "sigmoid":
        ours = objectives.cpo(logps, mask, 0.3, 0.7)
        # TRL's NLL is a cross-entropy: the mean over the chosen answers' tokens.
        theirs = theirs.mean() - 0.7 * logps[:P][mask[:P]].mean()
    agree(ours, theirs.mean(), logps, mask)


@pytest.mark.parametrize("kind", ["PPO", "GRPO"])
def test_ppo_and_grpo(kind):
    logps, mask = drawn()
    old, ref = ((logps.detach() + 0.3 * torch.randn(2 * P, T)) * mask for _ in range(2))
    rewards = torch.randn(2, P)
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    advantages = torch.randn(2 * P, T) if kind == "PPO" else advantages.view(-1)
    trainer = fields(
        beta=0.0 if kind == "PPO" else 0.2, loss_type="bnpo" if kind == "PPO" else "grpo",
        epsilon_low=0.2, epsilon_high=0.2, top_entropy_quantile=1.0,
        _entropy_bonus_enabled=False, off_policy_mask_threshold=None, use_vllm=False,
        importance_sampling_level="token",
        current_gradient_accumulation_steps=1,
    )  # fmt: skip
    trainer.args.delta, trainer.args.use_bias_correction_kl = None, False
    trainer._get_per_token_logps_and_entropies.return_value = (logps, logps.detach(), None)
    inputs = {
        "prompt_ids": torch.zeros(2 * P, 1).long(), "prompt_mask": torch.ones(2 * P, 1).long(),
        "completion_ids": torch.zeros(2 * P, T).long(), "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref,
    }  # fmt: skip
    theirs = GRPOTrainer._compute_loss(trainer, MagicMock(), inputs)
    if kind == "PPO":
        ours = objectives.ppo(logps, old, advantages, mask)
    else:
        ours = objectives.grpo(logps, old, ref, rewards, mask, 0.2)
    agree(ours, theirs, logps, mask)


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
def test_a_few_steps_on_a_tiny_model(name):
    ids = torch.randint(0, VOCAB_SIZE, (2 * P, 12))
    labels = ids.clone()
    labels[:, :4] = -100
    batch = {"ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    losses = objectives.train(build("llama"), batch, name, steps=4)
    assert losses[-1] < losses[0]


def test_log_probs_are_the_models():
    model, ids = build("phi"), torch.randint(0, VOCAB_SIZE, (2, 9))  # a bias in the head
    labels = torch.where(torch.rand(ids.shape) < 0.3, -100, ids)
    found = objectives.token_logps(model, ids, torch.ones_like(ids), labels)
    logits = model(ids).logits[:, :-1].log_softmax(-1)
    true = logits.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(found, torch.where(labels[:, 1:] == -100, 0.0, true))
