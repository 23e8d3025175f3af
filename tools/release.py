"""`make release-check TAG=v1.2.3`: every place that names the version names this one.

The version is in `orpo_kernels/version.py`; packaging, the command line and the documentation read
it there. CHANGELOG.md and CITATION.cff are written by hand, and checked here before a tag is
published.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tools.dist import ROOT, version


def faults(tag: str, root: Path = ROOT) -> Iterator[str]:
    """What keeps a tag from being published.

    Args:
        tag: name of the tag, "v" and the version.
        root: folder of the project.
    """
    expected = version(root)
    if tag != f"v{expected}":
        yield f"the tag is {tag}, orpo_kernels/version.py says {expected}"
    changes = (root / "CHANGELOG.md").read_text()
    if not re.search(rf"^## {re.escape(expected)} - \d{{4}}-\d\d-\d\d$", changes, re.MULTILINE):
        yield f'CHANGELOG.md has no heading "## {expected} - YYYY-MM-DD"'
    cited = re.search(r"^version: (.*)$", (root / "CITATION.cff").read_text(), re.MULTILINE)
    if cited is None or cited[1] != expected:
        yield f"CITATION.cff names another version than {expected}"


def main() -> int:
    """Print what is wrong; exit status 1 if anything is."""
    found = list(faults(sys.argv[1] if len(sys.argv) > 1 else ""))
    for each in found:
        print(each, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
