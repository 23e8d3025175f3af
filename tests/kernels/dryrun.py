"""Runs the real launchers for a GPU that is not there: fake tensors, a fake driver, real compiles.

What a launch would compile (specialised on its real arguments) is compiled for the target and
logged; nothing runs. Not under TRITON_INTERPRET.
"""

import contextlib
import itertools
import re
import subprocess
import tempfile
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from orpo_kernels.kernels import tuning

KIB = 1024
# Shared memory a block may ask for, bytes.
SHARED_LIMIT = {
    75: 64 * KIB, 80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB,
    120: 99 * KIB, "gfx90a": 64 * KIB, "gfx942": 64 * KIB, "gfx1100": 64 * KIB,
}  # fmt: skip
PROCESSORS = {75: 40, 80: 108, 86: 28, 89: 24, 90: 132, 100: 148, 120: 36}


class Launch(NamedTuple):
    """A launch: kernel name, grid, what was compiled for it; tensors that lie over one another."""

    name: str
    grid: tuple[int, ...]
    compiled: Any
    shared: tuple[tuple[str, str], ...] = ()


class Resources(NamedTuple):
    """Of a compiled kernel: per thread, per block, its widest global accesses, what it runs on.

    `units`: how many instructions of each of `UNITS` its code has.
    """

    registers: int
    spills: int
    shared_bytes: int
    wide_loads: int
    wide_stores: int
    units: Mapping[str, int] = {}


# Instructions of the tensor cores, and of the copies of whole vectors that feed them.
TENSOR_CORES = {
    "wgmma": r"wgmma\.mma_async", "mma.sync": r"\bmma\.sync", "tcgen05": r"tcgen05\.mma",
    "mfma": r"\bv_mfma_", "wmma": r"\bv_wmma_",
}  # fmt: skip
COPIES = {"cp.async": r"\bcp\.async\.cg", "tma": r"cp\.async\.bulk\.tensor\S*\.shared"}
UNITS = {**TENSOR_CORES, **COPIES}


def target_of(architecture: int | str) -> GPUTarget:
    """Of an NVIDIA compute capability (90) or an AMD architecture ("gfx942")."""
    if isinstance(architecture, int):
        return GPUTarget("cuda", architecture, 32)
    return GPUTarget("hip", architecture, 64 if architecture.startswith("gfx9") else 32)


class _Driver:
    def __init__(self, target: GPUTarget) -> None:
        self.target = target
        shared = SHARED_LIMIT[target.arch]
        properties = {
            "multiprocessor_count": PROCESSORS.get(target.arch, 80), "max_shared_mem": shared,
            "warpSize": target.warp_size, "max_num_regs": 65536,
        }  # fmt: skip
        self.utils = type("Utils", (), {"get_device_properties": lambda _, device: properties})()

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        # A device of its own per target: compiled variants are cached per device.
        return sorted(map(str, SHARED_LIMIT)).index(str(self.target.arch)) + 100

    def set_current_device(self, device):
        pass

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cuda", 0)

    def get_device_interface(self):
        return torch.cuda


class _Fakes(TorchFunctionMode):
    """Gives fake tensors addresses: storages on 256 bytes, views where they are within.

    Indexing is spelt as the views it is, and a few methods as the operation they are: their
    bindings guard the device, which is not there.
    """

    unguarded: ClassVar[dict[str, Any]] = {
        "__invert__": torch.ops.aten.logical_not.default,
        "copy_": torch.ops.aten.copy_.default,
    }

    addresses: ClassVar[weakref.WeakKeyDictionary[Any, int]] = weakref.WeakKeyDictionary()
    following = 1 << 20

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if not args or not isinstance(args[0], FakeTensor):
            return function(*args, **(kwargs or {}))
        if name == "data_ptr":
            storage = args[0].untyped_storage()
            if storage not in self.addresses:
                _Fakes.following += 1 << 34
                self.addresses[storage] = _Fakes.following
            return self.addresses[storage] + args[0].storage_offset() * args[0].element_size()
        if name == "__getitem__":
            return _view(*args)
        if name == "__setitem__":
            return torch.ops.aten.copy_.default(_view(*args[:2]), args[2])
        kwargs = dict(kwargs or {})
        if name == "mv" and "out" in kwargs:  # its decomposition copies through a guarded binding
            out = kwargs.pop("out")
            return torch.ops.aten.copy_.default(out, function(*args, **kwargs))
        if name == "addmm" and "out_dtype" in kwargs:  # likewise guarded
            torch.ops.aten.mm.dtype_out(*args[1:], kwargs["out_dtype"], out=kwargs["out"])
            return kwargs["out"]
        function = self.unguarded.get(name, function)
        return function(*args, **kwargs)


