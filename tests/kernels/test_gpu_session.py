"""The one call for a rented GPU runs, here on a CPU: a session is too short to find a typo in."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import layout_steps
from tests.gpu import session
from tests.gpu.cases import pairwise


@pytest.mark.slow
def test_dry_run(tmp_path):
    command = [sys.executable, "-m", "tests.gpu.session", "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    session = json.loads((tmp_path / "session.json").read_text())
    names = ["tests", "budgets", "eps", "selftest", "models", "rows"]
    assert [(step["step"], step["exit"]) for step in session] == [(name, 0) for name in names]
    # Last of all: the table of budgets, that of eps, and the tests that failed.
    last = done.stdout[done.stdout.rindex((tmp_path / "budgets.txt").read_text()) :]
    lines = last.splitlines()
    assert lines[-1] == "Tests ended with 0; failed: none"
    assert [line.split()[:3] for line in lines[-11:-1]] == [
        ["frozen", "eps", f"{power},"] for power in 2 * ("2^-10", "2^-12", "2^-14", "2^-15", "0")
    ]
    modes = {row["mode"] for row in json.loads((tmp_path / "budgets.json").read_text())["results"]}
    assert modes == {"frozen", "trainable", "eval"}
    models = json.loads((tmp_path / "models.json").read_text())["results"]
    assert [row["loss"] for row in models] == [
        "TRL ORPO", "ours, 64 MiB", "ours, default", "ours, shared prompt",
    ]  # fmt: skip
    names = {kernel["name"].split()[0] for kernel in _rows(tmp_path)}
    assert names == {
        "softmax_stats", "softmax_grad_", "column_sums", "sequence_mean", "odds_ratio", "pair_loss",
    }  # fmt: skip
    (once,) = json.loads((tmp_path / "selftest.json").read_text())["selftest"]
    assert (once["name"], once["failed"]) == ("cold", [])
    assert 0 < once["seconds"] < once["wall_s"]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [each["name"] for each in rows["gemm"]] == ["linear_lse plain torch"]
    assert {each["name"].split()[0] for each in rows["sparse"]} == {
        "linear_logps",
    }  # fmt: skip


def test_what_a_dry_run_leaves_out(monkeypatch):
    # The sanitizer's selection holds every kernel, the benchmarks' arguments are theirs.
    monkeypatch.setattr(session.shutil, "which", lambda name: f"/bin/{name}")
    steps = {step.name: step for step in session.steps(Path("out"), 9.0, dry_run=False)}
    assert list(steps) == [
        "tests", "budgets", "eps", "selftest", "sparse", "models", "layouts", "rows", "sanitizer",
    ]  # fmt: skip
    assert sum(step.share for step in steps.values()) <= 1.0
    # What a session must bring is there within four minutes.
    assert 9.0 * sum(steps[name].share for name in ("tests", "budgets", "eps")) <= 4.0
    sanitizer, *rest = steps["sanitizer"].command
    small = rest[rest.index(sys.executable) :]
    assert sanitizer == "/bin/compute-sanitizer"
    done = subprocess.run(
        [*small, "--collect-only"], cwd=session.REPOSITORY, capture_output=True, text=True
    )
    chosen = {
        line.split("::")[1].split("[")[0] for line in done.stdout.splitlines() if "::" in line
    }
    assert chosen == {
        "test_stats_and_gradient", "test_column_sums", "test_sequence_mean", "test_odds_ratio",
        "test_pair_loss", "test_a_store_without_room",
    }  # fmt: skip
    words = steps["layouts"].command[3:]
    with pytest.raises(SystemExit) as ended:  # of its own accord, having understood the others
        layout_steps.main([*words, "--help"])
    assert ended.value.code == 0
    for name in ("budgets", "eps", "sparse", "models"):
        assert steps[name].command[3:5] == ["--device", "cuda"]


def test_the_names_of_failing_tests():
    # Of one process and of workers, cut short or ended; ids may hold spaces.
    log = """
tests/gpu/test_a.py::test_one[half of it-2] FAILED                       [ 10%]
tests/gpu/test_a.py::test_two PASSED                                     [ 20%]
tests/gpu/test_b.py::test_three[no room]
tests/gpu/test_b.py::test_four
[gw1] [ 30%] FAILED tests/gpu/test_b.py::test_three[no room]
[gw0] [ 30%] PASSED tests/gpu/test_b.py::test_four
ERROR tests/gpu/test_c.py::test_five - RuntimeError: CUDA error
ERROR tests/gpu/test_e.py - ModuleNotFoundError: No module named 'x'
FAILED tests/gpu/test_b.py::test_three[no room] - assert 3 <= 2
"""
    expected = ["test_a.py::test_one[half of it-2]", "test_b.py::test_three[no room]"]
    expected = [f"tests/gpu/{name}" for name in (*expected, "test_c.py::test_five", "test_e.py")]
    assert session.failing(log) == expected
    assert session.failing(f"{log}tests/gpu/test_d.py::test_six[x y] ") == [
        *expected, "tests/gpu/test_d.py::test_six[x y] (still running)",
    ]  # fmt: skip
    assert session.failing("tests/gpu/test_a.py::test_two PASSED   [ 20%]") == []


def test_a_step_ends_in_time_or_is_left_out_by_name(tmp_path, capsys):
    # A child of the step holds its output open: it is ended too.
    child = "import subprocess, sys; print('begun'); subprocess.run(['sleep', '60'])"
    step = session.Step("slow", [sys.executable, "-u", "-c", child], 0.1)
    found = session.run(step, tmp_path, 1.5, dict(os.environ))
    assert found["exit"] == 124
    assert found["seconds"] < 10
    assert (tmp_path / "slow.txt").read_text() == "begun\n"
    step = session.Step("absent", ["false"], 0.1, ("torch", "no_such_library"))
    found = session.run(step, tmp_path, 1.0, {})
    assert found["exit"] == 0
    assert found["missing"] == ["no_such_library"]
    assert "absent: left out, not installed: no_such_library" in capsys.readouterr().out


def _rows(folder):
    return json.loads((folder / "rows.json").read_text())["kernels"]


def test_two_values_in_one_case():
    cases = pairwise("abcd", [1, 2, 3], [True, False])
    assert len(cases) == 12
    for one, other, count in ((0, 1, 12), (0, 2, 8), (1, 2, 6)):
        assert len({(case[one], case[other]) for case in cases}) == count
    with pytest.raises(ValueError, match="must be the shortest"):
        pairwise("ab", [1, 2, 3], [1, 2, 3])


def test_what_workers_collect():
    # Every worker does: seconds of each if a library came with it. Of the first two that a worker
    # is given one is long.
    code = (
        "import sys, pytest; pytest.main(['-m', 'gpu', '--co', '-qq', 'tests/gpu', '-n', '0', "
        "'-p', 'no:hypothesispytest']); print(sorted({'transformers', 'trl', 'peft', 'datasets', "
        "'hypothesis', 'triton'} & sys.modules.keys()))"
    )
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=session.REPOSITORY, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
    words = [sys.executable, "-m", "pytest", "-m", "gpu", "--co", "-vv", "tests/gpu", "-n", "0"]
    done = subprocess.run(words, cwd=session.REPOSITORY, capture_output=True, text=True)
    names = re.findall(r"<Function (.*)>", done.stdout)
    assert [name.split("[")[0] for name in names[:8:2]] == [
        "test_equals_the_padded_batch", "test_equals_the_padded_batch", "test_compiled",
        "test_parts_and_their_memory",
    ]  # fmt: skip
    assert "sdpa" in names[1]
    assert "sdpa" in names[3]
