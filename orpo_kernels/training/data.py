"""Preference data: the formats, chat templates, tokenisation, truncation and labels.

A row is a prompt and two answers, as text or as lists of messages; the prompt may also be implied,
as the common beginning of two full conversations. The token ids and labels are those of TRL 1.16's
`ORPOTrainer`. Where that one stops, or trains on what was not meant, the docstrings say what is
done here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch.distributed
from datasets import Dataset, Features, IterableDataset, List, Value

from orpo_kernels.constants import IGNORE_INDEX
from orpo_kernels.training.rows import (
    RowError,
    RowOptions,
    common_length,
    looks_like_system,
    read_row,
)
from orpo_kernels.training.templates import render

COLUMNS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
"""Columns of a prepared dataset: lists of token ids; -100 in labels where no answer token is."""

_Step: TypeAlias = Callable[[Mapping[str, Any]], dict[str, Any]]
_COLUMN_TYPES = {**{column: List(Value("int64")) for column in COLUMNS}, "length": Value("int64")}
# Of a row, dropped when counted.
_STATISTICS = {"_no_answer": Value("bool"), "_max_id": Value("int64"), "_problem": Value("string")}

_NAMED_ROWS = 10

logger = logging.getLogger(__name__)


def prepare_dataset(
    dataset: Any,
    processing_class: Any,
    *,
    max_length: int = 1024,
    num_proc: int | None = None,
    vocab_size: int | None = None,
    name: str = "dataset",
    **row_options: Any,
) -> Any:
    """Tokenise a preference dataset with `datasets.map`.

    Args:
        dataset: `datasets.Dataset` (or `IterableDataset`) with columns `chosen`, `rejected` and,
            unless they contain it, `prompt`; other columns are ignored. One that already has the
            columns `COLUMNS` is returned as it is.
        processing_class: tokenizer, or processor with a `tokenizer`.
        max_length: tokens of prompt + answer to keep.
        num_proc: processes.
        vocab_size: refuse token ids of this value and above.
        name: what to call the dataset in messages.
        **row_options: of `RowOptions`: prompt_column, system_column, allow_missing_prompt,
            keep_nulls, on_bad_row.

    Returns:
        A dataset of the columns `COLUMNS`, and `length` (of the longer side, by which Trainer can
        group rows), one row for each row given that can be used. Rows whose prompt leaves no room
        for an answer stay (their pair contributes 0 to the loss); one warning counts them.

    Raises:
        TypeError: not a dataset of the `datasets` library; an unknown option.
        ValueError: no rows, missing columns, an unreadable row, a token id out of range.
    """
    rows = RowOptions(**row_options)
    columns = check_dataset(dataset, name, **row_options)
    if set(COLUMNS) <= set(columns):
        return dataset
    _warn_of_ignored(columns, rows, name)
    streamed = isinstance(dataset, IterableDataset)
    options = {} if streamed else {"num_proc": num_proc, "desc": f"Tokenizing {name}"}
    skip = rows.on_bad_row == "skip"
    reader = partial(read_row, features=dataset.features, options=rows)
    tokenize = partial(
        tokenize_pair, processing_class=processing_class, max_length=max_length, options=rows
    )
    dataset = dataset.map(
        _prepare_row,
        with_indices=True,
        fn_kwargs={"read": reader, "tokenize": tokenize, "name": name, "skip": skip},
        remove_columns=columns,
        # Not left to be inferred: a first batch of skipped rows would say that ids are nulls.
        features=Features({**_COLUMN_TYPES, **_STATISTICS}),
        **options,
    )
    if skip and streamed:
        dataset = dataset.filter(_SkipsBadRows(name), input_columns=["_problem"])
    elif skip:
        dataset = _without_bad_rows(dataset, name)
    if not streamed:
        _report_no_answer(dataset["_no_answer"][:], max_length, name)
        if vocab_size is not None:
            _check_ids(max(dataset["_max_id"][:]), vocab_size, processing_class, name)
    return dataset.remove_columns(list(_STATISTICS))


def check_dataset(dataset: Any, name: str, **row_options: Any) -> list[str]:
    """Refuse what cannot be prepared, before any time is spent on it.

    Args:
        dataset: what the user passed.
        name: what to call it in messages.
        **row_options: of `RowOptions`; the columns they name must be there.

    Returns:
        Its column names.

    Raises:
        TypeError: not a dataset of the `datasets` library.
        ValueError: no rows, or missing columns.
    """
    if isinstance(dataset, Mapping):
        raise TypeError(
            f"{name} must be one dataset, got {type(dataset).__name__} with the splits "
            f"{list(dataset)}; pass one of them"
        )
    if not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(
            f"{name} must be a datasets.Dataset, got {type(dataset).__name__}; "
            "Dataset.from_list(rows) and Dataset.from_json(path) make one"
        )
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"{name} has no rows; check the file, the split and any filter")
    columns = dataset.column_names
    if columns is None:  # a stream whose first row has not been looked at
        columns = list(next(iter(dataset.take(1)), {}))
    needed = COLUMNS if COLUMNS[0] in columns else ("chosen", "rejected")
    missing = [column for column in needed if column not in columns]
    if missing:
        raise ValueError(
            f"{name} must have the columns 'chosen', 'rejected' and, unless these contain it, "
            f"'prompt'; {missing} missing, got {columns}; rename them with dataset.rename_column"
        )
    named = () if needed is COLUMNS else RowOptions(**row_options).columns
    absent = [column for column in named if column not in columns]
    if absent:
        raise ValueError(
            f"prompt_column and system_column must name columns of {name}; {absent} missing, got "
            f"{columns}"
        )
    return list(columns)


def tokenize_pair(
    example: Mapping[str, Any],
    processing_class: Any,
    max_length: int,
    options: RowOptions | None = None,
) -> dict[str, list[int]]:
    """Token ids and labels of one row.

    Prompt and answer are tokenised together, so that tokens merge across the border as they do at
    inference; a token that holds the end of the prompt and the beginning of the answer counts as
    answer. BOS goes in front and EOS to the end where they are missing. An answer is cut where
    prompt + answer exceed `max_length`. Two differences to TRL: a prompt that is itself longer is
    cut too (its pair is not scored, so only memory is at stake), and prompts of which more than the
    last token changes in front of an answer are split at the first change, where TRL stops or
    takes the answer's first tokens for the prompt.

    Args:
        example: row as in `extract_prompt`.
        processing_class: tokenizer, or processor with a `tokenizer`.
        max_length: tokens to keep of each sequence.
        options: which columns hold the prompt.

    Returns:
        `COLUMNS`: per side the ids of prompt + answer, and labels with -100 for the prompt.

    Raises:
        ValueError: as `render`.
    """
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    prompt, chosen, rejected = render(example, processing_class, options)
    alone = _encode(tokenizer, prompt)
    row = {}
    for side, answer_text in (("chosen", chosen), ("rejected", rejected)):
        ids = _encode(tokenizer, prompt + answer_text)
        start = common_length(alone, ids)
        opening, answer = ids[:start], ids[start:]
        if tokenizer.bos_token_id is not None and opening[:1] != [tokenizer.bos_token_id]:
            opening = [tokenizer.bos_token_id, *opening]
        if tokenizer.eos_token_id is not None and answer[-1:] != [tokenizer.eos_token_id]:
            answer = [*answer, tokenizer.eos_token_id]
        row[f"{side}_input_ids"] = (opening + answer)[:max_length]
        row[f"{side}_labels"] = ([IGNORE_INDEX] * len(opening) + answer)[:max_length]
    return row


def _warn_of_ignored(columns: Sequence[str], rows: RowOptions, name: str) -> None:
    if "tools" in columns:
        logger.warning(
            "column 'tools' of %s is ignored, as TRL's ORPO trainer does; to show the tools to "
            "the chat template, put them into a column chat_template_kwargs as {'tools': ...}",
            name,
        )
    for column in columns:
        if looks_like_system(column) and column != rows.system_column:
            logger.warning(
                "column %r of %s is ignored; set system_column=%r to put its text in front of the "
                "prompts",
                column,
                name,
                column,
            )


def _prepare_row(
    example: Mapping[str, Any], index: int, read: _Step, tokenize: _Step, name: str, skip: bool
) -> dict[str, Any]:
    try:
        row = tokenize(read(example))
    except RowError as error:
        problem = f"row {index} of {name}: {error}"
        if not skip:
            raise RowError(f"{problem}; on_bad_row='skip' leaves such rows out") from error
        unused = {"length": 0, "_no_answer": False, "_max_id": 0, "_problem": problem}
        return {**{column: [] for column in COLUMNS}, **unused}
    # The first position has no predecessor to be scored from.
    scored = (
        any(label != IGNORE_INDEX for label in row[f"{side}_labels"][1:])
        for side in ("chosen", "rejected")
    )
    ids = row["chosen_input_ids"] + row["rejected_input_ids"]
    statistics = {"_no_answer": not all(scored), "_max_id": max(ids, default=0), "_problem": None}
    lengths = (len(row[f"{side}_labels"]) for side in ("chosen", "rejected"))
    return {**row, "length": max(lengths), **statistics}


def _encode(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: no warning about the length of what is about to be cut.
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _without_bad_rows(dataset: Any, name: str) -> Any:
    problems = dataset["_problem"][:]
    bad = [index for index, problem in enumerate(problems) if problem is not None]
    if not bad:
        return dataset
    if len(bad) == len(problems):
        raise ValueError(f"none of the {len(bad)} rows of {name} can be used; {problems[0]}")
    if _is_first_rank():
        logger.warning(
            "%d of %d rows of %s cannot be used and were skipped: %s%s. The first: %s",
            len(bad),
            len(problems),
            name,
            ", ".join(map(str, bad[:_NAMED_ROWS])),
            ", ..." if len(bad) > _NAMED_ROWS else "",
            problems[bad[0]],
        )
    return dataset.select([i for i, problem in enumerate(problems) if problem is None])


class _SkipsBadRows:
    """Filter of a stream, which has no end to count at: says so after 1, 10, 100, ... rows."""

    def __init__(self, name: str) -> None:
        self._name, self._count = name, 0

    def __call__(self, problem: str | None) -> bool:
        if problem is None:
            return True
        self._count += 1
        if _is_first_rank() and self._count == 10 ** (len(str(self._count)) - 1):
            logger.warning(
                "rows of %s that cannot be used and were skipped so far: %d. The last: %s",
                self._name,
                self._count,
                problem,
            )
        return False


def _is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _report_no_answer(flags: Sequence[bool], max_length: int, name: str) -> None:
    count = sum(flags)
    if count and _is_first_rank():
        logger.warning(
            "%d of %d rows of %s have no answer token left within max_length=%d: they stay but "
            "contribute 0 to the loss, and are counted as skipped_pairs. Raise max_length, or "
            "filter out long prompts.",
            count,
            len(flags),
            name,
            max_length,
        )


def _check_ids(max_id: int, vocab_size: int, processing_class: Any, name: str) -> None:
    if max_id >= vocab_size:
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        raise ValueError(
            f"token ids must be below the model's vocabulary of {vocab_size}, got {max_id} in "
            f"{name} from a tokenizer of {len(tokenizer)} tokens; use the model's own tokenizer, "
            "or model.resize_token_embeddings(len(tokenizer)) after adding tokens"
        )
