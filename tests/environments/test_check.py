"""The check of other trainers' environments fails where one is missing, fails or skips a test."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environments import check, overlay

PASSES = "def test_one():\n    pass\n"
SKIPS = "import pytest\ndef test_two():\n    pytest.skip('nothing here')\n"
FAILS = "def test_three():\n    raise ValueError\n"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose only environment cannot be made: its list names a file that is not there."""
    for module in (check, overlay):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    (tmp_path / "constraints").mkdir()
    (tmp_path / "constraints/trl19.txt").write_text("./gone-1.0-py3-none-any.whl\n")
    return tmp_path


def make(root: Path, tests: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment, ready; its Python is this one, its test a file of the project."""
    python = root / ".venv-trl19/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    (root / ".venv-trl19/.ready").touch()
    (root / "test_it.py").write_text(tests)
    monkeypatch.setitem(check.TRAINERS, "trl19", check.Trainer(("torch",), ("test_it.py",)))


@pytest.mark.parametrize(("more", "status"), [((), 1), (("--allow-unmade",), 0)])
def test_an_environment_that_cannot_be_made_is_never_a_pass(
    more: tuple[str, ...], status: int, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check.main(["trl19", *more]) == status
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("trl19: NOT MADE, NOT TESTED: ERROR: ")
    assert "gone-1.0-py3-none-any.whl" in last
    assert not (root / ".venv-trl19/.ready").exists()


def test_an_environment_that_takes_too_long_is_left_out(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def late(name: str, timeout: float) -> float:
        raise subprocess.TimeoutExpired(name, timeout)

    monkeypatch.setattr(overlay, "make", late)
    assert check.main(["trl19", "--minutes", "2"]) == 1
    assert capsys.readouterr().out.endswith("trl19: NOT MADE, NOT TESTED: not within 120 s\n")


@pytest.mark.parametrize(
    ("tests", "status", "result"),
    [
        (PASSES, 0, "1 passed"),
        (PASSES + SKIPS, 1, "1 passed, 1 FAILED"),
        (PASSES + FAILS, 1, "1 passed, 1 FAILED"),
        ("", 1, "0 passed"),
        ("import nothing_of_the_kind\n", 1, "0 passed, 1 FAILED"),
    ],
    ids=["passes", "skips", "fails", "no test", "no import"],
)
def test_status(
    tests: str,
    status: int,
    result: str,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make(root, tests, monkeypatch)
    assert check.main(["trl19", "--allow-unmade"]) == status
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| trl19 | torch 2.")
    assert " | there | " in row
    assert row.endswith(f"| {result} |")


def test_a_list_that_has_changed_makes_the_environment_anew(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(root, PASSES, monkeypatch)
    assert check.is_made("trl19")
    ready = (root / ".venv-trl19/.ready").stat().st_mtime
    wanted = root / "constraints/trl19.txt"
    os.utime(wanted, (ready + 1, ready + 1))
    assert not check.is_made("trl19")


def test_every_environment_has_a_list() -> None:
    root = Path(__file__).parents[2]
    for name, trainer in check.TRAINERS.items():
        assert (root / f"constraints/{name}.txt").is_file()
        for path in trainer.tests:
            assert (root / path).is_file()
