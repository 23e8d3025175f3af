"""The snippets of docs/integrations.md: runs of other trainers take them as they stand there."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs/integrations.md").read_text()


def after(section: str, language: str = "python") -> str:
    """What stands after "# after" in the first block of a section."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)
    block = re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)[0]
    return "#" + block.split("# after")[1]
