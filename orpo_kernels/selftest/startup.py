"""What a process that checks once need not wait for: garbage collection, and torch's compiler.

Measured on two cores of an AVX-512 server with torch 2.13: without collecting, importing
transformers' Llama takes 1.4 s instead of 2.0; the first call of a custom op takes 1.1 s less where
it does not import `torch._dynamo`.
"""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Where torch looks for a function that it has hidden from its compiler before; made by importing
# the compiler (torch/_compile.py, 2.10 to 2.13).
_HIDDEN = "__dynamo_disable"


@contextmanager
def lean() -> Iterator[None]:
    """Within, nothing is collected, and calling an op of this package does not import Dynamo."""
    collected = gc.isenabled()
    gc.disable()
    hidden = [] if "torch._dynamo" in sys.modules else _first_calls()
    for function in hidden:
        setattr(function, _HIDDEN, _directly(function))
    try:
        yield
    finally:
        for function in hidden:
            delattr(function, _HIDDEN)
        if collected:
            gc.enable()


def _first_calls() -> list[Any]:
    """The functions behind our custom ops whose first call would import Dynamo to hide from it.

    Which attributes they hang on is torch's own affair: where they are not there, it imports it.
    """
    library = sys.modules.get("torch._library.custom_ops")
    ops = dict(getattr(library, "OPDEFS", {}))
    wrapped = [
        getattr(function, "__wrapped__", None)
        for name, op in ops.items()
        if name.startswith("orpo_kernels::")
        for function in getattr(op, "_backend_fns", {}).values()
    ]
    return [each for each in wrapped if each is not None and not hasattr(each, _HIDDEN)]


def _directly(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, hidden from Dynamo from then on where someone has imported it meanwhile."""

    def call(*args: Any, **kwargs: Any) -> Any:
        dynamo = sys.modules.get("torch._dynamo")
        if dynamo is None or not hasattr(dynamo, "disable"):  # not there, or being imported
            return function(*args, **kwargs)
        hidden = dynamo.disable(function, wrapping=False)
        setattr(function, _HIDDEN, hidden)
        return hidden(*args, **kwargs)

    return call
