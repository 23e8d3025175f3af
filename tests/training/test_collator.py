"""The batch of pairs, against TRL's collator and concatenation, and its refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl.experimental.orpo import ORPOTrainer as TRLTrainer
from trl.experimental.utils import DPODataCollatorWithPadding

from orpo_kernels import ORPOLoss, fuse_head
from orpo_kernels.pair_batch import stack_batch
from orpo_kernels.training import PreferenceCollator, prepare_dataset
from tests.tiny_models import VOCAB_SIZE, build, tiny_tokenizer
from tests.training.runs import make, pairs

ROW = {
    "chosen_input_ids": [5, 6, 7],
    "chosen_labels": [-100, 6, 7],
    "rejected_input_ids": [5, 8],
    "rejected_labels": [-100, 8],
}


def row(**changes: Any) -> dict[str, Any]:
    return {**ROW, **changes}


def test_batch_equals_trl() -> None:
    tokenizer = tiny_tokenizer()
    rows = list(prepare_dataset(pairs(5), tokenizer, max_length=30))
    masked = [
        {
            **r,
            **{f"{s}_attention_mask": [1] * len(r[f"{s}_labels"]) for s in ("chosen", "rejected")},
        }
        for r in rows
    ]
    padded = DPODataCollatorWithPadding(tokenizer.pad_token_id)(masked)
    theirs = TRLTrainer.concatenated_inputs(padded, padding_value=tokenizer.pad_token_id)
    ours = stack_batch(PreferenceCollator(tokenizer)(rows))
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(ours[name], theirs[f"concatenated_{name}"]), name
    expected = ours["input_ids"].masked_fill(ours["attention_mask"] == 0, -100)
    assert torch.equal(ours["nll_labels"][:5], expected[:5])
    assert (ours["nll_labels"][5:] == -100).all()


def test_layout() -> None:
    batch = PreferenceCollator(pad_token_id=0, nll_scope="completion", pad_to_multiple_of=4)([ROW])
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[[5, 6, 7, 0], [5, 8, 0, 0]]],
        "attention_mask": [[[1, 1, 1, 0], [1, 1, 0, 0]]],
        "labels": [[[-100, 6, 7, -100], [-100, 8, -100, -100]]],
    }
    whole = PreferenceCollator(pad_token_id=0)([ROW])  # with the prompt
    assert whole["nll_labels"].tolist() == [[[5, 6, 7], [-100] * 3]]
    assert all(tensor.dtype == torch.int64 for tensor in [*batch.values(), *whole.values()])


def test_pad_token_inside_a_sequence_counts() -> None:
    # TRL tells padding by the mask, not by the id: models that pad with EOS train on EOS.
    batch = PreferenceCollator(pad_token_id=7)([ROW])
    assert batch["nll_labels"][0, 0].tolist() == [5, 6, 7]


def test_ids_out_of_range() -> None:
    collator = PreferenceCollator(tiny_tokenizer(), vocab_size=VOCAB_SIZE)
    message = rf"must be in \[0, {VOCAB_SIZE}\) .* got values from 5 to {VOCAB_SIZE}; prepare"
    with pytest.raises(ValueError, match="input_ids " + message):
        collator([row(chosen_input_ids=[5, 6, VOCAB_SIZE])])
    with pytest.raises(ValueError, match=f"labels must be in .* to {VOCAB_SIZE}; prepare"):
        collator([row(chosen_labels=[-100, 6, VOCAB_SIZE])])
    with pytest.raises(ValueError, match=r"labels must be in the vocabulary .* from -3 to 8"):
        PreferenceCollator(pad_token_id=0)([row(chosen_labels=[-100, -3, 7])])


def test_bad_rows() -> None:
    collator = PreferenceCollator(tiny_tokenizer())
    with pytest.raises(ValueError, match=r"'rejected_labels'\] missing, got .* prepare_dataset"):
        collator([{name: value for name, value in ROW.items() if name != "rejected_labels"}])
    with pytest.raises(ValueError, match="must have one length, got 3 and 2"):
        collator([row(chosen_labels=[-100, 6])])
    with pytest.raises(ValueError, match="at least one row"):
        collator([])


@pytest.mark.parametrize("column", ROW)
def test_masks_and_floats_are_no_ids(column: str) -> None:
    # Cast, a mask would train on the tokens 0 and 1, and 6.9 on the token 6.
    collator = PreferenceCollator(tiny_tokenizer())
    for values in ([6.9] * len(ROW[column]), [True] * len(ROW[column])):
        with pytest.raises(TypeError, match=f"{column} must be integer"):
            collator([row(**{column: values})])


def test_an_empty_answer_has_no_dtype() -> None:
    batch = PreferenceCollator(tiny_tokenizer())([row(rejected_input_ids=[], rejected_labels=[])])
    assert batch["labels"][0, 1].tolist() == [-100] * 3


def test_bad_arguments() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match=r"pad token is needed .* set tokenizer.pad_token"):
        PreferenceCollator(tokenizer)
    assert PreferenceCollator(tokenizer, pad_token_id=3).pad_token_id == 3
    with pytest.raises(ValueError, match=r"nll_scope must be one of .* got 'all'"):
        PreferenceCollator(tiny_tokenizer(), nll_scope="all")


@pytest.mark.parametrize("token", [-1, -100, VOCAB_SIZE])
def test_pad_token_outside_the_vocabulary(token: int) -> None:
    with pytest.raises(ValueError, match=rf"vocabulary of {VOCAB_SIZE} tokens, got id {token};"):
        PreferenceCollator(tiny_tokenizer(), pad_token_id=token, vocab_size=VOCAB_SIZE)


def test_pad_token_is_checked_when_the_vocabulary_becomes_known() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    collator = PreferenceCollator(tokenizer)
    message = rf"got id {VOCAB_SIZE} \('\[PAD\]' of a tokenizer of {VOCAB_SIZE + 1}\); .*resize_tok"
    with pytest.raises(ValueError, match=message):
        collator.vocab_size = VOCAB_SIZE
    collator.vocab_size = VOCAB_SIZE + 1


@pytest.mark.parametrize("padding_value", [None, -1, VOCAB_SIZE])
def test_trainer_names_a_pad_token_outside_the_vocabulary(
    padding_value: int | None, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    if padding_value is None:  # a pad token was added, the model not resized
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=f"pad token must be in .* of {VOCAB_SIZE} tokens"):
        make(tmp_path, processing_class=tokenizer, padding_value=padding_value)


def test_plain_trainer_names_it_in_the_first_call() -> None:
    # Nothing tells the collator of the model: the fused head looks at its first batch.
    model = build("llama")
    fuse_head(model, loss=ORPOLoss())
    batch = PreferenceCollator(pad_token_id=VOCAB_SIZE)([ROW])
    message = rf"input_ids must be in \[0, {VOCAB_SIZE}\), .* got ids from 5 to {VOCAB_SIZE}; after"
    with pytest.raises(ValueError, match=message):
        model(**batch)
    model(**PreferenceCollator(pad_token_id=VOCAB_SIZE - 1)([ROW]))
