"""A training step of a whole model by the layout of its batches: tokens per second against TRL's.

    pytest benchmarks/test_bench_step.py --benchmark-only            # this machine's shapes
    pytest benchmarks/test_bench_step.py --benchmark-disable         # once, tiny, as a test
    python -m benchmarks.layout_steps                                # and write the JSON

See `layout_steps.py`. Losses are compared with TRL's before anything is timed.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("peft")

from benchmarks import settings
from benchmarks.contention import MOST_WAITING, threads, waiting_share
from benchmarks.layout_steps import (
    IMPLEMENTATIONS,
    PLANS,
    SHAPES,
    TRL,
    Steps,
    median_iqr,
    user_tokens,
)
from benchmarks.machine import command, versions
from benchmarks.measure import Stopwatch

PAIRS = (1, 2, 4)
CASES = [(shape, pairs) for shape in PLANS[settings.device()] for pairs in PAIRS]
PAIRS_IN_ALL = {"cpu": 4, "cuda": 8}  # of a round, in batches of 1, 2 or 4
ROUNDS = 2
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}  # of a loss; float32, and bfloat16 by autocast


@pytest.fixture(scope="module")
def made() -> dict[tuple[str, int], Steps]:
    return {}  # one at a time


@pytest.fixture
def steps_of(made: dict[tuple[str, int], Steps]) -> Callable[[str, int], Steps]:
    """The model and batches of a case, the last ones kept."""

    def get(shape: str, pairs: int) -> Steps:
        if (shape, pairs) not in made:
            made.clear()
            count = PAIRS_IN_ALL[settings.device()] // pairs if shape != "tiny" else 2
            made[shape, pairs] = Steps(SHAPES[shape], pairs, count, settings.device())
        return made[shape, pairs]

    return get


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize(("shape", "pairs"), CASES, ids=[f"{s}-P{p}" for s, p in CASES])
def test_step(shape: str, pairs: int, name: str, benchmark: Any, steps_of: Any) -> None:
    if settings.late():
        pytest.skip("no time left in this run")
    if not benchmark.enabled:
        shape = "tiny"
    benchmark.group = case = f"{shape} P{pairs}"
    try:
        steps = steps_of(shape, pairs)
        expected = steps.run(TRL)
        losses = expected if name == TRL else steps.run(name)
    except (ImportError, NotImplementedError, torch.cuda.OutOfMemoryError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        settings.record({"case": case, "implementation": name, "skipped": reason})
        pytest.skip(reason)
    assert losses == pytest.approx(expected, rel=TOLERANCE[settings.device()])

    ours, trl, watch = list[float](), list[float](), Stopwatch(settings.device())

    def before() -> None:
        trl.append(watch(lambda: steps.run(TRL)))

    def timed() -> None:
        ours.append(watch(lambda: steps.run(name)))

    start = threads()
    benchmark.pedantic(timed, setup=before, rounds=ROUNDS, iterations=1, warmup_rounds=0)
    before()
    waiting = waiting_share(start, threads())
    if benchmark.enabled and settings.device() == "cpu" and (waiting or 0) > MOST_WAITING:
        reason = f"other processes ran: threads waited {waiting:.0%} of the time for a core"
        settings.record({"case": case, "implementation": name, "skipped": reason})
        pytest.skip(reason)
    tokens, computed = user_tokens(steps.batches), steps.computed(name)
    result = {
        "case": case, "model": SHAPES[shape].model.name, "attention": SHAPES[shape].attention,
        "stretch": SHAPES[shape].stretch, "pairs": pairs, "implementation": name,
        "tokens": tokens, "computed_tokens": computed,
        "time_ms": median_iqr([1e3 * each for each in ours]),
        "tokens_per_s": median_iqr([tokens / each for each in ours]),
        "speed_of_trl": median_iqr([
            (one + other) / 2 / each
            for one, other, each in zip(trl, trl[1:], ours, strict=False)
        ]),
        "peak_bytes": _peak(steps, name), "waiting_share": waiting,
    }  # fmt: skip
    benchmark.extra_info.update(result, versions=versions(), command=command())
    if benchmark.enabled:
        settings.record(result)


def _peak(steps: Steps, name: str) -> int | None:
    """Most bytes a round held over what is there before it; on a GPU."""
    if settings.device() != "cuda":
        return None
    steps.optimizer.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    steps.run(name)
    return torch.cuda.max_memory_allocated() - before
