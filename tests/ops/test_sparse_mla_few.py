"""The kernel of sparse MLA for up to eight heads, run in numpy: its PTX, its reordered operands, its softmax; not its layouts."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.sparse_mla import reference
from pallas_kernels.sparse_mla.spec import CASES, Spec, inputs

_BF16 = np.dtype(ml_dtypes.bfloat16)
raw = lambda x: x.a if isinstance(x, Block) else x  # noqa: E731


@dataclasses.dataclass
class Block:
    """A tensor; layout is kept where it was loaded with one, for the order of its registers."""

    a: np.ndarray
    layout: Any = None

    def __getattr__(self, name: str) -> Any:
        return {"dtype": self.a.dtype}[name]

    def to(self, dtype: Any) -> Block:
        return Block(self.a.astype(dtype))

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


for _name in ("add", "sub", "mul", "and", "lt", "gt", "ge", "eq", "radd", "rmul", "rsub", "rtruediv"):
    setattr(Block, f"__{_name}__", _operator(f"__{_name}__"))


class Pointer:
    """Offsets into a flat array; a load outside of it fails."""

    def __init__(self, buffer: np.ndarray, offset: Any = 0) -> None:
        self.buffer, self.offset = buffer, np.asarray(offset, np.int64)
        self.dtype = types.SimpleNamespace(element_ty=buffer.dtype)

    def __add__(self, other: Any) -> Pointer:
        return Pointer(self.buffer, self.offset + raw(other))

    __radd__ = __add__

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.buffer, self.offset[index])

    def to(self, dtype: Any) -> Pointer:
        return Pointer(self.buffer.view(dtype))


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


def _copy(target: Shared, pointer: Pointer, mask: Any) -> None:
    target.a[...] = _load(pointer, mask).a


def _prmt(a: Any, b: Any, selector: int) -> np.ndarray:
    both, out = a.astype(np.uint64) | np.asarray(b).astype(np.uint64) << np.uint64(32), np.zeros(a.shape, np.uint32)
    for i in range(4):
        nibble = selector >> 4 * i & 0xF
        byte = (both >> np.uint64(8 * (nibble & 7)) & np.uint64(0xFF)).astype(np.uint32)
        out |= (np.where(byte & 0x80, 0xFF, 0).astype(np.uint32) if nibble & 8 else byte) << np.uint32(8 * i)
    return out


def _fma(a: Any, b: Any, c: Any) -> np.ndarray:
    a, b, c = (np.ascontiguousarray(np.broadcast_to(x, a.shape)).view(_BF16).astype(np.float64) for x in (a, b, c))
    return (a * b + c).astype(_BF16).view(np.uint32)


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
        results.append(Block(out.view(_BF16)))
    return results[0] if outputs == 1 else results


def _mma(a: Block, b: Block, acc: Block) -> Block:
    """A product whose tiny operands keep their bits."""
    product = a.a.astype(np.float64) @ b.a.astype(np.float64)
    return Block((product + acc.a).astype(np.float32))


def _language(program: list[int]) -> types.ModuleType:
    gl = types.ModuleType("triton.experimental.gluon.language")
    nothing = lambda *a, **k: None  # noqa: E731
    reduce = lambda f: lambda x, axis: Block(f(x.a, axis=axis))  # noqa: E731
    gl.__dict__.update(
        constexpr=lambda x: x, int16=np.int16, int32=np.int32, int64=np.int64, float32=np.float32, bfloat16=_BF16,
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


def kernel(program: list[int], monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A copy of the kernel's module over numpy."""
    gl, passed = _language(program), lambda f: f
    copies = types.SimpleNamespace(
        async_copy_global_to_shared=_copy, commit_group=lambda: None, wait_group=lambda n: None
    )
    fakes: dict[str, dict[str, Any]] = {
        "triton": {}, "triton.experimental": {}, "jax_triton": {}, "pallas_kernels.jax_gluon": {"install": lambda: None},
        "triton.experimental.gluon": {"jit": passed, "constexpr_function": passed, "language": gl}, gl.__name__: gl.__dict__,
        f"{gl.__name__}.nvidia": {}, f"{gl.__name__}.nvidia.ampere": {"async_copy": copies, "mma_v2": _mma},
        "pallas_kernels.sparse_mla.triton": dict.fromkeys(("LATENT_FACTOR", "LOG2E", "merge", "outputs")),
    }  # fmt: skip
    for name, content in fakes.items():
        module = types.ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("pallas_kernels.jax_gluon", sys.modules["pallas_kernels.jax_gluon"], raising=False)
    names = ("pallas_kernels.sparse_mla.gluon_few_layouts", "pallas_kernels.sparse_mla.gluon_few")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module(names[1])
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    return module


