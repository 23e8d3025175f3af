"""The runner: records as it goes, continues, and names what is missing."""

import json
import subprocess

import pytest

from benchmarks import machine, run
from benchmarks.cases import label, planned


def _fake_pytest(count):
    """Stands in for the subprocess: records the next `count` results of the plan."""

    def fake(device, options, record):
        done = record.read_text().splitlines()
        for case, name in planned(device)[len(done) : len(done) + count]:
            done.append(json.dumps({"case": label(case), "implementation": name}))
        record.write_text("\n".join(done) + "\n")
        return 0

    return fake


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "commit", lambda: "abc")
    return ["--device", "cpu", "--results", str(tmp_path)]


def _only_json(folder):
    (path,) = folder.glob("*/*-*-*.json")
    return json.loads(path.read_text())


def test_a_stopped_run_goes_on_where_it_was(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "_pytest", _fake_pytest(3))
    assert run.main(options) == 0
    assert "not run yet" in capsys.readouterr().out
    first = _only_json(tmp_path)
    assert len(first["results"]) == 3
    assert run.main(options) == 0
    second = _only_json(tmp_path)
    assert len(second["results"]) == 6
    assert len(second["missing"]) == len(first["missing"]) - 3
    assert second["results"][:3] == first["results"]


def test_another_commit_starts_afresh(options, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_pytest", _fake_pytest(3))
    run.main(options)
    monkeypatch.setattr(machine, "commit", lambda: "def")
    run.main(options)
    assert len(_only_json(tmp_path)["results"]) == 3


def test_measured_again(options, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_pytest", _fake_pytest(4))
    run.main(options)
    first = _only_json(tmp_path)["results"]
    again = first[1]["implementation"]
    monkeypatch.setattr(machine, "commit", lambda: "def")

    def measures_one(device, options, record):
        done = [json.loads(line) for line in record.read_text().splitlines()]
        assert [each["implementation"] for each in done] == [
            each["implementation"] for each in first if each["implementation"] != again
        ]
        record.write_text(record.read_text() + json.dumps(first[1]) + "\n")
        return 0

    monkeypatch.setattr(run, "_pytest", measures_one)
    run.main([*options, "--again", again])
    content = _only_json(tmp_path)
    assert content["commit"] == "def"
    commits = {each["implementation"]: each.get("commit") for each in content["results"]}
    assert commits.pop(again) is None  # of this commit
    assert set(commits.values()) == {"abc"}
    monkeypatch.setattr(machine, "versions", lambda: {"torch": "0"})
    with pytest.raises(SystemExit, match="versions changed"):
        run.main([*options, "--fresh", "--again", again])
    monkeypatch.setattr(machine, "versions", lambda: content["versions"])
    with pytest.raises(SystemExit, match="clock changed"):
        run.main([*options, "--fresh", "--clock", "cpu", "--again", again])
    with pytest.raises(SystemExit, match="has none"):
        run.main([*options[:3], str(tmp_path / "other"), "--again", again])


def test_a_complete_run_leaves_only_its_json(options, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "memory_sweep", lambda device: [])
    monkeypatch.setattr(run, "_pytest", _fake_pytest(10**6))
    assert run.main(options) == 0
    assert _only_json(tmp_path)["missing"] == []
    assert len(list(tmp_path.glob("*/*"))) == 1


def test_a_tiny_run_from_end_to_end(options, tmp_path, monkeypatch):
    # It is timed in a process of its own, which pytest-benchmark refuses where tests share cores.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    # One case of the GPU's plan on a CPU, timed at tiny size: `make bench-gpu` in seconds.
    extra = ["--plan", "cuda", "--tiny", "--groups", "opt-125m and frozen and ours-exact"]
    assert run.main([*options, *extra]) == 0
    content = _only_json(tmp_path)
    assert content["sizes"] == "tiny"
    assert content["versions"]["torch"] != "missing"
    (result,) = content["results"]
    assert result["gemm_passes"] == 2
    assert result["ratio_to_gemm"]["median"] > 0
    assert result["rounds"] >= 3


def test_a_run_does_not_change_its_own_commit(tmp_path):
    # Else `make bench`, which ends by writing the report, would start afresh when it is repeated.
    def git(*words):
        names = ("-c", "user.name=x", "-c", "user.email=x@x")
        subprocess.run(["git", *names, *words], cwd=tmp_path, check=True, capture_output=True)

    assert machine.commit(tmp_path) == ""
    written = ["README.md", "docs/benchmarks.md", "benchmarks/results/m/2000-01-01.json"]
    for name in (*written, "code.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("before")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    clean = machine.commit(tmp_path)
    assert len(clean) == 10
    for name in (*written, "docs/new.png"):
        (tmp_path / name).write_text("after")
    assert machine.commit(tmp_path) == clean
    (tmp_path / "code.py").write_text("after")
    assert machine.commit(tmp_path) == clean + "+"


def test_a_machine_is_named_by_its_model():
    name = machine.slug("cpu")
    assert name == name.lower()
    assert name.endswith("-cores")
    assert " " not in name
