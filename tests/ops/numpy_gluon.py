"""A part of Gluon over numpy, for kernels of few heads: PTX of bytes, shared memory, clusters as threads; no layouts."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

BF16 = np.dtype(ml_dtypes.bfloat16)
raw = lambda x: x.a if isinstance(x, Block) else x  # noqa: E731


@dataclasses.dataclass
class Block:
    """A tensor; layout is kept where it was loaded with one, for the order of its registers."""

    a: np.ndarray
    layout: Any = None

    def __getattr__(self, name: str) -> Any:
        return {"dtype": self.a.dtype}[name]

    def to(self, dtype: Any, bitcast: bool = False) -> Block:
        return Block(np.ascontiguousarray(self.a).view(dtype) if bitcast else self.a.astype(dtype))

    def reshape(self, shape: list[int]) -> Block:
        return Block(self.a.reshape(shape))

    def permute(self, order: tuple[int, ...]) -> Block:
        return Block(self.a.transpose(order))

    def __getitem__(self, index: Any) -> Block:
        return Block(self.a[index])

    def __bool__(self) -> bool:
        return bool(self.a)


def _operator(name: str) -> Callable[..., Any]:
    def apply(self: Block, other: Any) -> Any:
        given = raw(other)
        given = np.asarray(given, self.a.dtype) if isinstance(given, int | float) else given
        return NotImplemented if isinstance(other, Pointer) else Block(getattr(self.a, name)(given))

    return apply


for _name in (
    *("add", "sub", "mul", "truediv", "floordiv", "mod", "and", "lt", "gt", "ge", "eq"),
    *("radd", "rmul", "rsub", "rtruediv"),
):
    setattr(Block, f"__{_name}__", _operator(f"__{_name}__"))


class Pointer:
    """Offsets into a flat array; a load outside of it fails."""

    def __init__(self, buffer: np.ndarray, offset: Any = 0) -> None:
        self.buffer, self.offset = buffer, np.asarray(offset, np.int64)
        self.dtype = types.SimpleNamespace(element_ty=buffer.dtype, is_ptr=lambda: True)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.buffer, self.offset + raw(other))

    __radd__ = __add__

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.buffer, self.offset[index])

    def to(self, dtype: Any) -> Pointer:
        return Pointer(self.buffer.view(dtype))


class Number:
    """An int32 argument of the launch."""

    dtype = types.SimpleNamespace(is_ptr=lambda: False)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __rshift__(self, bits: int) -> Block:
        return Block(np.asarray(self.value >> bits, np.int32))


class Shared:
    """Shared memory, or a part of it; it starts as NaN."""

    def __init__(self, a: np.ndarray) -> None:
        self.a = a

    def slice(self, start: int, length: int, dim: int) -> Shared:
        return Shared(self.a[(slice(None),) * dim + (slice(start, start + length),)])

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.a.transpose(order))

    def _reinterpret(self, dtype: Any, shape: list[int], layout: Any) -> Shared:
        return Shared(self.a.view(dtype).reshape(shape))

    def load(self, layout: Any) -> Block:
        return Block(self.a.copy(), layout)

    def store(self, x: Block) -> None:
        self.a[...] = x.a


def _load(pointer: Pointer, mask: Any = True, other: Any = 0) -> Block:
    offset, live = np.broadcast_arrays(pointer.offset, raw(mask))
    assert ((offset[live] >= 0) & (offset[live] < pointer.buffer.size)).all(), "outside of the array"
    out = np.full(offset.shape, other, pointer.buffer.dtype)
    out[live] = pointer.buffer[offset[live]]
    return Block(out)


def _store(pointer: Pointer, x: Block, mask: Any) -> None:
    offset, live = np.broadcast_arrays(pointer.offset, raw(mask))
    pointer.buffer[offset[live]] = x.a[live]


def copy(target: Shared, pointer: Pointer, mask: Any) -> None:
    target.a[...] = _load(pointer, mask).a


def _prmt(a: Any, b: Any, selector: int) -> np.ndarray:
    both, out = a.astype(np.uint64) | np.asarray(b).astype(np.uint64) << np.uint64(32), np.zeros(a.shape, np.uint32)
    for i in range(4):
        nibble = selector >> 4 * i & 0xF
        byte = (both >> np.uint64(8 * (nibble & 7)) & np.uint64(0xFF)).astype(np.uint32)
        out |= (np.where(byte & 0x80, 0xFF, 0).astype(np.uint32) if nibble & 8 else byte) << np.uint32(8 * i)
    return out


def _fma(a: Any, b: Any, c: Any) -> np.ndarray:
    a, b, c = (np.ascontiguousarray(np.broadcast_to(x, a.shape)).view(BF16).astype(np.float64) for x in (a, b, c))
    return (a * b + c).astype(BF16).view(np.uint32)


def _execute(text: str, registers: dict[str, Any]) -> dict[str, Any]:
    for name, line in re.findall(r"^ (\w+)[\w.]* (\$?\w+, .*);$", text, re.MULTILINE):
        if name == "reg":
            continue
        target, *operands = line.split(", ")
        given = [registers[x] if x in registers else int(x, 0) for x in operands]
        if name == "mov":
            registers[target] = np.uint32(given[0])
        elif name == "prmt":
            registers[target] = _prmt(given[0], np.uint32(given[1]), given[2])
        elif name == "shl":
            registers[target] = given[0] << np.uint32(given[1])
        elif name == "and":
            registers[target] = given[0] & np.uint32(given[1])
        else:
            assert name == "fma", line
            registers[target] = _fma(*given)
    return registers


class Cluster:
    """Blocks as threads: what is sent to each, as float32 words, and one barrier for every wait."""

    def __init__(self, blocks: int, words: int) -> None:
        self.memory = np.full((blocks, words), np.nan, np.float32)
        self.barrier = threading.Barrier(blocks)


class Programs(threading.local):
    """What a block's thread knows of itself; the cluster is everybody's."""

    index: tuple[int, ...] = (0, 0, 0)

    def __getitem__(self, axis: int) -> int:
        return self.index[axis]


def in_cluster(now: list[Cluster], program: Programs) -> Callable[..., Any]:
    def run(text: str, constraints: str, args: list[Block], dtype: Any, is_pure: bool, pack: int) -> Any:
        memory = now[0].memory
        rank = program[0] % len(memory)
        if "cluster_ctarank" in text:
            return Block(np.asarray(rank, np.int32))
        if text.startswith("ld.shared"):
            return Block(memory[rank, raw(args[0]) // 4])
        if "st.async" not in text:
            return _asm(text, constraints, args, dtype, is_pure, pack)
        x, at, block, barrier = (raw(arg) for arg in args)
        assert (barrier == 4 * memory.shape[1]).all() and np.isnan(memory[block, at // 4]).all()
        memory[block, at // 4] = x.view(np.float32)
        return Block(np.zeros(1, np.uint32))

    return run


def _asm(text: str, constraints: str, args: list[Block], dtype: Any, is_pure: bool, pack: int) -> Any:
    """Pairs the elements that the layout's first register basis sets apart, as the compiler packs them."""
    (x,) = args
    assert pack == 2 and is_pure
    (axis, step), *more = [(d, n) for d, n in enumerate(x.layout[0][0]) if n]
    assert not more
    bits = x.a.view(f"u{x.a.itemsize}")
    first = [np.arange(n) for n in x.a.shape]
    first[axis] = first[axis][first[axis] & step == 0]
    second = list(first)
    second[axis] = first[axis] + step
    a, b = bits[np.ix_(*first)], bits[np.ix_(*second)]
    given = [a, b] if x.a.itemsize == 4 else [a.astype(np.uint32) | b.astype(np.uint32) << np.uint32(16)]
    outputs = constraints.count("=")
    registers = _execute(text, {f"${outputs + i}": r for i, r in enumerate(given)})
    results = []
    for i in range(outputs):
        out, packed = np.empty(x.a.shape, np.uint16), registers[f"${i}"]
        out[np.ix_(*first)], out[np.ix_(*second)] = packed & np.uint32(0xFFFF), packed >> np.uint32(16)
        results.append(Block(out.view(BF16)))
    return results[0] if outputs == 1 else results


