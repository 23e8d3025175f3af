"""Preference pairs in local files: which files a name means, and how each kind is read."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from glob import escape
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from datasets import DatasetDict, Features, Value, load_dataset, load_from_disk

from orpo_kernels.training.json_texts import with_its_texts
from orpo_kernels.training.options import OptionError


class _Kind(NamedTuple):
    """How `datasets` reads a file: its builder, and what separates the cells of a table."""

    builder: str
    separator: str | None = None


_KINDS = {
    ".json": _Kind("json"),
    ".jsonl": _Kind("json"),
    ".ndjson": _Kind("json"),
    ".parquet": _Kind("parquet"),
    ".arrow": _Kind("arrow"),
    ".csv": _Kind("csv", ","),
    ".tsv": _Kind("csv", "\t"),
}
_COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma", ".zst": "zstandard"}  # modules
ENDINGS = f"{', '.join(_KINDS)}, alone or with {', '.join(_COMPRESSIONS)} behind"
"""What the name of a file with pairs may end in, in upper or lower case."""

# The words by which `datasets` knows a split.
_SPLIT_WORDS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "dev": "validation", "val": "validation",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_LONGEST_CELL = 2**31 - 1  # characters; Python's csv takes 2**17 unless told
_NOT_PAIRS = ("dataset_info.json", "dataset_infos.json")  # what `datasets` keeps beside its files


def has_data_ending(name: str) -> bool:
    """Whether a name ends as one of a file with pairs does."""
    return _kind(name) is not None


def load_local(
    name: str, config: str | None, split: str, load: Callable[..., Any]
) -> DatasetDict | None:
    """The pairs in a file, a folder or the files that a pattern matches.

    A file and the files of a pattern are one split. Those of a folder, and of the folders in it,
    are the splits their names say (train, test, ...), or else `split`. All must be of one kind.

    Args:
        name: path or pattern (`*`, `?`, `[...]`, `**`); `~` is the home folder.
        config: configuration of the dataset, which only a copy of a hub repository has.
        split: what the pairs are called where no name says it.
        load: called as `load(what, function, *args, **kwargs)` to call a function of `datasets`.

    Returns:
        The splits; None if there is nothing of that name.

    Raises:
        OptionError: files that are not pairs, of several kinds, or none.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return _load_files(name, {split: [path]}, load)
    if path.is_dir():
        return _load_folder(name, path, config, split, load)
    if not any(character in name for character in "*?["):
        return None
    root = Path(path.anchor)
    files = sorted(each for each in root.glob(str(path.relative_to(root))) if each.is_file())
    if not files:
        raise OptionError(f"no file matches {name} (in {Path.cwd()})")
    return _load_files(name, {split: files}, load)


def _load_folder(
    name: str, path: Path, config: str | None, split: str, load: Callable[..., Any]
) -> DatasetDict:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        saved = load(name, load_from_disk, str(path))
        return saved if isinstance(saved, DatasetDict) else DatasetDict({split: saved})
    card = path / "README.md"
    if config is not None or (card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8")):
        # A copy of a hub repository, whose card says which files are what.
        repository: DatasetDict = load(name, load_dataset, str(path), config)
        return repository
    splits: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        parts = file.relative_to(path).parts
        aside = file.name in _NOT_PAIRS or any(part.startswith((".", "_")) for part in parts)
        if file.is_file() and has_data_ending(file.name) and not aside:
            splits.setdefault(_split_of(parts) or split, []).append(file)
    if not splits:
        raise OptionError(f"there is no file of pairs in the folder {name}; these end in {ENDINGS}")
    return _load_files(name, splits, load)


def _load_files(name: str, splits: dict[str, list[Path]], load: Callable[..., Any]) -> DatasetDict:
    files = [file for split in splits.values() for file in split]
    kinds: dict[_Kind, Path] = {}
    for file in files:
        kind = _kind(file.name)
        if kind is None:
            raise OptionError(f"a file of pairs must end in {ENDINGS}; got {file}")
        kinds.setdefault(kind, file)
    if len(kinds) > 1:
        first, second, *_ = kinds.values()
        raise OptionError(
            f"the files of a dataset must be of one kind, but {name} has {first.name} and "
            f"{second.name}; name one file, or a pattern that matches those of one kind"
        )
    (kind,) = kinds
    options: dict[str, Any] = {}
    if kind.separator is not None:
        options = {"sep": kind.separator, **_all_text(files, kind.separator, load)}
    # Escaped: to `datasets` these are patterns.
    paths = {split: [escape(str(file)) for file in found] for split, found in splits.items()}
    loaded: DatasetDict = load(name, load_dataset, kind.builder, data_files=paths, **options)
    if kind.builder != "json":
        return loaded
    whole = {
        split: load(name, with_its_texts, data, splits[str(split)], _opened)
        for split, data in loaded.items()
    }
    return DatasetDict(whole)


def _all_text(files: Sequence[Path], separator: str, load: Callable[..., Any]) -> dict[str, Any]:
    """Options that take every cell of a table for text: answers may read "42", "None" or "NA"."""
    first, *_ = [load(file, _column_names, file, separator) for file in files]
    return {"features": Features({name: Value("string") for name in first}), "na_filter": False}


def _column_names(file: Path, separator: str) -> list[str]:
    """What the first line of a table says, which all others must have a cell for, and no more.

    pandas fills a short row with empty text, and takes the first cells of rows that are all longer
    than the first line for an index: "a,b,c," would be prompt b, chosen c, rejected "".
    """
    limit = csv.field_size_limit(_LONGEST_CELL)
    try:
        with _opened(file) as stream:
            return _checked_rows(csv.reader(stream, delimiter=separator, strict=True))
    finally:
        csv.field_size_limit(limit)


def _opened(file: Path) -> Any:
    """The file for reading its text, line breaks as they are."""
    compression = _COMPRESSIONS.get(file.suffix.lower())
    function: Any = open if compression is None else import_module(compression).open
    return function(file, "rt", encoding="utf-8-sig", newline="")


def _checked_rows(lines: Any) -> list[str]:
    names: list[str] = []
    try:
        for row in lines:
            if not any(cell.strip() for cell in row) and len(row) < 2:
                continue  # a blank line
            names = names or row
            if len(row) != len(names):
                raise ValueError(
                    f"the row that ends in line {lines.line_num} has {len(row)} cells, but the "
                    f"first line names {len(names)} columns, {names}; put cells that hold the "
                    "separator or a line break into quotes, and no separator behind the last"
                )
    except csv.Error as error:
        raise ValueError(
            f"line {lines.line_num}: {error}; a cell that begins with a quote must end with one, "
            'and quotes in it are doubled ("")'
        ) from None
    if not names:
        raise ValueError("there is nothing in it; the first line must name the columns")
    if len({*names}) < len(names):
        raise ValueError(f"the first line must name every column once, got {names}")
    # As pandas calls the column of a data frame's index, which `to_csv` writes without a name.
    return [name or f"Unnamed: {i}" for i, name in enumerate(names)]


def _kind(name: str) -> _Kind | None:
    name = name.lower()
    for compression in _COMPRESSIONS:
        name = name.removesuffix(compression)
    return _KINDS.get(Path(name).suffix)


def _split_of(parts: Sequence[str]) -> str | None:
    """What the name of a file, or else of the folders it is in, says of its split."""
    for part in reversed(parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in _SPLIT_WORDS:
                return _SPLIT_WORDS[word]
    return None
