"""That the benchmark of the sparse gradient runs, and is right, where there is no GPU."""

import json

from benchmarks import sparse_times


def test_it_runs_and_is_right(tmp_path, capsys):
    path = tmp_path / "found.json"
    arguments = ["--device", "cpu", "--tiny", "--seconds", "60", "--json", str(path)]
    assert sparse_times.main(arguments) == 0
    rows = json.loads(path.read_text())["results"]
    titles = {row["title"] for row in rows}
    assert {
        "sparse",
        "exact",
        "eps 2^-10, 32-bit logits",
        "eps 2^-10, 16-bit logits",
        "flat sparse",
    } <= titles
    for row in rows:
        assert row["errors"]["loss"] < 1e-4, row
        if row["mode"] == "trainable":
            assert row["errors"]["dweight"] < 3e-2, row
    assert len(capsys.readouterr().out.splitlines()) == len(rows)


def test_every_row_of_a_sweep_is_one_of_its_kernel():
    swept = [job for job in sparse_times.jobs() if job.table]
    assert {job.kernel for job in swept} == {
        "_scan_kernel", "_gather_slots_kernel", "_dense_rows_kernel", "_sum_products_kernel",
        "_slot_products_kernel",
    }  # fmt: skip
    assert all(job.title.startswith(job.table[0]) for job in swept)
    # What it is timed in launches it: only a head that trains has a dW.
    trains = {job.kernel for job in swept if job.line.mode == "trainable"}
    assert trains == {"_sum_products_kernel", "_slot_products_kernel"}
