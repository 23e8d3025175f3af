"""Python time of a tile in the loops of a GPU: launches stubbed out, products of almost nothing.

    pytest benchmarks/test_bench_python.py --benchmark-only

On a GPU the host must start a tile's three launches in less time than the tile takes: 60 us is the
target for all of them. `extra_info` has the time of one tile, `us_per_tile`. What is left out is
what Triton's launcher and cuBLAS take in C, about 5 us each.
"""

import contextlib
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")

from orpo_kernels.engine.gpu import backward, forward
from orpo_kernels.engine.gpu.plan import ForwardPlan
from orpo_kernels.engine.gpu.shapes import Shape, Sweep
from orpo_kernels.engine.tile_loop import Results
from orpo_kernels.engine.weight_gradient import HeadGradients
from orpo_kernels.kernels import tuning
from orpo_kernels.kernels.coefficients import Slopes
from orpo_kernels.kernels.inputs import Inputs
from orpo_kernels.kernels.start import Start

# 4 chunks of 8 rows, 64 blocks of 64 columns: 256 tiles, or 4 of the whole vocabulary.
ROWS, CHUNK, H, V, BLOCK = 32, 8, 8, 4096, 64


class Loop(NamedTuple):
    """What is run, and how many tiles it has."""

    tiles: int
    head_dtype: torch.dtype
    rows: int
    columns: int
    trains: bool = False


LOOPS = {
    "blocks": Loop(256, torch.float32, CHUNK, BLOCK),
    "blocks of a head that is cast": Loop(256, torch.float64, CHUNK, BLOCK),
    "dW, all rows at once": Loop(64, torch.float32, ROWS, BLOCK, trains=True),
    "dW, chunks of rows": Loop(256, torch.float32, CHUNK, BLOCK, trains=True),
}


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many programs each launch started, which itself did nothing."""
    started: list[int] = []

    def compiled(self: Start, programs: int, numbers: tuple[float, ...]) -> None:
        started.append(programs)
        # As `Start` leaves it once the kernel is compiled.
        self.first = tuple(range(8 + len(self.tensors)))
        self.last = tuple(self.constants.values())
        self.run = lambda programs, *arguments: started.append(programs)

    monkeypatch.setattr(Start, "_start", compiled)
    monkeypatch.setattr(tuning, "device_info", lambda device: tuning.Device("datacenter", 132, 90))
    monkeypatch.setattr(tuning, "guard", lambda device: contextlib.nullcontext())
    return started


def run(loop: Loop) -> None:
    """One forward, or one gradient of the head."""
    dtype = torch.float32
    labels = torch.zeros(ROWS, dtype=torch.int64)
    # Every second row of a batch of twice as many: rows are gathered.
    places = torch.arange(0, 2 * ROWS, 2)
    inputs = Inputs(
        (torch.zeros(2 * ROWS, H),), (torch.zeros(V, H, dtype=loop.head_dtype),), None, labels,
        None, places, None, 1.0, None, dtype, dtype,
    )  # fmt: skip
    statistics = torch.zeros(7, 2 * ROWS)
    if not loop.trains:
        shape = Shape(loop.rows, loop.rows, loop.columns)
        out = Results(statistics, torch.zeros(2 * ROWS, H), torch.zeros(2 * ROWS, 0))
        forward.forward(inputs, ForwardPlan(shape, None, False, 0, 0.0), None, out)
        return
    slopes = Slopes(torch.zeros(1, 2 * ROWS), torch.zeros(1, 2 * ROWS, dtype=torch.int64), -100)
    sweep = Sweep(0, V, loop.rows, loop.columns)
    out = HeadGradients((torch.zeros(V, H),), None)
    backward.weight_gradient(inputs, statistics, slopes, (sweep,), None, out)


@pytest.mark.parametrize("name", LOOPS)
def test_python_time_of_a_tile(name: str, benchmark: Any, starts: list[int]) -> None:
    loop = LOOPS[name]
    run(loop)
    # A row kernel per tile; beside it a cast per block, and a few per chunk.
    assert loop.tiles <= len(starts) <= 2 * loop.tiles + 20
    benchmark.group = "Python of a tile"
    benchmark(run, loop)
    if benchmark.enabled:
        # The least: what else runs on a machine only adds to it.
        benchmark.extra_info["us_per_tile"] = 1e6 * benchmark.stats["min"] / loop.tiles
