"""Starting one kernel many times cheaply: what Triton derives from the arguments is derived once.

A launch through `kernel[grid](...)` binds and specialises every argument anew: 15 to 20 us of
Python, more than a small kernel runs. Of a loop over tiles only numbers change. `Start` takes the
tensors and constants once; from the second start on Triton's launcher of the compiled kernel is
called itself, with addresses in place of tensors.

What the compiled kernel depends on is its key: the dtype of every tensor and whether it starts on
16 bytes, the constants, the options and the device. Numbers are not part of it: every one is in
`do_not_specialize`, and one that does not fit 32 bits takes the ordinary launch, where Triton would
compile another kernel. Only NVIDIA's backend is started so: AMD's also specialises on the size of a
tensor. In the interpreter, in a dry run and elsewhere every launch is the ordinary one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from orpo_kernels.kernels import tuning
from orpo_kernels.kernels.tuning import VECTOR, Row

_MOST = 2**31
_ALIGNMENT = 16

_compiled: dict[tuple[Any, ...], CompiledKernel] = {}

# Told of every start whose kernel is not compiled yet, before its first launch: the self-test has
# kernels compiled side by side which a call launches one after another.
announced: Callable[["Start"], None] | None = None


class Start:
    """One kernel, its tensors and constants, to be started with other numbers each time."""

    def __init__(
        self,
        kernel: Any,
        tensors: tuple[Tensor | None, ...],
        row: Row,
        constants: dict[str, Any],
        options: dict[str, Any] | None = None,
    ) -> None:
        """The kernel's parameters are `tensors`, then numbers, then `constants`, in this order.

        Args:
            kernel: a `triton.jit` function; every number is in its `do_not_specialize`.
            tensors: on one device; the first is there. They live as long as this does.
            row: of the tuning table: warps, and the register limit where there is one.
            constants: every `tl.constexpr` parameter, in the order of the signature.
            options: of compiling, as `tuning.compile_options` says them; by default those of `row`.
        """
        first = tensors[0]
        if first is None:
            raise TypeError("the first tensor of a launch says on which device it is")
        self.kernel, self.tensors, self.constants = kernel, tensors, constants
        self.device = first.device
        self.options = options or tuning.start_options(row, tuning.device_info(self.device))
        self.key: tuple[Any, ...] | None = None
        self.run: Any = None
        if first.is_cuda and torch.version.hip is None and not _hooked():
            self.key = self._key()
            self._use(_compiled.get(self.key))
        if self.run is None and announced is not None:
            announced(self)

    def _key(self) -> tuple[Any, ...]:
        kinds = tuple(
            None if each is None else (each.dtype, each.data_ptr() % _ALIGNMENT == 0)
            for each in self.tensors
        )
        options = tuple(self.options.items())
        return (self.kernel, self.device, kinds, tuple(self.constants.items()), options)

    def _use(self, compiled: CompiledKernel | None) -> None:
        """From now on starts what was compiled."""
        if compiled is None:
            return
        stream = driver.active.get_current_stream(self.device.index)
        addresses = (None if each is None else each.data_ptr() for each in self.tensors)
        # What Triton's own launch passes: no metadata and no hooks, where no hook is set.
        self.first = (
            1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *addresses,
        )  # fmt: skip
        self.last = tuple(self.constants.values())
        self.run = compiled.run

    def __call__(self, programs: int, *numbers: float) -> None:
        """Starts so many programs with these numbers, on what was the current stream at first."""
        if self.run is None or max(numbers) >= _MOST:
            self._start(programs, numbers)
        else:
            self.run(programs, *self.first, *numbers, *self.last)

    def _start(self, programs: int, numbers: tuple[float, ...]) -> None:
        with tuning.guard(self.device):
            compiled = self.kernel[(programs,)](
                *self.tensors, *numbers, **self.constants, **self.options
            )
        if self.key is not None and isinstance(compiled, CompiledKernel) and max(numbers) < _MOST:
            _compiled[self.key] = compiled
            self._use(compiled)


def _hooked() -> bool:
    """Whether a profiler has asked Triton to be told of launches, which the ordinary launch does."""
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def in_vectors(*matrices: Tensor) -> bool:
    """Whether every row of every matrix is whole vectors and starts on the boundary of one."""
    return all(
        matrix.data_ptr() % _ALIGNMENT == 0
        and not any(each % VECTOR for each in (matrix.shape[-1], *matrix.stride()[:-1]))
        for matrix in matrices
    )


def places(matrix: Tensor) -> tuple[int, int, int]:
    """Where rows lie: `row_place` of `kernels/elementwise.py`, of (N, H), or (B, T, H) as B T rows."""
    if matrix.ndim == 2:
        return 1, matrix.stride(0), 0
    return matrix.shape[1], matrix.stride(0), matrix.stride(1)
