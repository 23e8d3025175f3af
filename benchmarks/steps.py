"""One step of work: forward, and backward where the mode has one, with the gradients it needs."""

import torch
from torch import Tensor

from benchmarks.implementations import Implementation
from benchmarks.workloads import Workload


class Step:
    """`run()` does the work of `mode` ("frozen", "trainable", "eval") once and returns the loss.

    The step owns which inputs require gradients: hidden unless evaluating, weight when trainable.
    """

    def __init__(self, implementation: Implementation, workload: Workload, mode: str) -> None:
        self.workload = workload
        self.mode = mode
        workload.hidden.requires_grad_(mode != "eval")
        workload.weight.requires_grad_(mode == "trainable")
        self.clear()
        if implementation.compiled:
            # Compiled graphs are kept per shape, eight at most, then it silently runs eagerly.
            torch._dynamo.reset()
        self.forward = implementation.prepare(workload)
        self.around = implementation.around

    def run(self) -> Tensor:
        """The loss, detached; gradients are left in `.grad`."""
        with self.around(), torch.set_grad_enabled(self.mode != "eval"):
            loss = self.forward()
            if self.mode != "eval":
                loss.backward()
        return loss.detach()

    def clear(self) -> None:
        """Drop the gradients."""
        self.workload.hidden.grad = None
        self.workload.weight.grad = None

    @property
    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """dhidden and dweight of the last run."""
        return self.workload.hidden.grad, self.workload.weight.grad

    @property
    def gradient_bytes(self) -> int:
        """Bytes of the gradients of the last run."""
        return sum(
            each.numel() * each.element_size() for each in self.gradients if each is not None
        )
