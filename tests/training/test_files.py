"""Every kind of local file under every kind of name, through `load_pairs`."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from orpo_kernels.training import options, sources
from orpo_kernels.training.files import ENDINGS

# What pandas takes for missing, for a number or for another type, quotes and line breaks.
ROWS = [
    {"prompt": "2 + 2 =", "chosen": "4", "rejected": "05"},
    {"prompt": "Nothing?", "chosen": "None", "rejected": "NA"},
    {"prompt": 'Say "a, b".\n', "chosen": "a,\tb", "rejected": "true"},
    {"prompt": "Ähnlich?", "chosen": "", "rejected": "1e5"},
]


def jsonl(rows: Sequence[dict[str, Any]] = ROWS) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


def table(path: Path, separator: str, encoding: str = "utf-8") -> None:
    with path.open("w", newline="", encoding=encoding) as stream:
        writer = csv.DictWriter(stream, list(ROWS[0]), delimiter=separator)
        writer.writeheader()
        writer.writerows(ROWS)


def packed_table(path: Path) -> None:
    table(path.with_suffix(""), ",")
    path.write_bytes(gzip.compress(path.with_suffix("").read_bytes()))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "pairs.json": lambda path: path.write_text(json.dumps(ROWS)),
    "pairs.jsonl": lambda path: path.write_bytes(jsonl()),
    "pairs.ndjson": lambda path: path.write_bytes(jsonl()),
    "pairs.parquet": lambda path: Dataset.from_list(ROWS).to_parquet(path),
    "pairs.csv": lambda path: table(path, ","),
    "excel.csv": lambda path: table(path, ",", "utf-8-sig"),
    "pairs.tsv": lambda path: table(path, "\t"),
    "pairs.csv.gz": packed_table,
    "pairs.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl())),
    "pairs.jsonl.bz2": lambda path: path.write_bytes(bz2.compress(jsonl())),
    "pairs.jsonl.xz": lambda path: path.write_bytes(lzma.compress(jsonl())),
    "pairs [1].jsonl": lambda path: path.write_bytes(jsonl()),
    "PAIRS.JSONL": lambda path: path.write_bytes(jsonl()),
    "PAIRS.Csv": lambda path: table(path, ","),
    "PAIRS.JSONL.GZ": lambda path: path.write_bytes(gzip.compress(jsonl())),
}


def load(name: object, *flags: str) -> tuple[Any, Any]:
    return sources.load_pairs(options.parse_options([f"--dataset_name={name}", *flags]))


@pytest.mark.parametrize("name", WRITERS)
def test_file_folder_and_pattern(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    WRITERS[name](folder / name)
    if name.startswith("pairs.csv.gz"):
        (folder / "pairs.csv").unlink()
    for written in (folder / name, folder, f"{folder}/*", f"{tmp_path}/**/*"):
        train, evaluation = load(written)
        assert train.to_list() == ROWS, written
        assert evaluation is None


def test_zst(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "pairs.jsonl.zst").write_bytes(zstandard.compress(jsonl()))
    assert load(tmp_path / "pairs.jsonl.zst")[0].to_list() == ROWS


@pytest.mark.parametrize("name", ["pairs.jsonl.zst", "pairs.csv.zst"])
def test_zst_without_its_library(name: str, tmp_path: Path) -> None:
    try:
        import zstandard  # noqa: F401
    except ImportError:
        (tmp_path / name).write_bytes(b"\x28\xb5\x2f\xfd" + bytes(20))  # how such a file begins
        with pytest.raises(options.OptionError, match="zstandard"):
            load(tmp_path / name)
    else:
        pytest.skip("zstandard is installed")


def test_names_in_a_folder_say_the_split(tmp_path: Path) -> None:
    parts = {
        "data/train-00000-of-00002.jsonl": 0,
        "data/train-00001-of-00002.jsonl": 1,
        "data/test1.JSONL": 2,
        "dev/pairs.jsonl": 3,
    }
    for name, index in parts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(jsonl([ROWS[index]]))
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "train.csv").write_text("a,b")
    train, evaluation = load(tmp_path)
    assert (train.to_list(), evaluation.to_list()) == (ROWS[:2], [ROWS[2]])
    train, evaluation = load(tmp_path, "--dataset_test_split=validation")
    assert evaluation.to_list() == [ROWS[3]]
    # A pattern is one split, whatever the names.
    train, evaluation = load(f"{tmp_path}/data/t*", "--dataset_test_split=none")
    assert sorted(train["chosen"]) == sorted(row["chosen"] for row in ROWS[:3])


def test_saved_datasets(tmp_path: Path) -> None:
    data = Dataset.from_list(ROWS)
    data.save_to_disk(tmp_path / "one")
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "two")
    assert load(tmp_path / "one")[0].to_list() == ROWS
    assert [len(split) for split in load(tmp_path / "two")] == [4, 1]


def test_copy_of_a_hub_repository(tmp_path: Path) -> None:
    # Its card says what a name would not.
    (tmp_path / "a.jsonl").write_bytes(jsonl())
    (tmp_path / "b.jsonl").write_bytes(jsonl(ROWS[:1]))
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: train\n    path: b.jsonl\n  - split: test\n    path: a.jsonl\n---\n"
    )
    assert [len(split) for split in load(tmp_path)] == [1, 4]


def test_home_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pairs.jsonl").write_bytes(jsonl())
    assert load("~/pairs.jsonl")[0].to_list() == ROWS


def test_refused(tmp_path: Path) -> None:
    def refused(name: object) -> str:
        with pytest.raises(options.OptionError) as refusal:
            load(name)
        return str(refusal.value)

    (tmp_path / "pairs.txt").write_text("{}")
    assert f"must end in {ENDINGS}; got" in refused(tmp_path / "pairs.txt")
    assert "there is no file of pairs in the folder" in refused(tmp_path)
    assert "no file matches" in refused(f"{tmp_path}/*.csv")
    assert "no such file or folder" in refused("absent.TSV")
    assert "no such file or folder" in refused("absent.jsonl.gz")
    table(tmp_path / "a.csv", ",")
    table(tmp_path / "b.tsv", "\t")
    assert "must be of one kind, but" in refused(tmp_path)
    assert "has a.csv and b.tsv; name one file, or a pattern" in refused(f"{tmp_path}/*.?sv")


# What pandas reads without a word, and the words of the refusal. The first line is TABLE's.
TABLE = "prompt,chosen,rejected\n"
BROKEN_TABLES = {
    "separator behind the last cell": (TABLE + "a,b,c,\nd,e,f,\n", "line 2 has 4 cells"),
    "too few cells": (TABLE + "a,b,c\n" * 3 + "d,e\n", "line 5 has 2 cells"),
    "line break without quotes": (TABLE + "a,b\rc,d\n", "line 2 has 2 cells"),
    "quotes that swallow rows": (TABLE + '"a,b,c\nd,e,f\n"g,h,i\n', "quotes in it are doubled"),
    "quotes behind a backslash": (TABLE + '"a \\"b\\" c",d,e\n', "quotes in it are doubled"),
    "a name twice": ("prompt,chosen,chosen,rejected\na,b,c,d\n", "every column once"),
    "nothing": ("", "there is nothing in it"),
    "no row": (TABLE, "there is no row in it"),
}


@pytest.mark.parametrize("what", BROKEN_TABLES)
def test_broken_table(what: str, tmp_path: Path) -> None:
    text, message = BROKEN_TABLES[what]
    (tmp_path / "pairs.csv").write_text(text, newline="")
    (tmp_path / "pairs.csv.xz").write_bytes(lzma.compress(text.encode()))
    for name in ("pairs.csv", "pairs.csv.xz"):
        with pytest.raises(options.OptionError, match=message):
            load(tmp_path / name)


def test_tables_that_are_whole(tmp_path: Path) -> None:
    # Blank lines; an index, as `DataFrame.to_csv` writes it; a cell longer than csv's own limit.
    long = "x" * 200_000
    text = f",prompt,chosen,rejected\n\n0,{long},b,c\n  \n1,d,,\n"
    (tmp_path / "pairs.csv").write_text(text)
    train, _ = load(tmp_path / "pairs.csv")
    assert train.remove_columns("Unnamed: 0").to_list() == [
        {"prompt": long, "chosen": "b", "rejected": "c"},
        {"prompt": "d", "chosen": "", "rejected": ""},
    ]


def test_json_texts_beside_other_kinds(tmp_path: Path) -> None:
    # `datasets` 5.2 makes these 42, None, He said and a list, where another row has messages.
    pytest.importorskip("datasets", "5.0")  # older ones refuse such files
    texts = ["42", "null", '"He said"', "[1, 2]", " plain", ""]
    messages = [{"role": "assistant", "content": '"so"'}]
    parts = [{"role": "assistant", "content": [{"type": "text", "text": '"so"'}]}]
    kinds = {
        "whole": [*texts, messages],
        "content": [*([{"role": "assistant", "content": text}] for text in texts), parts],
        "absent": [*texts, None, messages],
    }
    for name, answers in kinds.items():
        rows = [{"prompt": "p", "chosen": each, "rejected": " no"} for each in answers]
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(rows))
        (tmp_path / f"{name}.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
        for ending in (".jsonl", ".json.gz"):
            train, _ = load(tmp_path / f"{name}{ending}")
            got = [{key: row[key] for key in rows[0]} for row in train]
            assert got == rows, (name, ending)
    train, _ = load(f"{tmp_path}/[wa]*.jsonl")
    assert train["chosen"] == [*kinds["absent"], *kinds["whole"]]


def test_json_without_a_row(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text("")
    with pytest.raises(options.OptionError, match="there is no row in it"):
        load(tmp_path / "pairs.jsonl")


def test_documentation_names_the_endings() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data-formats.md").read_text()
    for ending in ENDINGS.replace(",", "").split():
        if ending.startswith("."):
            assert f"`{ending}`" in text, ending
