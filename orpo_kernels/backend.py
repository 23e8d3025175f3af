"""Which form of the vocabulary-sized operations runs: the machine's own, or plain torch everywhere.

The machine's own is C++ on a CPU and Triton on a GPU, where they are installed. Both forms compute
the same within rounding, in the same workspace: where a result is in doubt, or a kernel fails on a
device or driver, the plain one says whether it was the kernel.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from orpo_kernels import kernels
from orpo_kernels.engine import tiles
from orpo_kernels.options import check_choice

BACKENDS = ("auto", "torch")

_LOCK = threading.Lock()
_asked: list[list[str]] = []  # of the contexts that are open, youngest last; lists are told apart


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Take a form of the operations as long as the context is open, in every thread.

    Open it around a forward and its backward. `ORPO_KERNELS_CPU_BACKEND=torch` and
    `ORPO_KERNELS_GPU_BACKEND=torch` do the same for a whole process.

    Args:
        name: "torch", plain torch on every device; or "auto", the machine's own.

    Raises:
        ValueError: another name.
    """
    check_choice("backend", name, BACKENDS)
    context = [name]
    with _LOCK:
        _asked.append(context)
        _switch()
    try:
        yield
    finally:
        with _LOCK:
            _asked[:] = [each for each in _asked if each is not context]
            _switch()


def _switch() -> None:
    plain = bool(_asked) and _asked[-1] == ["torch"]
    tiles.force_plain(plain)
    kernels.force_plain(plain)
