"""docs/training-arguments.md says what comes of each argument: everything is tried again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.training import tried_arguments
from tests.training.runs import make, pairs
from tests.training.tried_arguments import CASES, NOT_TRIED, PAGE, Case, fields, row, try_case

TEXT = PAGE.read_text()

pytestmark = pytest.mark.skipif(
    f"(transformers {transformers.__version__})" not in TEXT,
    reason="the page is of another version of transformers",
)


def test_every_argument_is_on_the_page() -> None:
    tried = {next(iter(case.changes)) for cases in CASES.values() for case in cases}
    others = [name for names in NOT_TRIED.values() for name in names]
    assert len(others) == len(set(others))
    assert not tried & set(others)
    assert tried | set(others) == fields()


def test_the_page_has_the_cases_and_no_others() -> None:
    found = [line for line in TEXT.splitlines() if line.startswith("| `") and "=" in line]
    cases = [case for cases in CASES.values() for case in cases]
    assert [line.split(" | ")[0] for line in found] == [f"| `{case.name}`" for case in cases]
    rows = {section: [""] * len(cases) for section, cases in CASES.items()}
    frame = [line for line in tried_arguments.page(rows).splitlines() if line]
    assert [line for line in TEXT.splitlines() if line and line not in found] == frame


def test_batches_of_metrics(tmp_path: Path) -> None:
    seen: list[int] = []

    def rows(prediction: Any, compute_result: bool = False) -> dict[str, float]:
        seen.append(len(prediction.predictions))
        return {"rows": float(sum(seen))}

    trainer = make(
        tmp_path, eval_dataset=pairs(8), compute_metrics=rows, batch_eval_metrics=True,
        per_device_eval_batch_size=3,
    )  # fmt: skip
    assert trainer.evaluate()["eval_rows"] == 8
    assert seen == [3, 3, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [case for cases in CASES.values() for case in cases], ids=lambda case: case.name
)
def test_what_comes_of_it(case: Case, tmp_path: Path) -> None:
    torch._dynamo.reset()
    cells = try_case(case, tmp_path)
    assert row(case, cells) in TEXT.splitlines()
