"""Batches of like lengths, in an order that a resumed run finds again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class _ByLengthAgain(LengthGroupedSampler):
    """Trainer's own draws from torch's global numbers, which a resumed run has used otherwise.

    It would then skip rows that were not trained on, and take others twice.
    """

    def __init__(
        self, sampler: LengthGroupedSampler, seed: int, current_epoch: Callable[[], int]
    ) -> None:
        generator = torch.Generator()
        super().__init__(sampler.batch_size, lengths=sampler.lengths, generator=generator)
        self._seed, self._current_epoch = seed, current_epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self._seed + self._current_epoch())
        order: Any = super().__iter__
        return iter(order())


def by_length_again(sampler: Any, seed: int, current_epoch: Callable[[], int]) -> Any:
    """A sampler that groups by length, made to depend on seed and epoch alone.

    Args:
        sampler: of Trainer; one of another kind is returned as it is.
        seed: of the order.
        current_epoch: counts from 0; called when an epoch begins.

    Returns:
        The sampler.
    """
    if type(sampler) is not LengthGroupedSampler:
        return sampler
    return _ByLengthAgain(sampler, seed, current_epoch)
