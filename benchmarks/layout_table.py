"""The tables of docs/layouts.md and the step in README's headline, from two `layouts.json`.

    python -m benchmarks.layout_table          # writes both

Between `<!-- steps:begin NAME -->` and `<!-- steps:end -->` stands what the JSON says.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.results import FOLDER

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "README.md", ROOT / "docs" / "layouts.md")
JSON = FOLDER / "amd-epyc-family-26-model-2-2-cores" / "layouts.json"
GPU_JSON = FOLDER / "nvidia-h200" / "layouts.json"
HEADLINE_CASE = "small P2"
BEST = "shared_prompt"
_MARKED = re.compile(r"(<!-- steps:begin ([\w-]+) -->\n).*?(<!-- steps:end -->)", re.DOTALL)


def headline(content: dict[str, Any]) -> str:
    """The sentence of README: a step of two pairs with the prompt once, against TRL's."""
    row = _row(content, HEADLINE_CASE, BEST)
    trl = _row(content, HEADLINE_CASE, "TRL ORPO")
    return (
        f"A whole training step of {row['pairs']} pairs of real lengths runs at **{_speed(row)} "
        f"times TRL's speed** with `batch_layout: {BEST}`\n({_rate(row)} tokens/s against "
        f"{_rate(trl)}; {row['model']}, LoRA, checkpointing, {_machine(content)}; "
        "[docs/layouts.md](docs/layouts.md)).\n"
    )


def table(content: dict[str, Any]) -> str:
    """Tokens per second and what is computed, by pairs in a batch and layout."""
    lines = [
        "| pairs in a batch | | tokens computed | tokens/s (IQR) | of TRL's speed (IQR) |",
        "|---|---|---|---|---|",
    ]
    for row in content["results"]:
        pairs, name = row["case"].split(" P")[1], _name(row["implementation"])
        if "skipped" in row:
            lines.append(f"| {pairs} | {name} | | | {row['skipped']} |")
            continue
        share = row["computed_tokens"] / row["tokens"]
        speed = "1" if name == "TRL ORPO" else f"{_speed(row)} ({row['speed_of_trl']['iqr']:.2f})"
        rate = f"{_rate(row)} ({row['tokens_per_s']['iqr']:.0f})"
        lines.append(f"| {pairs} | {name} | {share:.2f} | {rate} | {speed} |")
    model = next(row for row in content["results"] if "model" in row)
    about = (
        f"{model['model']}, {model['attention']}, float32, LoRA on every linear layer, gradient "
        "checkpointing, AdamW; pairs of real lengths, up to 1,024 tokens. Tokens are those of both "
        "sequences without padding; two rounds, each between two of TRL's. "
        f"{_machine(content)}; commit `{content['commit']}`, `{content['command']}`, "
        f"`{JSON.relative_to(ROOT)}`."
    )
    return "\n".join([*lines, "", about]) + "\n"


def gpu_table(content: dict[str, Any] | None) -> str:
    """The same of a GPU, with the attention of each row and peak memory; None: not measured."""
    if content is None:
        return "Not measured.\n"
    lines = [
        "| | attention | tokens computed | tokens/s (IQR) | of TRL's speed (IQR) | peak |",
        "|---|---|---|---|---|---|",
    ]
    for row in content["results"]:
        start = f"| {row['case']} {_name(row['implementation'])}"
        if "time_ms" not in row:
            lines.append(f"{start} | | | | {row.get('skipped') or row.get('failed')} | |")
            continue
        speed, rate = row.get("speed_of_trl"), row["tokens_per_s"]
        of_trl = f"{speed['median']:.2f} ({speed['iqr']:.2f})" if speed else ""
        lines.append(
            f"{start} | {row['attention']} | {row['computed_tokens'] / row['tokens']:.2f} | "
            f"{_rate(row)} ({rate['iqr']:,.0f}) | {of_trl} | {row['peak_bytes'] / 2**30:.2f} GiB |"
        )
    machine, versions = content["machine"], content["versions"]
    about = (
        f"{content['results'][0]['model']}, random weights, bfloat16, LoRA on every linear layer, "
        "gradient checkpointing, AdamW; P pairs in a batch, of real lengths or so many times as "
        f"long. Peak over the weights. {machine['gpu']}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}; `{content['command']}`, `{GPU_JSON.relative_to(ROOT)}`."
    )
    return "\n".join([*lines, "", about]) + "\n"


def filled(text: str, content: dict[str, Any], gpu: dict[str, Any] | None) -> str:
    """A page with its marked parts made anew.

    Args:
        text: of the page.
        content: measured on a CPU.
        gpu: measured on a GPU.

    Raises:
        KeyError: a marker with a name that nothing has.
    """
    blocks: dict[str, Callable[[], str]] = {
        "headline": lambda: headline(content),
        "table": lambda: table(content),
        "gpu": lambda: gpu_table(gpu),
    }
    return _MARKED.sub(lambda found: found[1] + blocks[found[2]]() + found[3], text)


def measured() -> tuple[dict[str, Any], dict[str, Any] | None]:
    """What was measured on a CPU, and on a GPU."""
    gpu = json.loads(GPU_JSON.read_text()) if GPU_JSON.exists() else None
    return json.loads(JSON.read_text()), gpu


def _row(content: dict[str, Any], case: str, implementation: str) -> dict[str, Any]:
    rows = {(row["case"], row["implementation"]): row for row in content["results"]}
    return rows[case, implementation]


def _name(implementation: str) -> str:
    return implementation if implementation == "TRL ORPO" else f"`{implementation}`"


def _speed(row: dict[str, Any]) -> str:
    return f"{row['speed_of_trl']['median']:.2f}"


def _rate(row: dict[str, Any]) -> str:
    return f"{row['tokens_per_s']['median']:,.0f}"


def _machine(content: dict[str, Any]) -> str:
    return f"{content['machine']['cpu']}, {content['machine']['threads']} threads"


def main() -> int:
    """Fill both pages."""
    content = measured()
    for page in PAGES:
        page.write_text(filled(page.read_text(), *content))
    return 0


if __name__ == "__main__":
    sys.exit(main())
