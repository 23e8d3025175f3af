"""Entries that Arrow added to a row: the keys that other rows have, with null for a value.

An Arrow column of dictionaries has one set of keys. `Dataset.from_list`, Parquet and, below version
5 of `datasets`, JSON give every dictionary the keys of all of them, so that a tool call written as
`{"city": "Rome"}` reads `{"city": "Rome", "x": None}` where another row's call has an `x`. A chat
template shows both, and the model would learn to write the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import datasets

# Since version 5, which reads JSON into such columns where the keys differ from row to row.
_JSON: Any = getattr(datasets, "Json", ())


def without_filled_entries(value: Any, feature: Any) -> Any:
    """Drop the null entries of all dictionaries in a value, at every depth.

    A null that the source had looks the same in Arrow and is dropped too. Two are kept: those of
    a JSON column, which holds what its source had and nothing else; and a message's `content`,
    which chat templates compare with None.

    Args:
        value: of a row's column; other values than dictionaries and lists are returned as they are.
        feature: the column's type in `Dataset.features`; None where a stream does not know it.

    Returns:
        The value with those entries left out.
    """
    if is_json(feature):
        return value
    if isinstance(value, Mapping):
        inner = feature if isinstance(feature, Mapping) else {}
        keep = ("content",) if "role" in value else ()
        return {
            key: without_filled_entries(item, inner.get(key))
            for key, item in value.items()
            if item is not None or key in keep
        }
    if isinstance(value, list):
        of_items = getattr(feature, "feature", None)  # of a List or LargeList
        return [without_filled_entries(item, of_items) for item in value]
    return value


def is_json(feature: Any) -> bool:
    """Whether a column, or a part of one, is held as JSON."""
    return isinstance(feature, _JSON)
