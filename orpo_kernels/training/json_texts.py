"""Texts of JSON files in columns whose rows are of several kinds, kept as they were written.

Where some rows of a JSON file have text and others a list or an object, `datasets` makes a column
of its type Json, and takes a text that is JSON itself for what it says: the text 42 becomes a
number, and one in quotes loses them (version 5.2). Such columns are read again here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, concatenate_datasets

from orpo_kernels.training.nulls import is_json


def with_its_texts(
    loaded: Dataset, files: Sequence[Path], opened: Callable[[Path], Any]
) -> Dataset:
    """The rows of JSON files, with the texts of columns of several kinds as they were written.

    Args:
        loaded: what `datasets` made of the files.
        files: all of them, in the same order.
        opened: opens one, as a context, for reading text.

    Returns:
        `loaded`, or a dataset of which some columns are read again, into memory.

    Raises:
        ValueError: files of which the rows cannot be told apart.
    """
    features = loaded.features
    columns = {name: each for name, each in features.items() if _any_json(each)}
    if not columns:
        return loaded
    rows = [row for file in files for row in _read_rows(file, opened)]
    texts = (
        text for row in rows for name in columns for text in _texts(row.get(name), columns[name])
    )
    if not any(map(_is_json_text, texts)):
        return loaded
    if len(rows) != len(loaded):
        raise ValueError(
            f"{len(loaded)} rows were read, but {len(rows)} are there; the columns {list(columns)} "
            "mix texts and others: write all rows in one way, as text or as messages"
        )
    written = {
        name: [_dumped(row.get(name), each) for row in rows] for name, each in columns.items()
    }
    again = Dataset.from_dict(written, features=Features(columns))
    if len(columns) == len(features):
        return again
    return concatenate_datasets([loaded.remove_columns(list(columns)), again], axis=1)


def _read_rows(file: Path, opened: Callable[[Path], Any]) -> list[dict[str, Any]]:
    with opened(file) as stream:
        text = stream.read()
    try:
        whole = json.loads(text)
    except ValueError:  # a row in each line
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    return whole if isinstance(whole, list) else [whole]


def _any_json(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_any_json, feature.values()))
    return is_json(feature) or _any_json(getattr(feature, "feature", {}))


def _texts(value: Any, feature: Any) -> list[str]:
    """The texts that stand where `datasets` has a Json of its own."""
    if is_json(feature):
        return [value] if isinstance(value, str) else []
    if isinstance(value, list):
        return [text for item in value for text in _texts(item, feature.feature)]
    if isinstance(value, dict):
        return [text for name, item in value.items() for text in _texts(item, feature[name])]
    return []


def _is_json_text(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _dumped(value: Any, feature: Any) -> Any:
    """The value as `datasets` stores it: JSON, which it leaves alone where it is JSON already."""
    if value is None:
        return None
    if is_json(feature):
        return json.dumps(value)
    if isinstance(value, list):
        return [_dumped(item, feature.feature) for item in value]
    if isinstance(value, dict):
        return {name: _dumped(value.get(name), each) for name, each in feature.items()}
    return value
