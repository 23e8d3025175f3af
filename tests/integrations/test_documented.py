"""What docs/integrations.md shows, run as it stands there."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.experimental.orpo import ORPOTrainer as TRLTrainer

from orpo_kernels.integrations import trl
from tests.integrations.test_trl import difference
from tests.tiny_models import build, tiny_tokenizer
from tests.training.runs import pairs

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/integrations.md").read_text()
SCRIPT = Path(__file__).parent / "scripts/trl_qlora.py"


def snippets(section: str) -> list[str]:
    """The Python blocks of a section."""
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture(autouse=True)
def _unpatched() -> Iterator[None]:
    yield
    trl.unpatch_trl()


def test_files_exist() -> None:
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target


def turns(row: dict[str, str], side: str) -> list[dict[str, str]]:
    """A conversation of one question and one answer."""
    said = {"user": row["prompt"], "assistant": row[side]}
    return [{"role": role, "content": content} for role, content in said.items()]


def run(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, float]]:
    """Logs of a script with its three arguments: a base model, data and an output folder."""
    output = folder / "out"
    monkeypatch.setattr(sys, "argv", ["recipe", *map(str, (folder / "base", folder / "data.json"))])
    sys.argv.append(str(output))
    torch.manual_seed(0)  # TRL 1.9 draws adapters before it seeds
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(code, str(SCRIPT), "exec"), names)
    assert (output / "adapter_model.safetensors").is_file()
    return list(names["trainer"].state.log_history)


def test_trl_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("bitsandbytes")
    # 64: nf4 quantises blocks of 64 weights, and the CPU kernel wants whole ones.
    build("llama", hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    rows = [{side: turns(row, side) for side in ("chosen", "rejected")} for row in pairs(24)]
    (tmp_path / "data.json").write_text("\n".join(map(json.dumps, rows)))
    patch, subclass = snippets("TRL")
    before, after = patch.split("# after")
    imported = "from trl.experimental.orpo import ORPOConfig, ORPOTrainer\n"
    script = SCRIPT.read_text()
    assert before.endswith(f"{imported}\n")
    assert script.count(imported) == 1
    theirs = run(tmp_path, script, monkeypatch)
    original = TRLTrainer.concatenated_forward
    # Rounding to float32: the largest seen is 2e-6.
    assert difference(run(tmp_path, "#" + after + script, monkeypatch), theirs) < 1e-5
    assert TRLTrainer.concatenated_forward is not original
    importlib.import_module("orpo_kernels.integrations.trl").unpatch_trl()
    code = script.replace(imported, subclass)
    assert difference(run(tmp_path, code, monkeypatch), theirs) < 1e-5


def test_ligers_loss() -> None:
    (code,) = snippets("Liger's loss")
    before, after = code.split("# after")
    head, results = torch.nn.Linear(8, 50, bias=False), []
    hidden, target, nll_target = torch.randn(4, 6, 8), *torch.randint(0, 50, (2, 4, 6))
    call = after.split("\n\n", maxsplit=1)[1].replace("beta=0.1", "beta=0.1, compiled=False")
    for imports in (before, "#" + after):
        names = {"lm_head": head, "hidden": hidden, "target": target, "nll_target": nll_target}
        exec(imports + call, names)
        results.append((names["loss"].detach(), *names["auxiliaries"]))
    assert len(results[0]) == 10
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs.to(ours), rtol=1e-5, atol=1e-5)


def test_names_of_other_environments_exist() -> None:
    # Their snippets run in tests/environments: here are only the names.
    for module, names in re.findall(r"orpo_kernels\.integrations\.(\w+)(?:\.| import )(\w+)", PAGE):
        source = (ROOT / f"orpo_kernels/integrations/{module}.py").read_text()
        assert re.search(rf"^(class|def) {names}\b", source, flags=re.MULTILINE), (module, names)