def mma(a: Block, b: Block, acc: Block) -> Block:
    """A product whose tiny operands keep their bits."""
    product = a.a.astype(np.float64) @ b.a.astype(np.float64)
    return Block((product + acc.a).astype(np.float32))


def language(program: Any) -> types.ModuleType:
    gl = types.ModuleType("triton.experimental.gluon.language")
    nothing = lambda *a, **k: None  # noqa: E731
    reduce = lambda f: lambda x, axis: Block(f(x.a, axis=axis))  # noqa: E731
    gl.__dict__.update(
        constexpr=lambda x: x, int16=np.int16, int32=np.int32, int64=np.int64, float32=np.float32, bfloat16=BF16,
        pointer_type=lambda t: t, arange=lambda a, b, layout=None: Block(np.arange(a, b, dtype=np.int32)),
        full=lambda shape, value, dtype, layout=None: Block(np.full(shape, value, dtype)), load=_load, store=_store,
        where=lambda c, a, b: Block(np.where(raw(c), raw(a), np.asarray(raw(b), np.float32))),
        max=reduce(np.max), sum=reduce(np.sum),
        exp2=lambda x: Block(np.exp2(x.a)), log2=lambda x: Block(np.log2(x.a)), convert_layout=lambda x, layout: x,
        join=lambda a, b: Block(np.stack([a.a, b.a], -1)), inline_asm_elementwise=_asm, thread_barrier=nothing,
        program_id=lambda axis: Block(np.asarray(program[axis], np.int32)),
        SwizzledSharedLayout=nothing, NVMMADistributedLayout=lambda *a: types.SimpleNamespace(value=a),
        DotOperandLayout=nothing, SliceLayout=nothing, BlockedLayout=nothing, DistributedLinearLayout=lambda *a: a,
        allocate_shared_memory=lambda dtype, shape, layout: Shared(
            np.full(int(np.prod(shape)) * np.dtype(dtype).itemsize, 0xFF, np.uint8).view(dtype).reshape(shape)
        ),
    )  # fmt: skip
    return gl


