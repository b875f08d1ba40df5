"""Runs Gluon kernels in numpy, a thread a program: for their arithmetic, not for layouts or timing.

Whole blocks are computed at once, so barriers inside a program are no-ops; programs run concurrently and meet through
atomics. Memory is checked: an unmasked access out of an array fails, and outputs start as garbage.
"""

from __future__ import annotations

import importlib
import itertools
import re
import sys
import threading
import time
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_local = threading.local()
_atomic = threading.Lock()
_BASE = 1024  # address of the shared array


class Value:
    """A block or a scalar, with the operators that kernels use; mixed with Python numbers it keeps its dtype."""

    def __init__(self, array: Any) -> None:
        self.array = np.asarray(array)
        self.type = types.SimpleNamespace(layout=None)

    def to(self, dtype: Any, bitcast: bool = False) -> Value:
        return Value(self.array.view(dtype) if bitcast else self.array.astype(dtype))

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def __neg__(self) -> Value:
        return Value(-self.array)

    def reshape(self, shape: list[int]) -> Value:
        return Value(self.array.reshape(shape))

    def __getitem__(self, index: Any) -> Value:
        return Value(self.array[index])

    def __bool__(self) -> bool:
        return bool(self.array)

    def __index__(self) -> int:
        return int(self.array)


def raw(x: Any) -> Any:
    return x.array if isinstance(x, Value) else x


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: Value, other: Any) -> Any:
        if isinstance(other, Pointer):
            return other + self
        with np.errstate(over="ignore"):
            return Value(
                getattr(self.array, name)(np.asarray(raw(other), self.array.dtype) if _plain(other) else raw(other))
            )

    return apply


def _plain(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


for _name in [
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
    "lt",
    "le",
    "gt",
    "ge",
    "eq",
    "ne",
]:
    setattr(Value, f"__{_name}__", _operator(f"__{_name}__"))
for _name in ["add", "sub", "mul", "truediv", "and", "or", "lshift"]:
    setattr(Value, f"__r{_name}__", _operator(f"__r{_name}__"))


class Pointer:
    """Offsets into a flat numpy array."""

    def __init__(self, buffer: np.ndarray, offset: Any = 0) -> None:
        self.buffer, self.offset = buffer, offset

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.buffer, self.offset + np.asarray(raw(other), np.int64))

    def at(self, mask: Any) -> tuple[np.ndarray, np.ndarray]:
        """(live, offsets of the live), which must be inside."""
        offset, live = np.broadcast_arrays(self.offset, raw(mask))
        inside = offset[live]
        assert ((inside >= 0) & (inside < self.buffer.size)).all(), f"out of {self.buffer.size}: {inside}"
        return live, inside


class _Int(int):
    value = property(int)


def _load(pointer: Pointer, mask: Any = True, other: Any = 0, volatile: bool = False, **_hints: str) -> Value:
    if volatile:
        time.sleep(1e-4)
    live, offset = pointer.at(mask)
    out = np.full(live.shape, other, pointer.buffer.dtype)
    out[live] = pointer.buffer[offset]
    return Value(out)


def _store(pointer: Pointer, value: Any, mask: Any = True) -> None:
    live, offset = pointer.at(mask)
    assert np.unique(offset).size == offset.size, "two elements of one block go to one place"
    pointer.buffer[offset] = np.broadcast_to(raw(value), live.shape)[live]


def _atomic_add(pointer: Pointer, value: int, sem: str, scope: str) -> Value:
    if value == 0:
        time.sleep(1e-4)
    with _atomic:
        old = pointer.buffer[int(pointer.offset)].copy()
        pointer.buffer[int(pointer.offset)] += value
    return Value(old)


def _atomic_xchg(pointer: Pointer, value: Any, sem: str, scope: str, mask: Any = True) -> Value:
    time.sleep(1e-4 * np.random.default_rng().integers(3))
    old = _load(pointer, mask)
    _store(pointer, value, mask)
    return old


