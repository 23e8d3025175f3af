"""Time of the row kernels of the exact loops over their byte floor; part of `row_times.py`."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from orpo_kernels.kernels import gpu_backend

# Rows and columns of a tile: blocks as a small and a large budget have them, and one whose columns
# no vector divides; whole rows of few, of many, and of an odd vocabulary. V: Llama 3's.
BLOCKS = ((256, 8192), (1024, 8192), (1024, 4096), (1024, 8185))
WHOLE = ((128, 128256), (256, 128256), (1024, 128256), (1024, 32003))
TINY = ((3, 100),)


def loop_works(device: str, *, tiny: bool) -> Iterator[tuple[str, int, Callable[[], Any]]]:
    """Name, bytes to move, and the launch: float32 logits of a GEMM to P or E in bfloat16."""
    if device == "cpu" or gpu_backend() != "triton":
        return  # no plain form of them exists
    from orpo_kernels.kernels.inputs import Inputs, Sums, Tiles
    from orpo_kernels.kernels.softmax_block import SoftmaxBlock
    from orpo_kernels.kernels.softmax_rows import SoftmaxRows
    from orpo_kernels.kernels.weight_probs import WeightProbs

    narrow, none = torch.bfloat16, torch.empty(0, 8, device=device, dtype=torch.bfloat16)
    shapes = (TINY, TINY) if tiny else (BLOCKS, WHOLE)
    for whole, (rows, columns) in ((w, shape) for w in (False, True) for shape in shapes[w]):
        pitch = -(-columns // 8) * 8
        logits = torch.randn(rows, pitch, device=device)
        labels = torch.randint(0, columns, (rows,), device=device)
        inputs = Inputs(
            (none,), (none.new_empty(columns, 8),), None, labels, None, labels, None, 1.0, None,
            narrow, torch.float32,
        )  # fmt: skip
        state = torch.zeros(4, rows, device=device)
        name, cells = f"{rows} x {columns} float32 to bfloat16", rows * columns
        if whole:
            out = torch.empty(rows, pitch, device=device, dtype=narrow)
            softmax = SoftmaxRows(inputs, state, Tiles(logits, out, columns), 8.0, one_look=True)
            yield f"softmax_rows {name}", 6 * cells, _launch(softmax, rows, columns)
            continue
        # P over the logits, as in the loop: each look finds what the one before has left.
        sums = Sums(torch.zeros(rows, 4096, device=device), None)
        block = SoftmaxBlock(inputs, state, Tiles(logits, logits.view(narrow), columns), sums, 8.0)
        yield f"softmax_block {name}", 6 * cells, _launch(block, rows, columns)
        figures = torch.zeros(5, rows, device=device)
        probs = WeightProbs(
            inputs, logits.view(narrow), logits, figures, None, columns=columns, kept=False
        )
        yield (
            f"weight_probs {name}", 6 * cells,
            lambda probs=probs, rows=rows, columns=columns: probs((0, rows), 0, (0, columns)),
        )  # fmt: skip


def _launch(kernel: Any, rows: int, columns: int) -> Callable[[], None]:
    return lambda: kernel((0, rows), 0, (0, columns), 0)
