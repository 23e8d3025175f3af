"""The notebook's cells, run as they stand on a model and pairs made on the spot."""

import json
import math
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from examples import synthetic, tiny_base

NOTEBOOK = Path(__file__).parents[2] / "examples" / "qlora_t4.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def test_nothing_is_stored(notebook):
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell for cell in cells if cell.outputs or cell.execution_count] == []


@pytest.mark.slow
def test_runs_from_install_to_merged_model(notebook, tmp_path, monkeypatch):
    pairs = synthetic.preference_pairs(24)
    data = synthetic.write_jsonl(tmp_path / "pairs.jsonl", pairs)
    size = tiny_base.Size(hidden_size=32, layers=1, steps=2)
    tiny_base.build(pairs, tmp_path / "base", size)
    given = {
        "model_name": str(tmp_path / "base"), "folder": str(tmp_path / "run"), "max_length": 96,
        "data": {"path": "json", "data_files": str(data)}, "max_steps": 2,
        "num_pairs": 16, "num_heldout": 4,
    }  # fmt: skip
    (at,) = (
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())
    )
    names = {line.split(" =")[0] for line in notebook.cells[at].source.splitlines()}
    assert set(given) <= {name for each in names for name in each.split(", ")}
    lines = [f"{name} = {value!r}" for name, value in given.items()]
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell("\n".join(lines)))
    # pip finds what is installed; the caches are the test's.
    for name, value in {
        "PIP_NO_INDEX": "1",
        "HF_HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()

    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", ())
    )
    table = printed.partition("held-out accuracy")[2].splitlines()[1:4]
    assert [int(line.split()[0]) for line in table] == [0, 1, 2]
    assert all(math.isfinite(float(word)) for line in table for word in line.split())
    merged = tmp_path / "run" / "merged"
    assert "quantization_config" not in json.loads((merged / "config.json").read_text())
    assert (merged / "model.safetensors").is_file()
