"""Attributes of somebody else's classes and modules, replaced until they are put back."""

from __future__ import annotations

import inspect
from typing import Any

_ABSENT = object()


def refuse_unless_known(
    owner: type, known: dict[str, tuple[str, ...]], what: str, versions: str, remedy: str = ""
) -> None:
    """Refuse a class whose methods are not called as the replacements of some are.

    Args:
        owner: the class.
        known: methods, and the names of their arguments.
        what: the class and its version, for the message.
        versions: the ones that are known, likewise.
        remedy: what to do about it, likewise.

    Raises:
        NotImplementedError: naming the method, what it takes and what was expected.
    """
    for name, expected in known.items():
        method = getattr(owner, name, None)
        given = None if method is None else tuple(inspect.signature(method).parameters)
        if given != expected:
            raise NotImplementedError(
                f"{what} is another than the ones this patch knows ({versions}): {name} takes "
                f"{given}, expected {expected}{remedy}"
            )


class Patch:
    """Replacements of attributes, put on and taken off together.

    Args:
        *replacements: (owner, name, value): `owner.name` is to become `value`.
    """

    def __init__(self, *replacements: tuple[Any, str, Any]) -> None:
        self._replacements = replacements
        self._found: list[Any] = []

    @property
    def is_on(self) -> bool:
        """Whether the replacements are in force."""
        return bool(self._found)

    def put_on(self) -> None:
        """Replace the attributes; a second call does nothing."""
        if self.is_on:
            return
        self._found = [vars(owner).get(name, _ABSENT) for owner, name, _ in self._replacements]
        for owner, name, value in self._replacements:
            setattr(owner, name, value)

    def take_off(self) -> None:
        """Put back what was there; a second call does nothing.

        Raises:
            RuntimeError: somebody replaced an attribute again since, and would lose it.
        """
        if not self.is_on:
            return
        for owner, name, value in self._replacements:
            if vars(owner).get(name) is not value:
                raise RuntimeError(
                    f"{owner.__name__}.{name} was replaced again after orpo_kernels had patched "
                    "it; undo that patch first"
                )
        for (owner, name, _), found in zip(self._replacements, self._found, strict=True):
            if found is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, found)
        self._found = []
