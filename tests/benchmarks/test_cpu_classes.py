"""The benchmark of CPUs without bfloat16 GEMMs, at a size that takes seconds; and what it found."""

import json

import pytest

from benchmarks.cpu_classes import CLASSES, FILE, IMPLEMENTATIONS, MODES, of_class
from benchmarks.results import FOLDER


def test_every_mode_is_measured() -> None:
    rows = of_class("AVX2", tiny=True)
    assert len(rows) == len(MODES) * len(IMPLEMENTATIONS)
    for row in rows:
        assert row["seconds"] > 0
        assert row.get("dhidden_error", 0) < 2e-2


def test_the_committed_figures_show_no_cliff() -> None:
    files = sorted(FOLDER.glob(f"*/{FILE}"))
    if not files:
        pytest.skip("no committed results")
    for path in files:
        rows = json.loads(path.read_text())["results"]
        assert {row["class"] for row in rows} == set(CLASSES)
        ours = [row for row in rows if row["implementation"] == "orpo_kernels"]
        assert max(row["over_float32_gemm"] for row in ours) < 5
