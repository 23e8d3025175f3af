"""The documentation site's hooks: pages and links of the whole repository, formulas as MathML.

mkdocs knows the folder `docs` only, and GitHub shows all of the repository: both show the same
files. Pages of other folders (`OUTSIDE`) are taken into the site; a link to anything else in the
repository becomes a link to the repository where its address is known, and text where it is not. A
link to nothing stops the build. Formulas are translated when the site is built, so that a page
needs no script and nothing from elsewhere.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# File of the repository -> page of the site.
OUTSIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "examples/README.md": "examples.md",
}
_FENCED = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
_LINK = re.compile(
    r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)"
)
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, *, config: Any) -> Files:
    """Take the pages of other folders into the site."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Point every link where it leads on the site."""
    del config
    uri = page.file.src_uri
    source = next((name for name, each in OUTSIDE.items() if each == uri), f"docs/{uri}")

    def link(found: re.Match[str]) -> str:
        image, text, target, anchor = found.groups(default="")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        name = OUTSIDE.get(path, path.removeprefix("docs/"))
        if files.get_file_from_path(name) is not None:
            relative = posixpath.relpath(name, posixpath.dirname(uri) or ".")
            return f"{image}[{text}]({relative}{anchor})"
        if not (ROOT / path).exists():
            raise PluginError(f"{source}: {target} does not exist")
        return f"{image}[{text}]({address}/{path})" if (address := repository()) else text

    # Every second part is a block of code, shown as it stands.
    parts = _FENCED.split(markdown)
    parts[::2] = [_LINK.sub(link, part) for part in parts[::2]]
    return "".join(parts)


def on_page_content(html: str, *, page: Any, config: Any, files: Files) -> str:
    """Formulas as MathML, which browsers show by themselves."""
    del page, config, files

    def formula(found: re.Match[str]) -> str:
        display = "block" if found[1] == "div" else "inline"
        latex = found[2].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
        return str(convert(latex, display=display))

    return _FORMULA.sub(formula, html)


def repository() -> str:
    """Address of the repository's files; "" where it is not known (GitHub's runners say it)."""
    names = ("GITHUB_SERVER_URL", "GITHUB_REPOSITORY")
    known = [os.environ[name] for name in names if name in os.environ]
    return "/".join([*known, "blob", "main"]) if len(known) == len(names) else ""
