"""Every argument of TRL's ORPOConfig: accepted with its meaning, or refused by name."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainingArguments
from trl.experimental.orpo import ORPOConfig as TRLConfig
from trl.experimental.orpo import ORPOTrainer as TRLTrainer

from orpo_kernels.training import ORPOConfig, ORPOTrainer

PAGE = (Path(__file__).parents[2] / "docs" / "arguments.md").read_text()


def defaults(kind: Any) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(kind):
        made = field.default_factory is not dataclasses.MISSING
        found[field.name] = field.default_factory if made else field.default
    return found


def table(heading: str) -> dict[str, list[str]]:
    """The rows of a section's table: argument to the other cells."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return {
        name: [cell.strip() for cell in cells.split("|")]
        for name, cells in re.findall(r"^\| `(\w+)` \|(.*)\|$", section, flags=re.MULTILINE)
    }


BASE, TRL, OURS = defaults(TrainingArguments), defaults(TRLConfig), defaults(ORPOConfig)


def test_the_page_has_every_argument() -> None:
    changed = {name for name in BASE if name in TRL and TRL[name] != BASE[name]}
    assert set(table("TRL's arguments")) == (TRL.keys() - BASE.keys()) | changed
    assert set(table("Ours")) == OURS.keys() - TRL.keys()
    assert OURS.keys() >= TRL.keys()


def test_defaults_are_trls() -> None:
    # Its own default is decided when it is known which of its two names this transformers reads.
    different = {name for name in TRL if TRL[name] != OURS[name]}
    assert different == {"gradient_checkpointing"}
    assert ORPOConfig("unused", use_cpu=True).gradient_checkpointing is True
    for section, values in (("TRL's arguments", TRL), ("Ours", OURS)):
        for name, cells in table(section).items():
            assert cells[0] == str(values[name]), name


REFUSED = {
    "max_completion_length": 9,
    "is_encoder_decoder": True,
    "generate_during_eval": True,
    "label_smoothing_factor": 0.1,
    "debug": "underflow_overflow",
}


def test_what_is_refused() -> None:
    rows = table("TRL's arguments")
    rows |= table("Arguments of transformers that mean something else here")
    assert {name for name, cells in rows.items() if "refused" in cells[-1]} == set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refusal_names_the_argument(name: str) -> None:
    with pytest.raises(NotImplementedError, match=name):
        ORPOConfig("unused", use_cpu=True, **{name: REFUSED[name]})


def test_the_page_says_which_methods_a_subclass_finds() -> None:
    theirs = {
        name for name, method in vars(TRLTrainer).items()
        if not name.startswith("_") and inspect.isfunction(getattr(method, "__func__", method))
    }  # fmt: skip
    page = table("Methods of TRL's trainer")
    assert set(page) == theirs
    for name, (said,) in page.items():
        assert (name in vars(ORPOTrainer)) == said.startswith("overridden")
        assert hasattr(ORPOTrainer, name) == (not said.startswith("none"))
