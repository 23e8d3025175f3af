"""What users install: the source distribution is whole, the wheel holds the package alone."""

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import tomllib

from orpo_kernels import __version__
from tools import dist

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Source distribution and the wheel without C++, made as `make dist` makes them."""
    scratch, out = tmp_path_factory.mktemp("scratch"), tmp_path_factory.mktemp("out")
    source = dist.build_sdist(scratch, out)
    return source, dist.build_wheel(source, out, "off")


def test_source_distribution_is_whole(built):
    with tarfile.open(built[0]) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    wanted = [*(ROOT / "csrc").iterdir(), *(ROOT / "orpo_kernels").rglob("*.py")]
    wanted += [ROOT / name for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md")]
    assert {str(path.relative_to(ROOT)) for path in wanted} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs", "runs"))]


def test_wheel_holds_the_package_alone(built):
    wheel = built[1]
    assert wheel.name == f"orpo_kernels-{__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    about = [name for name in names if ".dist-info/" in name]
    code = set(names) - set(about)
    tree = {str(path.relative_to(ROOT)) for path in (ROOT / "orpo_kernels").rglob("*.py")}
    assert code == tree | {"orpo_kernels/py.typed"}  # no data, no tests, nothing built
    metadata = zipfile.ZipFile(wheel).read(f"orpo_kernels-{__version__}.dist-info/METADATA")
    assert f"\nVersion: {__version__}\n" in metadata.decode()
    needs = re.findall(r"^Requires-Dist: (.*)$", metadata.decode(), re.M)
    assert [each for each in needs if "extra ==" not in each] == ["torch>=2.10"]


def test_published_wheels():
    # What cibuildwheel reads of pyproject.toml, for the two architectures there are runners of.
    command = [sys.executable, "-m", "cibuildwheel", "--platform", "linux"]
    command += ["--archs", "x86_64 aarch64", "--print-build-identifiers", str(ROOT)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.split() == ["cp310-manylinux_x86_64", "cp310-manylinux_aarch64"]
    oldest = PROJECT["project"]["dependencies"][0].removeprefix("torch>=")
    assert f"torch=={oldest}.0" in PROJECT["tool"]["cibuildwheel"]["before-build"]
    repair = PROJECT["tool"]["cibuildwheel"]["linux"]["repair-wheel-command"]
    assert all(name in repair for name in dist.OF_TORCH)


def test_torch_chooses_its_triton():
    # A pin beside the one that PyPI's torch has makes `make setup` impossible there.
    pins = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"^triton==", pins, re.M)
    assert re.search(r"^torch==", pins, re.M)[0] + dist.TORCH in pins
    rule = (ROOT / "Makefile").read_text().partition(".venv/.ready:")[2]
    assert 0 < rule.index("$(TORCH)") < rule.index("import triton") < rule.index("$(EXTRAS)")
    budgets = (ROOT / "tests" / "kernels" / "test_compile.py").read_text()
    known = re.search(r"BUDGETS_OF = \((.*)\)", budgets)[1]
    installed = re.search(r"triton==(\S+)", rule)[1]
    assert f'"{installed}"' in known


def test_a_file_that_does_not_work_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    broken = tmp_path / "orpo_kernels-9.9-py3-none-any.whl"
    broken.write_bytes(b"no zip")
    found = dist.attempt(broken, sys.executable, dist.TORCH)
    assert not found["passed"]
    assert "orpo_kernels" in capsys.readouterr().err
