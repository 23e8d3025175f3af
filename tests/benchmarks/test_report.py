"""Tables, pictures and README numbers come from the JSON and from nothing else."""

import json
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.cases import SWEEP
from benchmarks.results import FOLDER, behind, is_full, latest_runs, load_run
from benchmarks.run import write_results

README = Path(__file__).parents[2] / "README.md"
HEADER = {
    "schema": 1,
    "date": "2026-01-02",
    "machine": {"cpu": "A CPU", "threads": 2, "capability": "AVX2", "python": "3.11"},
    "device": "cpu",
    "command": "make bench",
    "commit": "abc",
    "versions": {"torch": "2.13"},
    "sizes": "full",
}


def _row(implementation: str, mode: str, g: float, mib: int | None) -> dict:
    peak = {} if mib is None else {"peak_bytes": mib << 20, "gradient_bytes": 1}
    return {
        "case": f"cpu {mode} trained P1 bfloat16", "implementation": implementation, "head": "cpu",
        "mode": mode, "logits": "trained", "pairs": 1, "dtype": "bfloat16", "H": 1024, "V": 128_256,
        "N": 1024, "T": 628, "scored_share": 0.815, "kept_share_64": 0.012,
        "errors": {"loss": 1e-4, "dhidden": 2e-3}, "accurate": implementation != "trl-orpo",
        "gemm_passes": 2.0, "time_ms": {"median": 100 * g, "iqr": 1.0},
        "gemm_ms": {"median": 100.0, "iqr": 1.0}, "ratio_to_gemm": {"median": g, "iqr": 0.1},
        "rounds": 5, **peak,
    }  # fmt: skip


def _point(implementation: str, vocab: int, length: int, mib: int) -> dict:
    return {
        "case": f"memory V{vocab} T{length}", "implementation": implementation, "head": SWEEP,
        "mode": "frozen", "H": 128, "V": vocab, "N": 1000, "T": length, "peak_bytes": mib << 20,
    }  # fmt: skip


RESULTS = [
    _row("ours-exact", "frozen", 2.2, 64),
    _row("eager", "frozen", 2.5, 900),
    _row("cce", "frozen", 2.1, 300),
    _row("trl-orpo", "frozen", 4.0, 30),
    _row("ours-exact", "eval", 1.1, None),
    _row("eager", "eval", 1.5, None),
    {"case": "cpu frozen trained P1 bfloat16", "implementation": "liger", "skipped": "not there"},
    _point("ours-exact", 32_000, 613, 21),
    _point("eager", 32_000, 613, 367),
    _point("ours-exact", 32_000, 1227, 22),
    _point("ours-exact", 128_256, 613, 23),
]


@pytest.fixture
def folder(tmp_path):
    machine = tmp_path / "results" / "a-cpu"
    machine.mkdir(parents=True)
    write_results(machine, HEADER, RESULTS)
    older = {**HEADER, "date": "2025-12-31"}
    write_results(machine, older, RESULTS[:1])
    write_results(machine, {**HEADER, "date": "2026-03-03", "sizes": "tiny"}, RESULTS[:1])
    return tmp_path / "results"


def test_json_comes_back_and_the_newest_full_run_counts(folder):
    (run,) = latest_runs(folder)
    assert run.path.name == "2026-01-02.json"
    assert list(run.results) == RESULTS
    assert run.header["missing"]  # most of the plan was not run
    assert json.loads(run.path.read_text())["commit"] == "abc"


def test_every_place_where_a_peer_is_ahead_is_listed(folder):
    (run,) = latest_runs(folder)
    places = [(place.what, [row["implementation"] for row in place.peers]) for place in behind(run)]
    assert places == [("faster", ["cce"]), ("leaner", ["trl-orpo"])]
    text = report.peers_ahead(run)
    assert "faster than our 2.20 g: **Apple CCE** 2.10 g" in text
    assert "leaner than our 64 MiB: **TRL ORPO** 30 MiB" in text


def test_page_and_pictures(folder, tmp_path):
    page = tmp_path / "docs" / "benchmarks.md"
    assert report.main(["--results", str(folder), "--output", str(page)]) == 0
    text = page.read_text()
    for expected in (
        "A CPU, 2 threads",
        "`make bench`",
        "commit `abc`",
        "not there",
        "*over*",
        "2.20 g",
    ):
        assert expected in text
    pictures = sorted(path.name for path in (tmp_path / "docs" / "benchmarks").iterdir())
    assert pictures == ["a-cpu-memory-t.png", "a-cpu-memory-v.png", "a-cpu-time.png"]
    for picture in pictures:
        assert f"benchmarks/{picture})" in text
        assert (tmp_path / "docs" / "benchmarks" / picture).stat().st_size < 200 << 10


def test_markers_are_filled_and_filling_twice_changes_nothing(folder):
    runs = latest_runs(folder)
    text = "before\n<!-- bench:begin cpu-headline -->\nold\n<!-- bench:end -->\nafter\n"
    filled = report.fill_markers(text, runs)
    assert "old" not in filled
    assert "frozen: 2.20 g, the best peer (Apple CCE) 2.10 g" in filled
    assert filled.startswith("before\n")
    assert filled.endswith("after\n")
    assert report.fill_markers(filled, runs) == filled


def test_the_readme_shows_the_newest_machine(folder):
    # Its folder comes last by name and first by date.
    machine = folder / "b-cpu"
    machine.mkdir()
    newer = {**HEADER, "date": "2026-01-03", "clock": "cpu"}
    newer["machine"] = {**HEADER["machine"], "cpu": "Another", "threads": 1}
    write_results(machine, newer, RESULTS)
    text = report.render_block("cpu-loss", latest_runs(folder))
    assert "Another, 1 thread, processor time; `make bench`, `benchmarks/results/b-cpu/" in text


@pytest.mark.parametrize("name", report.BLOCKS)
def test_every_block_renders(folder, name):
    text = report.render_block(name, latest_runs(folder))
    assert ("Not measured on a GPU yet" in text) == name.startswith("gpu")


def test_an_unknown_block_is_refused(folder):
    with pytest.raises(ValueError, match="bench block must be one of"):
        report.render_block("nonsense", latest_runs(folder))


def test_no_results_is_said_and_not_drawn(tmp_path, capsys):
    assert report.main(["--results", str(tmp_path / "none")]) == 1
    assert "make bench" in capsys.readouterr().out


def test_the_readme_says_what_the_committed_json_says():
    if not README.exists() or "<!-- bench:begin" not in README.read_text():
        pytest.skip("README.md has no benchmark markers yet")
    text = README.read_text()
    assert text.count("<!-- bench:begin") == text.count("<!-- bench:end -->")
    assert report.fill_markers(text, latest_runs()) == text, (
        "README.md and benchmarks/results disagree: run `python -m benchmarks.report --readme`"
    )


def test_the_page_says_what_the_committed_json_says():
    runs = latest_runs()
    if not runs:
        pytest.skip("no results are committed yet")
    text = report.DOCUMENT.read_text()
    for run in runs:
        assert report.peers_ahead(run) in text
        for group in run.groups():
            assert report._group(run, group) in text


def test_committed_results_are_small_and_well_formed():
    for path in FOLDER.glob("*/*.json"):
        assert path.stat().st_size < 200 << 10
        if not is_full(path):  # memory of a pair, parity runs: forms and tests of their own
            continue
        run = load_run(path)
        assert run.header["schema"] == 1
        assert run.results
