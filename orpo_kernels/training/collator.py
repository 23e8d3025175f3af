"""PreferenceCollator: rows of a prepared dataset to one batch of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from orpo_kernels.constants import IGNORE_INDEX
from orpo_kernels.options import check_choice, validate_labels
from orpo_kernels.pair_batch import paired
from orpo_kernels.presets import LABEL_NLL_SCOPES, ODDS_SCOPES
from orpo_kernels.training.data import COLUMNS

PADDING = "is_padding"
"""Column and key, (P,) bool, of pairs that only fill up a batch; see `EvenStream`."""

_SIDES = ("chosen", "rejected")


class PreferenceCollator:
    """Make a batch of P preference pairs on the CPU, padded on the right.

    The batch goes as it is into a model whose head is fused (`fuse_head`), with ORPOTrainer or
    with a plain `transformers.Trainer(..., args with remove_unused_columns=False)`:

    - `input_ids` (P, 2, T) int64: of each pair the chosen sequence and the rejected one;
    - `attention_mask` (P, 2, T) int64: 0 on padding;
    - `labels` (P, 2, T) int64: answer tokens, -100 elsewhere, not shifted;
    - `nll_labels` (P, 2, T) int64, unless nll_scope="completion": tokens of the NLL, the chosen
      prompts and answers; rejected ones all -100. Without, `labels` are those of the NLL.

    Whatever cuts, joins or gathers it along dimension 0 does so between two pairs.

    Args:
        processing_class: tokenizer (or processor) that knows the pad token.
        pad_token_id: id to pad with instead.
        nll_scope: "prompt+completion" or "completion"; or "prompt+completion-pad", without the
            tokens that are the pad token.
        odds_scope: "completion"; or "completion+pad", with the pad token that follows an answer
            shorter than `max_length`. Both "pad" scopes are xfactlab's, and pad with EOS unless
            `pad_token_id` is given.
        max_length: of a row, where "completion+pad" has to know it; None: no row is as long.
        vocab_size: refuse token ids of this value and above, the pad token's among them; None if
            not known. ORPOTrainer sets it.
        pad_to_multiple_of: round T up.

    Raises:
        ValueError: no pad token, one outside the vocabulary, or an unknown scope.
    """

    def __init__(
        self,
        processing_class: Any = None,
        *,
        pad_token_id: int | None = None,
        nll_scope: str = "prompt+completion",
        odds_scope: str = "completion",
        max_length: int | None = None,
        vocab_size: int | None = None,
        pad_to_multiple_of: int = 1,
    ) -> None:
        self.tokenizer = getattr(processing_class, "tokenizer", processing_class)
        check_choice("nll_scope", nll_scope, LABEL_NLL_SCOPES)
        check_choice("odds_scope", odds_scope, ODDS_SCOPES)
        if pad_token_id is None:
            name = "eos_token_id" if "pad" in nll_scope + odds_scope else "pad_token_id"
            pad_token_id = getattr(self.tokenizer, name, None)
        if pad_token_id is None:
            raise ValueError(
                "a pad token is needed to batch sequences, but the tokenizer has none; set "
                "tokenizer.pad_token (tokenizer.eos_token will do: padding is never scored), or "
                "pass pad_token_id (padding_value in ORPOConfig)"
            )
        self.pad_token_id = pad_token_id
        self.nll_scope = nll_scope
        self.odds_scope = odds_scope
        self.max_length = max_length
        self.vocab_size = vocab_size  # checks the pad token
        self.pad_to_multiple_of = pad_to_multiple_of

    @property
    def vocab_size(self) -> int | None:
        """Token ids must be below it; None if it is not known."""
        return self._vocab_size

    @vocab_size.setter
    def vocab_size(self, vocab_size: int | None) -> None:
        token = self.pad_token_id
        if vocab_size is not None and not 0 <= token < vocab_size:
            raise ValueError(
                f"the pad token must be in the model's vocabulary of {vocab_size} tokens, got id "
                f"{token}{_described(self.tokenizer, token)}; after adding tokens call "
                "model.resize_token_embeddings(len(tokenizer)), or pad with a token that is there: "
                "tokenizer.pad_token = tokenizer.eos_token, or pad_token_id (padding_value in "
                "ORPOConfig); padding is never scored"
            )
        self._vocab_size = vocab_size

    def bind(self, vocab_size: int, nll_scope: str, odds_scope: str) -> None:
        """Take the bound of the token ids from a trainer's model, unless there is one.

        Args:
            vocab_size: of the model.
            nll_scope: of the trainer's loss.
            odds_scope: of the trainer's loss.

        Raises:
            ValueError: another scope than this collator's.
        """
        if self.vocab_size is None:
            self.vocab_size = vocab_size
        for name, asked in (("nll_scope", nll_scope), ("odds_scope", odds_scope)):
            if getattr(self, name) != asked:
                raise ValueError(
                    f"data_collator.{name} is {getattr(self, name)!r} but the arguments say "
                    f"{asked!r}; set {name} in ORPOConfig to match"
                )

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate rows with the columns `COLUMNS`; others are ignored, but for `PADDING`.

        Args:
            features: the P rows.

        Returns:
            The batch described above.

        Raises:
            TypeError: ids or labels that are not integers.
            ValueError: missing columns, ids and labels of different lengths, ids or labels out of
                range.
        """
        _check_features(features)
        ids, labels = (
            [_ids(f"{side}_{kind}", row[f"{side}_{kind}"]) for side in _SIDES for row in features]
            for kind in ("input_ids", "labels")
        )
        _check_lengths(ids, labels)
        longest = max(len(sequence) for sequence in ids)
        if self.odds_scope == "completion+pad":
            labels = [self._with_pad(sequence) for sequence in labels]
            longest = max(longest, *(len(sequence) for sequence in labels))
        length = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        lengths = torch.tensor([len(sequence) for sequence in ids], device="cpu")
        real = lengths[:, None] > torch.arange(length, device="cpu")
        batch = {
            "input_ids": _pad(ids, length, self.pad_token_id),
            "attention_mask": real.long(),
            "labels": _pad(labels, length, IGNORE_INDEX),
        }
        self._check_range("input_ids", batch["input_ids"][real])
        self._check_range("labels", batch["labels"][batch["labels"] != IGNORE_INDEX])
        if self.nll_scope != "completion":
            scored = real if self.nll_scope == "prompt+completion" else self._text(batch, real)
            batch["nll_labels"] = batch["input_ids"].masked_fill(~scored, IGNORE_INDEX)
            batch["nll_labels"][len(features) :] = IGNORE_INDEX
        batch = {name: paired(stacked) for name, stacked in batch.items()}
        if PADDING in features[0]:
            batch[PADDING] = torch.tensor([row[PADDING] for row in features], device="cpu")
        return batch

    def _with_pad(self, labels: torch.Tensor) -> torch.Tensor:
        if self.max_length is not None and len(labels) >= self.max_length:
            return labels
        return torch.cat((labels, labels.new_full((1,), self.pad_token_id)))

    def _text(self, batch: Mapping[str, torch.Tensor], real: torch.Tensor) -> torch.Tensor:
        return real & (batch["input_ids"] != self.pad_token_id)

    def _check_range(self, name: str, values: torch.Tensor) -> None:
        if values.numel() == 0:
            return
        low, high = int(values.min()), int(values.max())
        if low < 0 or (self.vocab_size is not None and high >= self.vocab_size):
            vocabulary = "the vocabulary" if self.vocab_size is None else f"[0, {self.vocab_size})"
            raise ValueError(
                f"{name} must be in {vocabulary} (or {IGNORE_INDEX} in labels), got values from "
                f"{low} to {high}; prepare the dataset with the tokenizer of this model"
            )