def load(
    patch: pytest.MonkeyPatch,
    names: tuple[str, ...],
    gl: types.ModuleType,
    wait: Callable[..., Any],
    copy: Callable[..., None] | None = None,
    **others: dict[str, Any],
) -> types.ModuleType:
    """The last of fresh copies of kernels' modules, ``names`` in order of import, over ``gl``.

    wait: what a program does where its cluster meets; copy: to shared memory; others: name -> contents of modules of
    ``pallas_kernels`` that are not wanted. sys.modules ends as it was.
    """
    passed = lambda f: f  # noqa: E731
    clusters = {
        **{"own_memory": lambda size, sent: 0, "cluster_start": lambda blocks: None},
        **dict.fromkeys(("cluster_wait", "await_sent"), wait),
    }
    copies = types.SimpleNamespace(
        async_copy_global_to_shared=copy, commit_group=lambda: None, wait_group=lambda n: None
    )
    fakes: dict[str, dict[str, Any]] = {
        "triton": {}, "triton.experimental": {}, "jax_triton": {}, "pallas_kernels.jax_gluon": {"install": lambda: None},
        "triton.experimental.gluon": {"jit": passed, "constexpr_function": passed, "language": gl}, gl.__name__: gl.__dict__,
        f"{gl.__name__}.nvidia": {}, f"{gl.__name__}.nvidia.ampere": {"async_copy": copies, "mma_v2": mma},
        "pallas_kernels.gluon_clusters": clusters, **{f"pallas_kernels.{name}": content for name, content in others.items()},
    }  # fmt: skip
    for name, content in fakes.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        patch.setitem(sys.modules, name, module)
    patch.setattr("pallas_kernels.jax_gluon", sys.modules["pallas_kernels.jax_gluon"], raising=False)
    fresh = tuple(f"pallas_kernels.{name}" for name in ("gluon_layer", *names))
    for name in fresh:
        parent, _, child = name.rpartition(".")
        patch.setattr(importlib.import_module(parent), child, None, raising=False)
        patch.delitem(sys.modules, name, raising=False)
    loaded = importlib.import_module(fresh[-1])
    for name in fresh:
        del sys.modules[name]  # not by the patch, which would bring it back
    return loaded
