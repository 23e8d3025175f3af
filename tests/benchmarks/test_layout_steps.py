"""Steps by layout: pages say what the JSON says, and a disturbed timing is none."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import contention, layout_table

CONTENT = json.loads(layout_table.JSON.read_text())


@pytest.mark.parametrize("page", layout_table.PAGES, ids=lambda page: page.stem)
def test_pages_say_what_the_committed_json_says(page):
    text = page.read_text()
    assert text.count("<!-- steps:begin") == text.count("<!-- steps:end -->") > 0
    filled = layout_table.filled(text, *layout_table.measured())
    assert filled == text, "run `python -m benchmarks.layout_table`"


def test_the_headline_case_was_measured_without_being_disturbed():
    for name in ("TRL ORPO", "shared_prompt"):
        row = layout_table._row(CONTENT, layout_table.HEADLINE_CASE, name)
        assert row["time_ms"]["iqr"] < 0.1 * row["time_ms"]["median"]
        assert (row.get("waiting_share") or 0) <= contention.MOST_WAITING


def test_what_was_disturbed_says_so_instead_of_a_figure():
    row = {"case": "small P1", "implementation": "packed", "skipped": "others ran"}
    made = layout_table.table({**CONTENT, "results": [row, *CONTENT["results"]]})
    assert "| 1 | `packed` | | | others ran |" in made


def test_the_table_of_a_gpu():
    about = {
        "command": "python -m x", "machine": {"gpu": "NVIDIA H200"},
        "versions": {"torch": "2.11.0", "transformers": "5.17.0"},
    }  # fmt: skip
    figures = {
        "case": "1b P1", "model": "Llama-3.2-1B", "attention": "sdpa", "implementation": "padded",
        "tokens": 1000, "computed_tokens": 1100, "peak_bytes": 3 * 2**29,
        "time_ms": {"median": 50.0, "iqr": 1.0}, "tokens_per_s": {"median": 20000.0, "iqr": 400.0},
        "speed_of_trl": {"median": 1.25, "iqr": 0.01},
    }  # fmt: skip
    refused = {"case": "1b P1", "implementation": "packed", "skipped": "no mask"}
    made = layout_table.gpu_table({**about, "results": [figures, refused]})
    assert "| 1b P1 `padded` | sdpa | 1.10 | 20,000 (400) | 1.25 (0.01) | 1.50 GiB |" in made
    assert "| 1b P1 `packed` | | | | no mask | |" in made
    assert "NVIDIA H200, torch 2.11.0, transformers 5.17.0" in made
    assert layout_table.gpu_table(None) == "Not measured.\n"


def test_the_share_that_threads_waited():
    before, after = contention.Threads(100, 10), contention.Threads(160, 50)
    assert contention.waiting_share(before, after) == pytest.approx(0.4)
    assert contention.waiting_share(before, before) is None
    assert contention.waiting_share(None, after) is None


WORK = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
from benchmarks import contention
start, end = contention.threads(), time.monotonic() + 0.5
while time.monotonic() < end:
    pass
print(contention.waiting_share(start, contention.threads()))
"""


@pytest.mark.skipif(contention.threads() is None, reason="the system does not say")
def test_two_processes_on_one_core_wait_for_each_other():
    core = str(min(os.sched_getaffinity(0)))
    words = [sys.executable, "-c", WORK, core]
    runs = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    shares = [float(run.communicate(timeout=60)[0]) for run in runs]
    # Half of the time, less where the two do not quite begin together.
    assert max(shares) > contention.MOST_WAITING