def _asm(text: str, constraints: str, args: list[Any], dtype: Any, is_pure: bool, pack: int) -> Value:
    """What the PTX of ``gluon_shared``, of ``top_k`` and of ``router.gluon_few`` does."""
    if (found := _warp_asm(text, args, dtype)) is not None:
        return found
    if text.startswith("mov.b32"):
        return args[0]
    if text.startswith("popc"):
        return Value(np.bitwise_count(raw(args[0]).view(np.uint32)).astype(np.int32))
    if text.startswith("set.gt.f32"):
        return Value((raw(args[0]) > raw(args[1])).astype(np.float32))
    if "shfl.sync.bfly" in text:
        assert ", 1, 31," in text, text
        return Value(raw(args[0]).reshape(-1, 2)[:, ::-1].reshape(-1))
    if text.startswith("bar.warp.sync"):
        return args[0] if args else Value(np.int32(0))
    if "ld.relaxed" in text:
        return _wait_for_words(text, args, dtype, pack)
    if "st.shared" in text and text.endswith("mov.b32 $0, 0; }"):
        return _store_shared(args[0], args[1:-1], raw(args[-1]) != 0)
    if text.startswith("st.shared"):
        return _store_shared(args[0], args[1:], True)
    if text.startswith("ld.shared") and isinstance(dtype, tuple):
        index = (raw(args[0]).astype(np.int64) - _BASE) // 4
        return tuple(Value(_local.shared[index + i].view(kind)) for i, kind in enumerate(dtype))
    if "bytes behind" in text:
        _local.shared = np.full(int(re.findall(r"bytes behind: (\d+)", text)[0]) // 4, 0xDEADBEEF, np.uint32)
        return Value(np.int32(_BASE))
    if ".shared .align" in text:
        size = re.search(r"\.b(\d+) \w+\[(\d+)\]", text)
        assert size
        _local.shared = np.full(int(size[1]) * int(size[2]) // 32, 0xDEADBEEF, np.uint32)
        return Value(np.uint32(_BASE))
    if "trap" in text:
        assert raw(args[0]) >= (raw(args[1]) if len(args) > 1 else 1), "a program waited in vain"
        return Value(np.int32(0))
    index = (raw(args[0]).astype(np.int64) - _BASE) // 4
    if text.startswith("ld.shared"):
        return Value(_local.shared[index].view(dtype))
    if "red.shared" in text:
        np.add.at(_local.shared, index, 1)
    elif "st.shared.v2" in text:
        found = raw(args[4]) != 0
        assert found.sum() == 1, f"{found.sum()} bins hold the wanted element"
        _local.shared[2048:2051] = [raw(a)[found][0] for a in args[1:4]]
    else:
        assert "st.shared.u32 [$1], 0" in text, text
        _local.shared[index] = 0
    return Value(np.uint32(0))


def _warp_asm(text: str, args: list[Any], dtype: Any) -> Any:
    """PTX of ``top_k.gluon_warps`` that others have not; None where it is not that. Lanes of a warp are neighbours."""
    given = [raw(arg) for arg in args]
    lanes = lambda: given[0].reshape(-1, 32)  # noqa: E731
    spread = lambda x: Value(np.repeat(x.astype(dtype), 32))  # noqa: E731
    with np.errstate(all="ignore"):
        if "max.f32 f, $1, 0fFF800000; add.f32" in text:
            return Value(np.fmax(given[0], np.float32(-np.inf)) + np.float32(0))
        if text.startswith(("max.f32", "min.f32")):
            return Value((np.fmax if text.startswith("max") else np.fmin)(*given))
        if "rcp.approx" in text:
            bins = _float_of(text, "mul.f32 $0, f, ")
            return Value(np.float32(1) / (given[0] - given[1]) * bins)
        if "cvt.rzi.u32.f32" in text:
            most = _float_of(text, "min.f32 f, f, ")
            return Value(np.fmin((given[1] - given[0]) * given[2], most).astype(np.uint32))
    if text.startswith("redux"):
        function = {"add": np.sum, "min": np.min, "max": np.max}[text.split(".")[2]]
        return spread(function(lanes(), axis=1))
    if "shfl.sync.up" in text:
        return Value(np.cumsum(lanes(), axis=1, dtype=dtype).reshape(-1))
    if "vote.sync.ballot" in text:
        votes = (lanes() != 0).astype(np.int32)
        number = Value(np.repeat(votes.sum(1, dtype=np.int32), 32))
        return (Value((votes.cumsum(1, dtype=np.int32) - votes).reshape(-1)), number) if "lanemask" in text else number
    if text.startswith("bfind"):
        return Value(np.frexp(given[0].astype(np.float64))[1].astype(np.int32) - 1)
    if "atom.shared.add" in text:
        base = (int(given[0]) - _BASE) // 4
        words = re.findall(r"\+(\d+)\]", text)
        for i in np.random.default_rng().permutation(np.flatnonzero(given[3])):
            place = base + int(words[1]) // 4 + 2 * int(_local.shared[base + int(words[0]) // 4])
            _local.shared[place : place + 2] = given[1][i], given[2][i]
            _local.shared[base + int(words[0]) // 4] += 1
        return Value(np.uint32(0))
    if "{z, z, z, z}" in text:
        index = np.atleast_1d((given[0].astype(np.int64) - _BASE) // 4)
        _local.shared[(index[:, None] + np.arange(4)).ravel()] = 0
        return Value(np.uint32(0))
    return None


def _float_of(text: str, before: str) -> np.float32:
    (bits,) = re.findall(re.escape(before) + "0f([0-9A-F]{8})", text)
    return np.uint32(int(bits, 16)).view(np.float32)


def _store_shared(at: Value, words: list[Value], known: Any) -> Value:
    """Neighbouring words of every thread, each to a place of its own."""
    at_byte, live = np.broadcast_arrays(raw(at).astype(np.int64) - _BASE, known)
    places = at_byte[live][:, None] // 4 + np.arange(len(words))
    assert np.unique(places).size == places.size, "two threads write one word"
    for i, word in enumerate(words):
        _local.shared[places[:, i]] = np.broadcast_to(raw(word), live.shape)[live].view(np.uint32)
    return Value(np.int32(0))


def _wait_for_words(text: str, args: list[Any], dtype: Any, pack: int) -> Any:
    """Loads again and again until no word is zero; sums where there are several of an output, and zeros for who asks for that."""
    loads = re.findall(r"ld\.relaxed\.gpu\.global\S* (\{[^}]*\}|\S+), \[\$\d+(?: \+ (\d+))?\];", text)
    loads = loads[: len(loads) // pack]
    words = [int(offset or 0) // 4 + i for names, offset in loads for i in range(names.count(",") + 1)]
    outputs = len(dtype) if isinstance(dtype, tuple) else 1
    pointer, asked = args
    at, asked = np.broadcast_arrays(pointer.offset, raw(asked) != 0)
    at_words = at[asked][:, None] + np.asarray(words)
    Pointer(pointer.buffer, at_words).at(True)
    found = pointer.buffer[at_words]
    for _ in range(100_000):
        if (found != 0).all():
            break
        time.sleep(1e-4)
        found = pointer.buffer[at_words]
    else:
        raise AssertionError("a program waited in vain")
    if "st.global" in text:
        assert text.count("st.global") == len(loads) * pack
        pointer.buffer[at_words] = 0
    parts = found.reshape(len(found), len(words) // outputs, outputs)
    total = parts[:, 0]
    for i in range(1, parts.shape[1]):
        total = (total.view(np.float32) + parts[:, i].view(np.float32)).view(np.int32)
    values = []
    for i in range(outputs):
        value = np.zeros(asked.shape, np.int32)
        value[asked] = total[:, i]
        values.append(Value(value))
    return tuple(values) if isinstance(dtype, tuple) else values[0]


def _reduce(function: Callable[..., Any]) -> Callable[[Value, int], Value]:
    return lambda x, axis: Value(function(x.array, axis=axis).astype(x.array.dtype))


def _both(function: Callable[..., Any]) -> Callable[..., Value]:
    return lambda *xs: Value(function(*(raw(x) for x in xs)))


def _one(function: Callable[..., Any]) -> Callable[[Value], Value]:
    def apply(x: Value) -> Value:
        with np.errstate(over="ignore", divide="ignore"):
            return Value(function(x.array).astype(x.array.dtype))

    return apply


def _add_up(xs: tuple[Value, ...], axis: int, _function: Any) -> tuple[Value, ...]:
    return tuple(Value(x.array.sum(axis, dtype=x.array.dtype)) for x in xs)


def _mma(a: Value, b: Value, total: Value) -> Value:
    return Value(total.array + np.matmul(a.array.astype(np.float32), b.array.astype(np.float32)))


def _where(condition: Value, a: Any, b: Any) -> Value:
    dtype = next((raw(x).dtype for x in (a, b) if isinstance(x, Value)), np.int32)
    return Value(np.where(raw(condition), np.asarray(raw(a), dtype), np.asarray(raw(b), dtype)))


def _language() -> types.ModuleType:
    gl = types.ModuleType("triton.experimental.gluon.language")
    layout = lambda *a: None  # noqa: E731
    gl.__dict__.update(
        constexpr=lambda x: _Int(x) if isinstance(x, int) else x, int32=np.int32, int64=np.int64, uint32=np.uint32,
        arange=lambda start, end, layout=None: Value(np.arange(start, end, dtype=np.int32)),
        full=lambda shape, value, dtype, layout=None: Value(np.full(shape, value, dtype)),
        where=_where, minimum=_both(np.minimum), maximum=_both(np.maximum), sum=_reduce(np.sum), max=_reduce(np.max),
        cdiv=lambda a, b: (a + (b - 1)) // b, load=_load, store=_store, atomic_add=_atomic_add, inline_asm_elementwise=_asm,
        associative_scan=lambda x, axis, add: Value(np.cumsum(x.array, axis, dtype=x.array.dtype)),
        split=lambda x: (x[..., 0], x[..., 1]), join=lambda a, b: Value(np.stack([a.array, b.array], -1)),
        convert_layout=lambda x, layout, assert_trivial=False: x, thread_barrier=lambda: None, BlockedLayout=layout,
        SliceLayout=layout, NVMMADistributedLayout=layout, DotOperandLayout=layout, bfloat16=jnp.bfloat16, float32=np.float32,
        float8e4nv=jnp.float8_e4m3fn,
        zeros=lambda shape, dtype, layout=None: Value(np.zeros(shape, dtype)), zeros_like=lambda x: Value(np.zeros_like(x.array)),
        exp=_one(np.exp), rsqrt=_one(lambda x: 1 / np.sqrt(x)), min=_reduce(np.min), reshape=lambda x, shape: x.reshape(shape),
        static_range=range, atomic_xchg=_atomic_xchg, reduce=_add_up, num_warps=lambda: _local.warps,
        program_id=lambda axis: Value(np.int32(_local.program[axis])), num_programs=lambda axis: _local.grid[axis],
    )  # fmt: skip

    def static_assert(condition: bool) -> None:
        assert condition

    gl.__dict__["static_assert"] = static_assert
    return gl


def _triton_call(
    *args: Any,
    kernel: Callable[..., None],
    out_type: Any,
    grid: tuple[int, ...],
    name: str,
    num_warps: int,
    **sizes: int,
) -> tuple[jax.Array, ...]:
    """Runs every program in a thread; outputs start as garbage, references are written back."""
    arrays = [Value(np.int32(a)) if isinstance(a, int) else Pointer(np.array(a[...]).ravel()) for a in args]
    sizes_of = [np.dtype(o.dtype).itemsize * int(np.prod(o.shape)) for o in out_type]
    outputs = [np.frombuffer(b"\xa5" * n, np.dtype(o.dtype)).copy() for n, o in zip(sizes_of, out_type, strict=True)]
    failures: list[BaseException] = []

    def program(index: tuple[int, ...]) -> None:
        _local.program, _local.grid, _local.warps = index, grid, num_warps
        try:
            kernel(*arrays, *(Pointer(a) for a in outputs), **sizes)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=program, args=(i,)) for i in itertools.product(*map(range, grid))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    for arg, array in zip(args, arrays, strict=True):
        if not isinstance(arg, jax.Array | int):
            arg[...] = jnp.asarray(array.buffer.reshape(arg.shape))
    return tuple(jnp.asarray(o.reshape(t.shape)) for o, t in zip(outputs, out_type, strict=True))


# Every kernel's, imported by those of a package.
_SHARED = "pallas_kernels.gluon_shared"


def load(package: str, modules: tuple[str, ...]) -> dict[str, types.ModuleType]:
    """Fresh copies of a package's modules, in order of import, over the emulated language; sys.modules is left as it was."""
    gl = _language()
    names = {f"{package}.{module}" for module in modules} | {_SHARED}
    gluon = types.ModuleType("triton.experimental.gluon")
    gluon.__dict__.update(jit=lambda f: f, constexpr_function=lambda f: f, language=gl)
    triton = types.ModuleType("triton")
    triton.__dict__.update(next_power_of_2=lambda n: 1 << (n - 1).bit_length())
    call = types.ModuleType("jax_triton")
    call.__dict__.update(triton_call=_triton_call)
    fix = types.ModuleType("pallas_kernels.jax_gluon")
    fix.__dict__.update(install=lambda: None, BEHIND="0")
    fakes = {
        "triton": triton, "triton.experimental": types.ModuleType("triton.experimental"), gluon.__name__: gluon,
        gl.__name__: gl, "jax_triton": call, fix.__name__: fix,
        **{f"{gl.__name__}.nvidia{last}": types.ModuleType("nvidia") for last in ("", ".ampere")},
    }  # fmt: skip
    fakes[f"{gl.__name__}.nvidia.ampere"].__dict__["mma_v2"] = _mma
    kept = {name: sys.modules.pop(name, None) for name in (*fakes, *names)}
    parent, fix_parent = sys.modules[package], importlib.import_module("pallas_kernels")
    attributes = [
        (owner, n, getattr(owner, n, None))
        for owner, ns in ((parent, modules), (fix_parent, ("jax_gluon", "gluon_shared")))
        for n in ns
    ]
    try:
        sys.modules.update(fakes)
        fix_parent.__dict__["jax_gluon"] = fix
        loaded = {module: importlib.import_module(f"{package}.{module}") for module in modules}
        for module in loaded.values():
            if hasattr(module, "triton_options"):
                module.__dict__["triton_options"] = dict  # there is nothing to compile, nor a jax_triton that does it
        return loaded
    finally:
        for name, module in kept.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        for owner, name, value in attributes:
            owner.__dict__.pop(name, None)
            if value is not None:
                setattr(owner, name, value)