def _view(tensor, key):
    dim = 0
    for each in key if isinstance(key, tuple) else (key,):
        if isinstance(each, int):
            tensor = tensor.select(dim, each)
            continue
        if each is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(each, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dim, each.start, each.stop)
        else:
            tensor = torch.ops.aten.index.Tensor(tensor, [None] * dim + [each])
        dim += 1
    return tensor


@contextlib.contextmanager
def dryrun(architecture: int | str) -> Iterator[list[Launch]]:
    """Within it, launchers on fake CUDA tensors compile for `architecture`; yields the launches."""
    log: list[Launch] = []
    target = target_of(architecture)

    def get(kernel, grid):
        def launch(*args, **kwargs):
            compiled = kernel.warmup(*args, grid=grid, **kwargs)
            tensors = {
                name: each
                for name, each in (*zip(kernel.arg_names, args, strict=False), *kwargs.items())
                if isinstance(each, torch.Tensor)
            }
            log.append(Launch(compiled.metadata.name, grid, compiled, _overlapping(tensors)))

        return launch

    name = "amd"
    if isinstance(architecture, int):
        name = tuning.architecture_class(*divmod(architecture, 10))
    capability = architecture if isinstance(architecture, int) else 0
    info = tuning.Device(name, PROCESSORS.get(architecture, 80), capability)
    saved = (
        triton.KernelInterface.__getitem__, driver._active, tuning.device_info, tuning.guard,
    )  # fmt: skip
    triton.KernelInterface.__getitem__ = get
    driver.set_active(_Driver(target))
    tuning.device_info = lambda device: info
    tuning.guard = lambda device: contextlib.nullcontext()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _Fakes():
            yield log
    finally:
        (
            triton.KernelInterface.__getitem__, driver._active, tuning.device_info, tuning.guard,
        ) = saved  # fmt: skip


def _overlapping(tensors: dict[str, torch.Tensor]) -> tuple[tuple[str, str], ...]:
    """Pairs of tensors whose memory has bytes in common, or lies between the other's rows."""
    ends = {}
    for name, each in tensors.items():
        if each.numel() > 0:
            last = sum((n - 1) * s for n, s in zip(each.shape, each.stride(), strict=True))
            start = each.data_ptr()
            ends[name] = (start, start + (last + 1) * each.element_size())
    return tuple(
        (one, other)
        for one, other in itertools.combinations(ends, 2)
        if ends[one][0] < ends[other][1] and ends[other][0] < ends[one][1]
    )


def resources(compiled: Any) -> Resources:
    """Of a compiled kernel, from its machine code: no device is asked."""
    shared = compiled.metadata.shared
    code = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    counts = {name: len(re.findall(pattern, code)) for name, pattern in UNITS.items()}
    units = {name: count for name, count in counts.items() if count}
    if "cubin" not in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers, spills = (
            int((re.search(rf"\.{key}:\s*(\d+)", text) or [0, 0])[1])
            # Scalar registers spill to lanes of vector registers, not to memory.
            for key in ("vgpr_count", "vgpr_spill_count")
        )
        loads = len(re.findall(r"(?:global|buffer)_load_(?:dwordx4|b128)", text))
        stores = len(re.findall(r"(?:global|buffer)_store_(?:dwordx4|b128)", text))
        return Resources(registers, spills, shared, loads, stores, units)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        code = _output(knobs.nvidia.nvdisasm.path, "-c", str(path))
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    # 128 bits, or 256 on sm_100 and newer.
    loads = len(re.findall(r"LDG\.E\S*\.(?:128|256|ENL2)", code))
    stores = len(re.findall(r"STG\.E\S*\.(?:128|256|ENL2)", code))
    return Resources(registers, spilled(code), shared, loads, stores, units)


def spilled(code: str) -> int:
    """Accesses of local memory in the code of an NVIDIA card that are no argument of a call.

    For sm_120 CUDA 12.9 (Triton 3.6) surrounds a TMA load by the branch of an address in another
    block's shared memory, never taken here, which calls the driver with a zero on the stack.
    """
    return len(re.findall(r"\b(?:LDL\b|STL\b(?!\S* \[[^]]*\], RZ\b))", code))


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
