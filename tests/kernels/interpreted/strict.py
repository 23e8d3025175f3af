"""Makes triton's interpreter strict: exact bf16, and errors where a GPU would fail silently.

The stock interpreter computes bf16 on its bit patterns and truncates instead of rounding, reads
memory out of bounds, wraps int32 silently and runs programs in order. With `install()`:

- bf16 widens exactly and rounds to nearest even; its arithmetic and dots are float32's, rounded;
- every load, store and atomic must lie inside a tensor handed to the launch, not between its rows;
- no two programs may touch the same byte unless both only read it;
- nor may a program write a byte that it has read or written, or read one that it has written, with
  no `tl.debug_barrier` between: its warps run in no order (`overlaps.py` lists what is safe);
- programs run in a random order, int32 overflow and `tl.device_assert` raise.

It also takes a third of the time of the stock one, which patches the language anew for every call
of a device function and looks for an overflow by a dozen operations of the language.

Needs TRITON_INTERPRET=1 in the environment before triton is imported.
"""

import dataclasses
import functools
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

from tests.kernels.overlaps import BY_ELEMENT

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle

# An access of a byte as one number: phase of the launch, shape of what is accessed, element of it.
_SHAPE, _PHASE = 32, 40  # first bits
_SEVERAL = (1 << _PHASE) - 1  # elements


class Memory:
    """A tensor of the running launch: its addresses, and which program wrote or read each byte.

    What lies between the rows of a view is none of it.
    """

    def __init__(self, tensor: Any, name: str) -> None:
        size = tensor.element_size()
        extent = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        self.start = tensor.data_ptr()
        self.stop = self.start + extent * size
        self.name = name
        self.pitch = self.width = extent * size
        if tensor.ndim == 2 and tensor.shape[0] > 1 and tensor.stride(0) > tensor.shape[1]:
            self.pitch = tensor.stride(0) * size
            self.width = ((tensor.shape[1] - 1) * tensor.stride(1) + 1) * size
        rows = (self.stop - self.start - self.width) // self.pitch + 1
        self.writer = np.zeros(rows * self.width, np.int32)  # 0 nobody, else program + 1
        self.reader = np.zeros(rows * self.width, np.int32)  # likewise, -1 several
        self.loaded = np.zeros(rows * self.width, np.int64)  # the last access of either kind
        self.stored = np.zeros(rows * self.width, np.int64)

    def holds(self, addresses, size):
        within = (addresses - self.start) % self.pitch + size <= self.width
        return (addresses >= self.start) & (addresses + size <= self.stop) & within

    def touch(self, addresses, elements, size, kind, program):
        row, byte = np.divmod(addresses - self.start, self.pitch)
        each = (row * self.width + byte)[:, None] + np.arange(size)
        each, me = each.ravel(), program + 1
        foreign = (self.writer[each] != 0) & (self.writer[each] != me)
        if kind == "store":
            foreign |= (self.reader[each] != 0) & (self.reader[each] != me)
        if kind != "atomic" and foreign.any():
            raise AssertionError(
                f"RACE: program {program} {kind}s byte {each[foreign][0]} of tensor {self.name}, "
                "which another program touches too"
            )
        if kind == "load":
            alone = (self.reader[each] == 0) | (self.reader[each] == me)
            self.reader[each] = np.where(alone, me, -1)
        if kind == "store":
            self.writer[each] = me
        if kind != "atomic":
            self.meet(each, np.repeat(elements, size), kind)

    def meet(self, each, elements, kind):
        """Refuses what no barrier orders among the warps of a program, and notes the access."""
        phase = State.phase << _PHASE
        access = phase + elements
        loaded, stored = self.loaded[each], self.stored[each]
        refused = stored >= phase
        if kind == "store":
            refused = refused | (loaded >= phase)
            if self.name in BY_ELEMENT.get(State.kernel, ()):
                refused = ((stored >= phase) & (stored != access)) | (
                    (loaded >= phase) & (loaded != access)
                )
        if refused.any():
            raise AssertionError(
                f"HAZARD: {State.kernel} {kind}s byte {each[refused][0]} of tensor {self.name}, "
                f"which this program has {'read or ' * (kind == 'store')}written, with no barrier "
                "between"
            )
        if kind == "load":
            again = (loaded >= phase) & (loaded != access)
            self.loaded[each] = np.where(again, phase + _SEVERAL, access)
        else:
            self.stored[each] = access