def attend(spec: Spec, args: tuple[jax.Array, ...], keys: int, patch: pytest.MonkeyPatch) -> Any:
    """Runs every program; merges the splits in float64. Returns (context, lse)."""
    q, cache, layer, slots = (np.array(x) for x in args)
    splits = -(-spec.k // keys)
    context = np.full((spec.rows, splits, spec.heads, 512), np.nan, np.float32)
    lse = np.full((spec.rows, splits, spec.heads), np.nan, np.float32)
    # One split writes natural logs: two at least, so that what is compared has one unit.
    assert splits > 1
    program = [0, 0]
    run = kernel(program, patch).few_kernel
    memory = [Pointer(x.reshape(-1)) for x in (q, cache, layer.reshape(1), slots, context, lse)]
    for row in range(spec.rows):
        for split in range(splits):
            program[:] = [split, row]
            run(
                *memory, HEADS=spec.heads, K=spec.k, CAPACITY=spec.capacity, SCALE_LOG2=spec.scale * 1.4426950408889634 * 2.0**20,
                OUT_FACTOR=2.0**20, SPLITS=splits, N=keys,
            )  # fmt: skip
    weight = np.exp2(lse.astype(np.float64))[..., None]
    total = weight.sum(1)
    merged = (context * weight).sum(1) / np.where(total > 0, total, 1)
    return merged, np.log(total)[..., 0]


@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize(("keys", "heads"), [(32, 8), (64, 8), (64, 5), (32, 1), (128, 8)])
def test_every_tile_and_its_merge(keys: int, heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A last tile that is not full, slots out of the cache, a row with nothing selected, scales from 1e-9 to 1e5."""
    spec = dataclasses.replace(CASES["h8_k2048_fp8"], rows=3, heads=heads, k=200, layers=2, pages=12)
    q, cache, _, slots = inputs(spec, jax.random.key(keys + heads))
    slots = slots.at[1, 7:90].set(jnp.asarray([-1, spec.capacity, 2**31 - 1] * 28)[:83]).at[2].set(-1)
    scaled = np.array(cache)
    rows = scaled.reshape(-1, 656)
    rows[:, 512:528] = (rows[:, 512:528].view(np.float32) * np.array([1e-9, 1.0, 0.3, 1e5], np.float32)).view(np.uint8)
    q = q.at[..., 384:512].multiply(1e-5)
    args = (q, jnp.asarray(scaled), jnp.asarray(1, jnp.int32), slots)
    with np.errstate(all="ignore"):
        context, lse = attend(spec, args, keys, monkeypatch)
    want, want_lse = reference.attend(q.astype(jnp.float32), *args[1:3], slots, 512, spec.scale)
    for group in range(4):
        part = slice(group * 128, group * 128 + 128)
        error = np.linalg.norm(context[..., part] - want[..., part]) / np.linalg.norm(want[..., part])
        assert error < 4e-3, (group, error)
    np.testing.assert_allclose(lse[:2], np.asarray(want_lse)[:2], atol=1e-3)
    assert np.isneginf(lse[2]).all() and not context[2].any()
