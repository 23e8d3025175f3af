"""What the loops of a GPU that is not here allocate, against the bytes of their plans."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from orpo_kernels.engine.gpu import call

pytest.importorskip("triton")

from tests.kernels.test_launches import MIB, Call, started  # noqa: F401 - a fixture

# Tensors of a call that a plan does not count, bytes: label sets, masks and places of 1,000 rows.
SMALL = 200_000


class Memory(TorchDispatchMode):
    """Bytes of the device that are alive, and the most of them since `reset`."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.most = weakref.WeakSet(), 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor) and each.device.type == "cuda":
                self._count(each.untyped_storage())
        return out

    def _count(self, storage):
        if storage in self.known:
            return
        self.known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size):
        self.now -= size

    def over(self, function):
        """The function; what it had alive at most beside what was before is noted."""
        found = []

        def run(*args, **kwargs):
            before, self.most = self.now, self.now
            result = function(*args, **kwargs)
            found.append(self.most - before)
            return result

        return run, found


CALLS = {
    "frozen": Call(), "trainable": Call(trainable=True, sets=2, bias=True),
    "evaluation": Call(needs_dhidden=False), "odd": Call(trainable=True, vocabulary=32_003),
    "cast": Call(trainable=True, head_dtype=torch.float32),
}  # fmt: skip


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("mib", [64, 256, 1024])
@pytest.mark.parametrize("architecture", [86, 90])
def test_a_loop_allocates_what_its_plan_says(started, monkeypatch, architecture, mib, kind):  # noqa: F811
    memory = Memory()
    peaks = {}
    for name in ("exact_forward", "exact_head_gradient"):
        run, peaks[name] = memory.over(getattr(call, name))
        monkeypatch.setattr(call, name, run)
    _, _, plans, kept = started(architecture, mib, CALLS[kind], memory)
    of_kept = kept * 2 * (-(-CALLS[kind].vocabulary // 8) * 8)
    for plan, (peak,) in zip(plans, filter(None, peaks.values()), strict=True):
        assert peak <= plan.workspace_bytes + SMALL
        assert plan.workspace_bytes + of_kept <= mib * MIB
        # A plan that asks for much more than it takes would leave memory unused.
        assert plan.workspace_bytes <= 1.1 * peak + SMALL


def test_the_workspace_does_not_grow_with_the_vocabulary(started, monkeypatch):  # noqa: F811
    peaks = []
    for vocabulary in (32_000, 128_256, 262_144):
        memory = Memory()
        with monkeypatch.context() as patch:
            run, found = memory.over(call.exact_forward)
            patch.setattr(call, "exact_forward", run)
            started(90, 64, Call(vocabulary=vocabulary), memory)
        peaks += found
    assert max(peaks) <= 64 * MIB
    assert max(peaks) <= 1.3 * min(peaks)
