"""The documentation site is built as `make docs` builds it; what is broken stops it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import orpo_kernels

ROOT = Path(__file__).parents[2]


def build(root, site):
    command = [sys.executable, "-m", "mkdocs", "build", "-f", str(root / "mkdocs.yml")]
    return subprocess.run(
        [*command, "-d", str(site)], cwd=root, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_public_name_is_documented(site):
    found = "".join(path.read_text() for path in (site / "api").glob("*.html"))
    public = {*orpo_kernels.__all__, *orpo_kernels._LAZY} - {"__version__"}
    headings = set(re.findall(r'<h2 id="[\w.]*?(\w+)" class="doc', found))
    assert public <= headings, public - headings


def test_formulas_are_translated(site):
    page = (site / "mathematics.html").read_text()
    assert page.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') > 20
    assert "arithmatex" not in page


def test_pages_load_nothing_from_elsewhere(site):
    for path in site.rglob("*.html"):
        loaded = re.findall(
            r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(http[^"]*)', path.read_text()
        )
        assert loaded == [], path


@pytest.mark.parametrize(
    ("link", "message"),
    [("[x](nowhere.md)", "does not exist"), ("[x](index.md#nowhere)", "nowhere")],
)
def test_a_broken_link_stops_the_build(tmp_path, link, message):
    for name in ("docs", "tools"):
        (tmp_path / name).mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Start\n\n{link}\n")
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# Page\n")
    (tmp_path / "tools" / "site.py").write_text((ROOT / "tools" / "site.py").read_text())
    settings = (ROOT / "mkdocs.yml").read_text().partition("nav:")[0]
    (tmp_path / "mkdocs.yml").write_text(settings)
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