def _check_lengths(ids: Sequence[torch.Tensor], labels: Sequence[torch.Tensor]) -> None:
    for one, other in zip(ids, labels, strict=True):
        if len(one) != len(other):
            raise ValueError(
                "input_ids and labels of a sequence must have one length, got "
                f"{len(one)} and {len(other)}; prepare_dataset makes both"
            )


def _ids(name: str, values: Any) -> torch.Tensor:
    tensor = torch.as_tensor(values, device="cpu")
    if tensor.numel() == 0:  # which torch makes floating point
        return tensor.to(torch.int64)
    validate_labels(name, tensor)
    return tensor


def _described(tokenizer: Any, token: int) -> str:
    is_own = tokenizer is not None and token == tokenizer.pad_token_id
    return f" ({tokenizer.pad_token!r} of a tokenizer of {len(tokenizer)})" if is_own else ""


def _pad(sequences: Sequence[torch.Tensor], length: int, value: int) -> torch.Tensor:
    padded = torch.full((len(sequences), length), value, dtype=torch.int64, device="cpu")
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    return padded


def _check_features(features: Sequence[Mapping[str, Any]]) -> None:
    if not features:
        raise ValueError("a batch needs at least one row, got none")
    missing = [column for column in COLUMNS if column not in features[0]]
    if missing:
        raise ValueError(
            f"rows must have the columns {list(COLUMNS)}; {missing} missing, got "
            f"{list(features[0])}; call prepare_dataset first, and with a plain "
            "transformers.Trainer set remove_unused_columns=False"
        )
