"""Whether barriers order what a compiled kernel reads and writes, from its LLVM code: no device.

Of every access of global memory it is found from which parameters its address comes. A path through
the code from a load to a store of the same memory, or from a store to a load, with no barrier on it
is one on which a warp may overtake another.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from tests.kernels.overlaps import APART, BY_ELEMENT

_VALUE = re.compile(r"%[\w.]+")
_BLOCK = re.compile(r"([\w.]+):")
_TARGET = re.compile(r"label (%[\w.]+)")
# Inline PTX; plain accesses and buffers of AMD.
_LOAD = re.compile(r"ld\.global|cp\.async|= load |buffer\.load|load\.lds")
_STORE = re.compile(r"st\.global|^store |buffer\.store")
_GLOBAL = re.compile(r"ptr addrspace\([18]\) (%[\w.]+)")
_BARRIER = re.compile(r"@llvm\.(?:nvvm\.barrier|amdgcn\.s\.barrier)")
_INTO_SHARED = re.compile(r"^store |st\.shared|stmatrix")
# AMD's, of which those around a reduction are for shared memory alone ("mmra").
_FENCE = re.compile(r"^fence .* release")

_OWN = "scratch"


class Access(NamedTuple):
    """A step of the code: "load", "store" or "barrier", and the parameters it may be of."""

    kind: str
    names: frozenset[str]

    def of(self, name: str, kind: str) -> bool:
        """Whether it is one of this kind, maybe of this parameter."""
        return kind == self.kind and name in self.names


class Code:
    """The accesses of a compiled kernel, block by block."""

    def __init__(self, compiled: Any) -> None:
        """Of what Triton has compiled for NVIDIA or AMD."""
        signature = compiled.src.signature
        kinds = {name: kind for name, kind in signature.items() if kind != "constexpr"}
        lines = [line.strip() for line in compiled.asm["llir"].splitlines()]
        first = next(i for i, line in enumerate(lines) if line.startswith("define"))
        body = lines[first + 1 : lines.index("}", first)]
        # After the kernel's own come pointers to what Triton keeps there for itself.
        own = sum("*" in kind for kind in kinds.values())
        further = lines[first].count("ptr addrspace(1)") - own
        kinds |= {f"{_OWN}{i}": "*i8" for i in range(further)}
        self.origins = _origins(kinds, body)
        self.steps: dict[str, list[Access]] = {}
        self.following: dict[str, list[str]] = {}
        block, of_shared_memory = "entry", False
        for line in body:
            label = _BLOCK.match(line)
            block = "%" + label[1] if label else block
            steps = self.steps.setdefault(block, [])
            self.following.setdefault(block, []).extend(_TARGET.findall(line))
            if _FENCE.search(line):
                of_shared_memory = "!mmra" in line
            if _BARRIER.search(line) and not of_shared_memory:
                steps.append(Access("barrier", frozenset()))
            pointers = _GLOBAL.findall(line)
            kind = "load" if _LOAD.search(line) else "store" if _STORE.search(line) else ""
            if kind and pointers:
                steps.append(Access(kind, self.origins[pointers[0]]))  # of nothing: a KeyError

    def accessed(self, kind: str) -> frozenset[str]:
        """Parameters of all loads, or of all stores."""
        steps = [step for block in self.steps.values() for step in block if step.kind == kind]
        return frozenset().union(*(step.names for step in steps))

    def overtakes(self, first: str, then: str) -> bool:
        """Whether a path with no barrier leads from a load of the first to a store, or back."""
        return self._meets((first, "load"), (then, "store")) or self._meets(
            (then, "store"), (first, "load")
        )

    def _meets(self, one: tuple[str, str], other: tuple[str, str]) -> bool:
        waiting, seen = [], set()
        for block, steps in self.steps.items():
            waiting += [(block, i + 1) for i, step in enumerate(steps) if step.of(*one)]
        while waiting:
            block, start = waiting.pop()
            for step in self.steps[block][start:]:
                if step.kind == "barrier":
                    break
                if step.of(*other):
                    return True
            else:
                waiting += [(each, 0) for each in self.following[block] if each not in seen]
                seen.update(self.following[block])
        return False


def _origins(kinds: dict[str, str], body: list[str]) -> dict[str, frozenset[str]]:
    """Pointers among the parameters that each value is made of; what is loaded is made of none.

    Pointers that change their layout go through shared memory: what is stored there is loaded
    before anything else is stored.
    """
    origins = {
        f"%{i}": frozenset((name,)) for i, (name, kind) in enumerate(kinds.items()) if "*" in kind
    }
    made, shared, was_loaded = [], 0, False
    for line in body:
        values = _VALUE.findall(line.split(", !dbg")[0])
        if "addrspace(3)" in line or ".shared" in line:
            stores = _INTO_SHARED.search(line) is not None
            shared += stores and was_loaded
            was_loaded = not stores
            place = f"@shared{shared}"
            made.append([place, *values] if stores else [*values, place])
        elif " = " in line and not _LOAD.search(line) and " icmp " not in line:
            made.append(values)
    size, before = 0, -1
    while size != before:
        for result, *operands in made:
            known = (origins[each] for each in (result, *operands) if each in origins)
            if found := frozenset().union(*known):
                origins[result] = found
        size, before = sum(map(len, origins.values())), size
    return origins


def faults(name: str, compiled: Any, shared: tuple[tuple[str, str], ...]) -> Iterator[str]:
    """Memory that a kernel reads and writes and that no barrier orders, but for what is listed.

    `shared`: pairs of tensors of the launch that lie in the same memory.
    """
    code = Code(compiled)
    loaded, stored = code.accessed("load"), code.accessed("store")
    listed = {*BY_ELEMENT.get(name, ()), *APART.get(name, ())}
    pairs = [(each, each) for each in sorted(loaded & stored) if not each.startswith(_OWN)]
    pairs += [pair for one, other in shared for pair in ((one, other), (other, one))]
    for first, then in pairs:
        if {first, then} <= listed or first not in loaded or then not in stored:
            continue
        if code.overtakes(first, then):
            yield f"no barrier orders {first}, read, and {then}, written"
