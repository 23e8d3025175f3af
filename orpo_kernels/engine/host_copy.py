"""A small tensor that the host wants to know, and does not wait for until it asks."""

import torch
from torch import Tensor


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is captured, in which nothing may wait for the device."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class HostCopy:
    """A small tensor on its way to the host, behind what its device still has to do."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._arrived = tensor, None
        if tensor.device.type == "cuda" and not is_capturing(tensor.device):
            self._tensor = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True
            )
            self._tensor.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(tensor.device))

    def get(self) -> Tensor:
        """It; no wait where the host has waited for anything later on the stream."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor
