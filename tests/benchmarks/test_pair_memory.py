"""The measurement behind the README's first figure, at a size that takes a second."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.pair_memory import FILE, measure
from benchmarks.results import FOLDER

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_logits_are_seen_and_ours_has_none() -> None:
    # 2 x 256 positions of V = 16,000: logits of 33 MB in float32, several times over when kept.
    sizes = (256, 32, 16_000)
    ours, eager = (measure(name, "float32", "frozen", sizes) for name in ("ours-exact", "eager"))
    logits = 2 * 256 * 16_000 * 4
    assert eager["peak_bytes"] > 2 * logits
    assert ours["peak_bytes"] < 2 * logits


def test_readme_quotes_the_committed_figures() -> None:
    files = sorted(FOLDER.glob(f"*/{FILE}"))
    if not files:
        pytest.skip("no committed results")
    found = {
        (each["dtype"], each["mode"], each["implementation"]): each["peak_bytes"]
        for each in json.loads(files[-1].read_text())["results"]
    }
    ours, theirs = re.findall(r"takes \*\*(\d+) MiB\*\* .*? takes \*\*(\d+) MiB\*\*", README, re.S)[
        0
    ]
    assert int(ours) == round(found["bfloat16", "frozen", "ours-exact"] / 2**20)
    assert int(theirs) == round(found["bfloat16", "frozen", "trl-orpo"] / 2**20)
