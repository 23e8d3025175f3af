"""The density guard off the CPU: the share kept in the last step decides on the next one.

A CPU refuses a tile when it sees it. Elsewhere the count would have to be waited for; instead it is
copied to the host behind the step, and read when the next step over the same head begins.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

_HEADS = 16
_DENSE_STEPS = 32  # the exact way, before a step finds out whether the softmax is sparse by now


@dataclass
class _Measured:
    share: Tensor  # (1,) on the host, on its way
    arrived: torch.cuda.Event | None
    steps: int = 0


class DensityGuard:
    """By (device, head): whether the next step is to be sparse. A head is known by its memory."""

    def __init__(self) -> None:
        self._last: OrderedDict[tuple[object, ...], _Measured] = OrderedDict()

    def allows(self, weight: Tensor, limit: float) -> bool:
        """False while the share kept in the last sparse step is over `limit`."""
        last = self._last.get(_key(weight))
        if last is None:
            return True
        if last.arrived is not None:
            last.arrived.synchronize()  # of the last step: choosing the rows has waited for it
        if float(last.share) <= limit:
            return True
        last.steps += 1
        return last.steps > _DENSE_STEPS

    def record(self, weight: Tensor, share: Tensor) -> None:
        """Takes the share (1,) that a sparse step kept, without waiting for it."""
        arrived = None
        if share.device.type == "cuda":
            host = torch.empty(1, dtype=share.dtype, pin_memory=True)
            host.copy_(share, non_blocking=True)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(torch.cuda.current_stream(share.device))
        else:
            host = share.detach().to("cpu", copy=True)
        key = _key(weight)
        self._last[key] = _Measured(host, arrived)
        self._last.move_to_end(key)
        while len(self._last) > _HEADS:
            self._last.popitem(last=False)

    def forget(self) -> None:
        """As if no step had been."""
        self._last.clear()


def _key(weight: Tensor) -> tuple[object, ...]:
    return weight.device, weight.data_ptr(), tuple(weight.shape)


density_guard = DensityGuard()
