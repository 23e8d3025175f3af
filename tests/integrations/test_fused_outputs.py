"""Fused outputs are rebuilt by whatever rebuilds outputs: transformers, accelerate, DDP, pickle."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import operations
from torch import Tensor
from torch.nn.parallel import distributed
from torch.utils import _pytree as pytree
from transformers import trainer_pt_utils

from orpo_kernels import ORPOLoss, ORPOOutput
from orpo_kernels.integrations.transformers import fuse_head
from tests.integrations.helpers import BETA, make_batch
from tests.tiny_models import build

LOSS = ORPOLoss(BETA)


def fused_output(name: str = "llama", **options: Any) -> Any:
    with fuse_head(build(name), loss=LOSS, mean_logits=True, **options) as fused:
        # Without a cache, which is nothing to gather or copy, fused or not; Trainer leaves it out.
        return fused.model(**make_batch(), use_cache=False)


@pytest.fixture(scope="module", params=["exact", "sparse"])
def output(request: pytest.FixtureRequest) -> Any:
    return fused_output(gradient=request.param)


def saved(output: Any) -> Any:
    stream = io.BytesIO()
    torch.save(output, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def detached(output: Any) -> Any:
    return operations.recursively_apply(lambda tensor: tensor.detach(), output)


def through_ddp(output: Any) -> Any:
    tensors, structure, is_rref = distributed._tree_flatten_with_rref(output)
    return distributed._tree_unflatten_with_rref(tensors, structure, is_rref)


ROUNDS: dict[str, Callable[[Any], Any]] = {
    "pytree": lambda output: pytree.tree_unflatten(*pytree.tree_flatten(output)),
    "ddp": through_ddp,
    "nested_detach": trainer_pt_utils.nested_detach,
    "recursively_apply": detached,
    "send_to_device": lambda output: operations.send_to_device(output, torch.device("cpu")),
    "convert_to_fp32": operations.convert_to_fp32,
    "gather": operations.gather,
    "pad_across_processes": lambda output: operations.pad_across_processes(output, dim=1),
    "pickle": lambda output: pickle.loads(pickle.dumps(detached(output))),
    "save": saved,
    "deepcopy": lambda output: copy.deepcopy(detached(output)),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_survives_a_round(output: Any, name: str) -> None:
    again = ROUNDS[name](output)
    assert type(again) is type(output)
    assert isinstance(again, transformers.modeling_outputs.CausalLMOutputWithPast)
    assert again.keys() == output.keys()
    for one, other in zip(pytree.tree_leaves(again), pytree.tree_leaves(output), strict=True):
        assert torch.equal(one, other) if isinstance(one, Tensor) else type(one) is type(other)
    assert again.orpo._fields == output.orpo._fields
    for field, value in output.orpo._asdict().items():
        theirs = getattr(again.orpo, field)
        if isinstance(value, Tensor):
            assert torch.equal(theirs, value)
            assert theirs.dtype == value.dtype
        elif value is not None:
            assert all(torch.equal(*pair) for pair in zip(theirs, value, strict=True))
        else:
            assert theirs is None
    assert (again.orpo.sparse is None) == (output.orpo.sparse is None)


def test_the_terms_are_those_of_the_loss() -> None:
    with fuse_head(build("llama"), loss=LOSS) as fused:
        output = fused.model(**make_batch())
    labels, nll_labels = (
        torch.nn.functional.pad(make_batch()[name][:, 1:], (0, 1), value=-100)
        for name in ("labels", "nll_labels")
    )
    expected = LOSS.from_logps(output.token_logps, labels, output.nll_token_logps, nll_labels)
    assert isinstance(output.orpo, ORPOOutput)
    for name in ORPOOutput._fields[:-1]:
        ours, theirs = getattr(output.orpo, name), getattr(expected, name)
        assert ours.shape == theirs.shape, name
        assert torch.equal(ours, theirs), name
    assert output.orpo.loss.requires_grad
    assert not any(getattr(output.orpo, name).requires_grad for name in ORPOOutput._fields[1:-1])


def test_every_tensor_is_a_plain_one() -> None:
    # The first call's logits are followed through the forward (see `follower`); none gets out.
    for name in ("llama", "gemma2", "mixtral"):
        assert {type(leaf) for leaf in pytree.tree_leaves(fused_output(name))} == {Tensor}


@pytest.mark.parametrize("gradient", ["exact", "sparse"])
def test_batches_of_predictions_are_gathered(gradient: str) -> None:
    # What Trainer does with the outputs of two batches of different length.
    outputs = [detached(fused_output(gradient=gradient)) for _ in range(2)]
    outputs[1].token_logps = outputs[1].token_logps[:, :-2]
    parts = [
        tuple(value for key, value in each.items() if key not in ("loss", "past_key_values"))
        for each in outputs
    ]
    parts = [trainer_pt_utils.nested_detach(part) for part in parts]
    whole = trainer_pt_utils.nested_numpify(trainer_pt_utils.nested_concat(*parts))
    terms = whole[-1]
    assert terms["chosen_logps"].shape == terms["pair_mask"].shape == (4,)
    assert terms["loss"].shape == terms["num_nll_tokens"].shape == (2,)
