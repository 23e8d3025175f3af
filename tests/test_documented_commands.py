"""Every command that README and the documentation show exists, is parsed, and the short ones run.

`make` targets are the way to run what is tested elsewhere (`make demo`, small: tests/test_demo.py);
what benchmarks print is tested in tests/benchmarks. The rest runs here, as it stands on the page.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from examples.synthetic import preference_pairs, write_jsonl
from orpo_kernels import cli
from orpo_kernels.training import options

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()
FIRST = r"(?:make|pip install|orpo-kernels|\S*python -m) "


def documented():
    """(page, command) of every shell block and of every command within a sentence."""
    for page in PAGES:
        text = page.read_text()
        fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        blocks = [block for language, block in fenced if language in ("", "bash")]
        text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        shown = [re.sub(r"^\$ |^(?:[A-Z_]+=\S+ )+|\s+# .*$", "", line) for line in lines]
        shown += re.findall(rf"(?<!`)`({FIRST}[^`\n]+)`", text)
        for command in dict.fromkeys(shown):
            if re.match(FIRST, command):
                yield pytest.param(command.strip(), id=f"{page.stem}: {command[:60]}")


COMMANDS = list(documented())


@pytest.mark.parametrize("command", COMMANDS)
def test_exists(command):
    words = shlex.split(command)
    if words[0] == "make":
        made(words[1:])
    elif words[0] == "pip":
        for extra in ",".join(re.findall(r"\[(.*?)\]", command)).split(","):
            assert not extra or re.search(rf"^{extra} = \[", PROJECT, re.MULTILINE), extra
    elif words[0] == "orpo-kernels":
        assert words[1] in cli._COMMANDS
        if words[1] in ("train", "estimate") and len(words) > 2 and words[2].endswith(".yaml"):
            # What is capital on a page is the reader's own.
            if (ROOT / words[2]).is_file() and words[1] == "train":
                options.parse_options([str(ROOT / words[2]), *words[3:]])
            assert (ROOT / words[2]).is_file() or words[2] == "recipe.yaml"
    else:
        module(words[2:])


def made(words):
    """Targets are rules of the Makefile, and what is set is used there."""
    for word in words:
        name, _, value = word.partition("=")
        if value:
            assert f"$({name})" in MAKEFILE, name
        else:
            rule = name if re.search(rf"^{name}:", MAKEFILE, re.MULTILINE) else name.split("-")[0]
            assert re.search(rf"^{rule}(-%)?:", MAKEFILE, re.MULTILINE), name


def module(words):
    """A module of the repository that knows the flags, or pytest on files that are there."""
    name, *rest = words
    if name == "pytest":
        for path in (word for word in rest if word.startswith("tests/")):
            assert (ROOT / path).exists(), path
        return
    source = (ROOT / f"{name.replace('.', '/')}.py").read_text()
    for flag in (word[2:] for word in rest if word.startswith("--")):
        assert re.search(rf'"--{flag}"|^    {flag}: ', source, re.MULTILINE), flag


def test_the_printed_estimate_is_what_is_printed(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs" / "memory.md").read_text()
    command, shown = re.search(r"^\$ orpo-kernels ([^\n]*)\n(.*?)^```", page, re.M | re.S).groups()
    assert cli.main(shlex.split(command)) == 0
    assert capsys.readouterr().out.startswith(shown)


@pytest.mark.slow
def test_real_text_from_nothing(tmp_path, monkeypatch):
    # The two commands of examples/README.md; the reader's file, and a size for a test.
    page = (ROOT / "examples" / "README.md").read_text()
    (block,) = re.findall(r"```bash\n(python -m examples.*?)```", page, re.DOTALL)
    small = {"--vocab_size": "400", "--hidden_size": "32", "--layers": "1", "--steps": "2",
             "--max_steps": "1", "--max_length": "96"}  # fmt: skip
    write_jsonl(tmp_path / "PAIRS.jsonl", preference_pairs(20))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    ran = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line.replace("examples/demo.yaml", str(ROOT / "examples/demo.yaml")))
        for flag in small.keys() & set(words):
            words[words.index(flag) + 1] = small[flag]
        words = words[1:] if words[0] == "python" else ["-m", "orpo_kernels", *words[1:]]
        words += ["--eval_strategy", "no", "--eval_on_start", "false"] if "train" in words else []
        done = subprocess.run(
            [sys.executable, *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        ran.append(words[1])
    assert ran == ["examples.tiny_base", "orpo_kernels"]
    assert (tmp_path / "runs" / "real" / "orpo" / "metrics.json").is_file()
