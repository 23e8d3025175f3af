"""A version has one place; workflows do nothing that a make target does not."""

import re
import shutil
from pathlib import Path

import pytest
import yaml

from orpo_kernels import __version__, cli
from tools import release

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()


@pytest.fixture
def project(tmp_path):
    """What a release is checked by, as it is when a release is due."""
    for name in ("orpo_kernels/version.py", "CITATION.cff"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n## {__version__} - 2030-01-31\n")
    return tmp_path


def test_a_release(project):
    assert list(release.faults(f"v{__version__}", project)) == []


@pytest.mark.parametrize(
    ("file", "text", "fault"),
    [
        ("orpo_kernels/version.py", '__version__ = "9.9.9"\n', "the tag is"),
        ("CHANGELOG.md", "# Changelog\n\n## Unreleased\n", "has no heading"),
        ("CITATION.cff", "version: 9.9.9\n", "CITATION.cff names another"),
    ],
)
def test_versions_that_differ(project, file, text, fault):
    (project / file).write_text(text)
    found = list(release.faults(f"v{__version__}", project))
    assert any(fault in each for each in found), found


def test_citation_names_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


def commands(path):
    """What a workflow runs, for each value of a matrix that it names."""
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        matrix = job.get("strategy", {}).get("matrix", {})
        for step in (each for each in job.get("steps", []) if "run" in each):
            named = re.search(r"\$\{\{ matrix\.(\w+) \}\}", step["run"])
            for value in matrix[named[1]] if named else ("",):
                yield step["run"].replace(named[0], value) if named else step["run"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_make(path):
    found = list(commands(path))
    assert found
    for command in found:
        target = re.match(r"make ([a-z0-9-]+)( [A-Z_]+=|$)", command)
        assert target, command
        stem, _, name = target[1].rpartition("-")
        of_environment = f"{stem}-%" if (ROOT / f"constraints/{name}.txt").is_file() else target[1]
        assert re.search(rf"^{of_environment}:", MAKEFILE, re.MULTILINE), command


def test_targets_are_made_and_find_their_files():
    targets = set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, re.MULTILINE))
    phony = re.search(r"^\.PHONY:((?:.*\\\n)*.*)", MAKEFILE, re.MULTILINE)[1]
    assert set(phony.replace("\\\n", "").split()) == targets  # some are named as folders are
    for path in re.findall(r"(?<=[\s])(?:tests|benchmarks)(?:/[\w*.]+)*", MAKEFILE):
        assert list(ROOT.glob(path)), path
    for module in re.findall(r"python\S* -m ((?:tests|tools|benchmarks|examples)[\w.]+)", MAKEFILE):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


def test_bug_reports_bring_what_is_needed():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug.yml").read_text())
    asked = {
        field["attributes"]["label"]: field["validations"]["required"] for field in form["body"]
    }
    for command in ("env", "selftest --json"):
        assert asked[f"Output of `orpo-kernels {command}`"]
        assert command.split()[0] in cli._COMMANDS
