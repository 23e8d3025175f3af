"""A callable in the place of one module's forward, on the instance, that can be taken off again.

It knows its module weakly, so that a module dies with its last user, and it stands there for
everybody: what a call is served with is decided per thread, by what `THREAD` says of the thread the
call runs in. Where nobody is served anything, it passes on to the forward that was there before.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

if TYPE_CHECKING:
    from orpo_kernels.integrations.call import HeadCall
    from orpo_kernels.integrations.model import Entry

LOCK = threading.RLock()
"""Held while overrides are put on and taken off, never while a model runs."""


class _Thread(threading.local):
    """What the running thread is in the middle of, youngest last."""

    def __init__(self) -> None:  # once in every thread
        self.calls: tuple[HeadCall, ...] = ()  # fused calls of models
        self.entered: tuple[Entry, ...] = ()  # what `active()` and `paused()` asked for


THREAD = _Thread()

_Kind = TypeVar("_Kind", bound="ForwardOverride")


class ForwardOverride:
    """Stands in for the forward of `module` as long as it has users."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)
        self._before: Callable[..., Any] | None = None  # None: the class's forward
        self._users = 0

    @classmethod
    def on(cls: type[_Kind], module: nn.Module) -> _Kind | None:
        """The one that stands on `module`, also beneath wrappers put around it later."""
        for name in ("forward", "_old_forward"):
            forward = _unbound(module.__dict__.get(name))
            while forward is not None and not isinstance(forward, cls):
                forward = _unbound(getattr(forward, "__wrapped__", None))
            if forward is not None:
                return forward
        return None

    @property
    def is_alive(self) -> bool:
        """Whether the module is still there."""
        return self._module() is not None

    @property
    def module(self) -> nn.Module:
        """The module whose forward this is."""
        module = self._module()
        if module is None:
            raise ReferenceError("the module of this forward is gone: keep a reference to it")
        return module

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        """The forward that was there before: accelerate and inspect look for this name."""
        module = self.module
        return self._before or MethodType(type(module).forward, module)

    @property
    def __code__(self) -> Any:
        """Of the forward that was there before: torch.export names its inputs by it."""
        return self.__wrapped__.__code__

    def own(self, *args: Any, **kwargs: Any) -> Any:
        """Call the forward that was there before."""
        if self._before is not None:
            return self._before(*args, **kwargs)
        module = self.module
        return type(module).forward(module, *args, **kwargs)

    def acquire(self) -> None:
        """Count one more user; the first puts the override on."""
        with LOCK:
            if self._users == 0:
                self._put_on()
            self._users += 1

    def release(self) -> None:
        """Count one user less; the last takes the override off."""
        with LOCK:
            self._users -= 1
            if self._users == 0 and self.is_alive:
                self._take_off()

    def withdraw(self) -> None:
        """Leave a place kept beneath a wrapper that has gone since; a used override stays."""
        with LOCK:
            if self._users == 0:
                self._restore_forward()

    def _put_on(self) -> None:
        attributes = self.module.__dict__
        if type(self).on(self.module) is not self:
            # accelerate keeps the real forward under the other name, between its hooks: offloaded
            # weights exist only there, and hooks that come or go leave it alone.
            name = "_old_forward" if "_hf_hook" in attributes else "forward"
            self._before = attributes.get(name)
            attributes[name] = self

    def _take_off(self) -> None:
        self._restore_forward()

    def _restore_forward(self) -> None:
        """Put back what was there; beneath a later wrapper this stays, and passes on."""
        module = self.module
        attributes = module.__dict__
        for name in ("forward", "_old_forward"):
            if _unbound(attributes.get(name)) is not self:
                continue
            if self._before is not None:
                attributes[name] = self._before
            elif name == "forward":
                del attributes[name]
            else:  # accelerate's hooks were put around this; they need a forward to call
                attributes[name] = MethodType(type(module).forward, module)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and pickles follow the module: the copy of a module gets an override of its own.
        return {**self.__dict__, "_module": self._module(), "_users": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._module = weakref.ref(state["_module"])


class HeadOverride(ForwardOverride):
    """The forward of an output head: this thread's fused call of it, or the head's own."""

    def __call__(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        """The forward of the head."""
        module = self.module
        for call in reversed(THREAD.calls):
            if call.head.module is module:
                return call.forward(self.own, hidden, *args, **kwargs)
        return self.own(hidden, *args, **kwargs)


def _unbound(forward: Any) -> Any:
    return forward.__func__ if isinstance(forward, MethodType) else forward