class State:
    """The running launch."""

    memories: list[Memory] = []  # noqa: RUF012 - replaced as a whole per launch
    kernel = ""
    program = 0
    phase = 0  # one more with every program of the launch, and with every barrier
    shapes: dict[tuple[int, ...], int] = {}  # noqa: RUF012 - a number for each
    order: list[int] = []  # noqa: RUF012
    grid = (1, 1, 1)
    installed = False


def widen(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(values):
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).reshape(values.shape)


def is_bf16(handle):
    return handle.dtype.scalar == tl.bfloat16


def _check(pointer, mask, kind):
    size = max(1, pointer.get_element_ty().primitive_bitwidth // 8)
    chosen = mask.data if isinstance(mask, Handle) else np.True_ if mask is None else mask
    addresses, chosen = np.broadcast_arrays(pointer.data, chosen)
    shape = State.shapes.setdefault(chosen.shape, len(State.shapes))
    elements = np.flatnonzero(chosen) + (shape << _SHAPE)
    addresses = addresses[chosen].astype(np.int64)
    if addresses.size == 0:
        return
    inside = np.zeros(addresses.shape, bool)
    first, last = addresses.min(), addresses.max()
    for memory in State.memories:
        if last < memory.start or first >= memory.stop:
            continue
        hit = memory.holds(addresses, size)
        if hit.any():
            memory.touch(addresses[hit], elements[hit], size, kind, State.program)
        inside |= hit
    if not inside.all():
        where = int(addresses[~inside][0])
        near = ", ".join(
            f"tensor {m.name}: byte {where - m.start} of {m.stop - m.start}" for m in State.memories
        )
        raise IndexError(f"OUT OF BOUNDS: program {State.program} {kind}s at {near}")


def as_float(handle):
    return Handle(widen(handle.data), tl.float32) if is_bf16(handle) else handle


def _strict_casts():
    cast, fp_to_fp = Builder.cast_impl, Builder.create_fp_to_fp

    def strict_cast(self, source, target):
        if is_bf16(source) and target.scalar != tl.bfloat16:
            source = as_float(source)
            return source if target.scalar == tl.float32 else cast(self, source, target)
        if target.scalar == tl.bfloat16 and not is_bf16(source):
            return Handle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return cast(self, source, target)

    def strict_fp_to_fp(self, source, target, mode):
        if (is_bf16(source) or target.scalar == tl.bfloat16) and "RTZ" not in str(mode):
            return strict_cast(self, source, target)
        return fp_to_fp(self, source, target, mode)

    Builder.get_bf16 = lambda self, value: Handle(narrow(np.array([value])), tl.bfloat16)
    Builder.cast_impl, Builder.create_fp_to_fp = strict_cast, strict_fp_to_fp


def _strict_arithmetic():
    binary, unary, dot = Builder.binary_op, Builder.unary_op, Builder.create_dot

    def strict_binary(self, a, b, operation):
        if not (is_bf16(a) or is_bf16(b)):
            return binary(self, a, b, operation)
        result = operation(as_float(a).data, as_float(b).data)
        if result.dtype == np.bool_:
            return Handle(result, tl.int1)
        return Handle(narrow(result), tl.bfloat16)

    def strict_unary(self, a, operation):
        if is_bf16(a):
            return Handle(narrow(operation(widen(a.data))), tl.bfloat16)
        return unary(self, a, operation)

    def strict_dot(self, a, b, *rest):
        return dot(self, as_float(a), as_float(b), *rest)

    Builder.binary_op, Builder.unary_op = strict_binary, strict_unary
    Builder.create_dot = strict_dot


def _checked_memory():
    load, store, update, exchange = (
        Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw,
        Builder.create_atomic_cas,
    )  # fmt: skip

    def checked_load(self, pointer, mask, *rest, **options):
        _check(pointer, mask, "load")
        return load(self, pointer, mask, *rest, **options)

    def checked_store(self, pointer, value, mask, *rest, **options):
        _check(pointer, mask, "store")
        return store(self, pointer, value, mask, *rest, **options)

    def checked_update(self, operation, pointer, value, mask, *rest):
        _check(pointer, mask, "atomic")
        return update(self, operation, pointer, value, mask, *rest)

    def barrier(self):
        State.phase += 1

    def checked_exchange(self, pointer, *rest):
        _check(pointer, None, "atomic")
        return exchange(self, pointer, *rest)

    Builder.create_masked_load, Builder.create_masked_store = checked_load, checked_store
    Builder.create_atomic_rmw, Builder.create_atomic_cas = checked_update, checked_exchange
    Builder.create_barrier = barrier


def _shuffled_launches():
    arguments = interpreter.GridExecutor._init_args_hst
    set_dim, set_idx = Builder.set_grid_dim, Builder.set_grid_idx

    def strict_arguments(self, args, kwargs):
        host, host_kwargs = arguments(self, args, kwargs)
        everything = zip(self.arg_names, host, strict=False), host_kwargs.items()
        tensors = [
            (name, getattr(each, "base", each)) for part in everything for name, each in part
        ]
        State.memories = [
            Memory(each, name)
            for name, each in tensors
            if hasattr(each, "data_ptr") and each.numel()
        ]
        State.kernel, State.phase = self.fn.__name__, 0
        return host, host_kwargs

    def shuffled_dim(self, x, y, z):
        State.grid, State.order = (x, y, z), random.sample(range(x * y * z), x * y * z)
        set_dim(self, x, y, z)

    def shuffled_idx(self, x, y, z):
        _, y_count, z_count = State.grid
        State.phase += 1
        State.program = chosen = State.order[(x * y_count + y) * z_count + z]
        rest, z = divmod(chosen, z_count)
        set_idx(self, *divmod(rest, y_count), z)

    interpreter.GridExecutor._init_args_hst = strict_arguments
    Builder.set_grid_dim, Builder.set_grid_idx = shuffled_dim, shuffled_idx


def _checked_overflow():
    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def overflow(self, a, b, operation):
        scalar = a.type.scalar
        if scalar.int_bitwidth >= 64:
            return
        wide = (each.handle.data.astype(np.int64) for each in (a, b))
        result = operations[operation.__name__](*wide)
        if result.max() > scalar.get_int_max_value() or result.min() < scalar.get_int_min_value():
            raise AssertionError(f"int{scalar.int_bitwidth} overflow in {operation.__name__}")

    interpreter.TritonSemantic.binary_op_sanitize_overflow_impl = overflow


def _patched_once():
    patch = interpreter._patch_lang
    modules = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})

    @functools.cache
    def patched():
        patch(modules)  # is never restored: this process does nothing but interpret
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = lambda function: patched()


def _known_types():
    dtype_of, known = interpreter._get_np_dtype, {}
    broadcast = interpreter.TritonSemantic.broadcast_impl_value

    def of(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = dtype_of(dtype)
        return known[name]

    def broadcast_if_needed(self, a, b):
        shapes = [list(each.type.shape) if each.type.is_block() else None for each in (a, b)]
        return (a, b) if shapes[0] == shapes[1] else broadcast(self, a, b)

    interpreter._get_np_dtype = of
    interpreter.TritonSemantic.broadcast_impl_value = broadcast_if_needed
    tl.block_type.to_ir = lambda self, builder: self  # a copy of itself, otherwise


def install():
    """Makes the interpreter of this process strict, once."""
    if State.installed:
        return
    State.installed = True
    _strict_casts()
    _strict_arithmetic()
    _checked_memory()
    _shuffled_launches()
    _checked_overflow()
    _patched_once()
    _known_types()
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=True)
