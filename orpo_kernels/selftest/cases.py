"""Every case of the self-test."""

from collections.abc import Iterator

import torch

from orpo_kernels.selftest import logps, losses, model, sparse, tiles
from orpo_kernels.selftest.figures import Case, Setting
from orpo_kernels.selftest.report import DTYPES


def all_cases(device: torch.device, threads: int, *, with_model: bool) -> Iterator[Case]:
    """By dtype, then by op.

    Args:
        device: where they compute.
        threads: of torch, for tile operations on a CPU.
        with_model: whether transformers is there for those of a model.

    Yields:
        The cases.
    """
    for dtype in DTYPES:
        setting = Setting(device, dtype, threads)
        yield from tiles.cases(setting)
        yield from losses.cases(setting)
        yield from logps.cases(setting)
        yield from sparse.cases(setting)
        if with_model:
            yield from model.cases(setting)
