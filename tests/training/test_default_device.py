"""A default device that is not the tensors': what is made on it by accident breaks the computation.

`torch.set_default_device("cuda")` is common in scripts. Here it is "meta", whose tensors have no
values: any that enters a computation, or is read, is an error.
"""

import pytest
import torch

from orpo_kernels import estimate_memory, orpo_loss, self_test
from orpo_kernels.training.estimate_table import load_config
from tests.training.runs import make


@pytest.fixture
def _elsewhere():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("_elsewhere")
@pytest.mark.parametrize("packed", [False, True])
def test_loss(packed):
    # 4 sequences of 3 tokens, H = 2, V = 5; counts given, which are integers.
    on = {"device": "cpu"}
    hidden, weight = (torch.ones(*shape, **on).requires_grad_() for shape in ((4, 3, 2), (5, 2)))
    labels = torch.ones(4, 3, dtype=torch.int64, **on)
    counts = {"num_nll_tokens": 3, "num_pairs": 2}
    if packed:
        ids = torch.arange(4, **on).repeat_interleave(3)
        counts |= {"sequence_ids": ids, "num_sequences": 4}
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
    output = orpo_loss(hidden, weight, labels, nll_labels=labels.clone(), **counts)
    output.loss.backward()
    assert all(each.device.type == "cpu" for each in output if each is not None)
    assert weight.grad.isfinite().all()


def test_a_step_of_the_trainer(tmp_path):
    trainer = make(tmp_path, loss_normalization="global", gradient_accumulation_steps=2)
    expected = _step(trainer)
    torch.set_default_device("meta")
    try:
        assert _step(trainer) == expected
    finally:
        torch.set_default_device(None)


def _step(trainer):
    rows = [trainer.train_dataset[i] for i in range(4)]
    batches = iter([trainer.data_collator(rows[:2]), trainer.data_collator(rows[2:])])
    batches, counts = trainer.get_batch_samples(batches, 2, torch.device("cpu"))
    losses = [trainer.training_step(trainer.model, batch, counts) for batch in batches]
    trainer.model.zero_grad()
    return [float(loss) for loss in losses], trainer._train_sums.pop()


@pytest.mark.usefixtures("_elsewhere")
def test_the_self_test(capsys):
    report = self_test("cpu")
    assert report.passed, capsys.readouterr().out


@pytest.mark.usefixtures("_elsewhere")
def test_the_estimate():
    assert estimate_memory(load_config("SmolLM2-135M")).total_bytes > 0
