"""The Hopper kernel of sparse MLA, run in numpy: its PTX for the values, its query as two e4m3 terms, its running softmax."""

from __future__ import annotations

import importlib
import re
import types
from typing import Any

import ml_dtypes
import numpy as np
import pytest


def prmt(a: int, b: int, selector: int) -> int:
    """PTX prmt.b32: four selected bytes of b:a; with bit 3 of a selector nibble the byte's sign, eight times."""
    both, out = a | b << 32, 0
    for i in range(4):
        nibble = selector >> 4 * i & 0xF
        byte = both >> 8 * (nibble & 7) & 0xFF
        out |= ((0xFF if byte & 0x80 else 0) if nibble & 8 else byte) << 8 * i
    return out


def pair(word: int) -> np.ndarray:
    return np.array([word], np.uint32).view(ml_dtypes.bfloat16).astype(np.float64)


def fma(a: int, b: int, c: int) -> int:
    """fma.rn.bf16x2: exact in float64, because all operands have 8 bits and near exponents, then rounded once."""
    return int((pair(a) * pair(b) + pair(c)).astype(ml_dtypes.bfloat16).view(np.uint32)[0])


def execute(text: str, inputs: dict[str, int]) -> dict[str, int]:
    """Runs the five instructions that the kernel's text consists of."""
    registers = dict(inputs)
    for line in re.findall(r"^ (\w[\w.]*) (.*);$", text, re.MULTILINE):
        name, operands = line[0].split(".")[0], line[1].split(", ")
        target, given = operands[0], [registers[x] if x in registers else int(x, 0) for x in operands[1:]]
        if name == "mov":
            registers[target] = given[0]
        elif name == "prmt":
            registers[target] = prmt(*given)
        elif name == "shl":
            registers[target] = given[0] << given[1] & 0xFFFFFFFF
        elif name == "and":
            registers[target] = given[0] & given[1]
        else:
            assert name == "fma", line
            registers[target] = fma(*given)
    return registers


@pytest.mark.needs_triton
@pytest.mark.parametrize("scales", [(1.0, 1.0), (3.1e-3, 0.7), (1e5, 1e-12)])
def test_the_words_of_two_keys_become_pairs_of_scaled_bfloat16(scales: tuple[float, float]) -> None:
    """All codes but NaN; within one rounding to bfloat16 of value * scale * 2^-20."""
    text = importlib.import_module("pallas_kernels.sparse_mla.gluon_math")._VALUE_PAIRS.value
    scaled = np.array(scales, np.float32) * np.float32(2.0**100)
    high = scaled.astype(ml_dtypes.bfloat16)
    low = (scaled - high.astype(np.float32)).astype(ml_dtypes.bfloat16)
    constants = {"$6": int(high.view(np.uint32)[0]), "$7": int(low.view(np.uint32)[0])}
    codes = np.array([c for c in range(256) if c & 0x7F != 0x7F] + [0, 0], np.uint8)
    for a, b in zip(codes.reshape(-1, 4), codes[::-1].copy().reshape(-1, 4), strict=True):
        words = {"$4": int(a.view(np.uint32)[0]), "$5": int(b.view(np.uint32)[0])}
        got = execute(text, words | constants)
        for j in range(4):
            values = np.array([a[j], b[j]], np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
            want = values * np.array(scales) * 2.0**-20
            np.testing.assert_allclose(pair(got[f"${j}"]), want, rtol=1.01 * 2.0**-8, atol=1e-45)


def test_two_e4m3_terms_hold_a_bfloat16_query() -> None:
    """What ``gluon_load`` does to a head: its largest in [128, 256); exact down to 2^-9 of that, 2^-18 of it below."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(4096) * 2.0 ** rng.integers(-20, 1, 4096)).astype(ml_dtypes.bfloat16).astype(np.float32)
    x *= 2.0 ** (7 - np.floor(np.log2(np.abs(x).max())))
    one = x.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    two = (x - one).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    error, largest = np.abs(x - one - two), np.abs(x).max()
    assert 128 <= largest < 256 and not error[np.abs(x) >= largest / 512].any()
    assert error.max() <= largest * 2.0**-17


class Block(np.ndarray):
    """A block of a kernel in numpy: whole, so that layouts and barriers mean nothing."""

    type = types.SimpleNamespace(layout=None)

    def to(self, dtype: type) -> Any:
        return self.astype(dtype)

    def permute(self, axes: tuple[int, ...]) -> Any:
        return self.transpose(axes)


def block(x: Any) -> Any:
    return np.asarray(x).view(Block)


class Memory:
    """Shared memory, whole or one of its buffers; keeps what was stored in it, in order."""

    def __init__(self, value: object = None) -> None:
        self.stored = [] if value is None else [block(value)]
        self.buffers: dict[int, Memory] = {}

    def store(self, value: np.ndarray) -> None:
        self.stored.append(block(value))

    def load(self, layout: object) -> Any:
        return self.stored[-1]

    def index(self, i: int) -> Memory:
        return self.buffers.setdefault(i, Memory())

    def _reinterpret(self, *_: object) -> Memory:
        return self


def nothing(*_: object, **__: object) -> None:
    """A barrier, a fence, a layout."""


LANGUAGE = types.SimpleNamespace(
    constexpr=int, float32=np.float32, float8e4nv=None, bfloat16=np.float32, int32=np.int32,
    SliceLayout=nothing, thread_barrier=nothing, load=lambda x: 0, convert_layout=lambda x, layout: x,
    full=lambda shape, value, dtype, layout: block(np.full(shape, value, dtype)),
    arange=lambda start, end, layout: block(np.arange(start, end)), where=lambda c, a, b: block(np.where(c, a, b)),
    max=lambda x, axis: block(x.max(axis)), sum=lambda x, axis: block(x.sum(axis)),
    maximum=lambda a, b: block(np.maximum(a, b)), exp2=lambda x: block(np.exp2(x)), log2=lambda x: block(np.log2(x)),
    store=lambda at, value, mask: at.stored.append(value),
)  # fmt: skip
HOPPER = types.SimpleNamespace(mbarrier=types.SimpleNamespace(wait=nothing, arrive=nothing), fence_async_shared=nothing)


@pytest.mark.needs_triton
@pytest.mark.parametrize(
    ("rise", "rescalings"), [((0, 0, 0), 0), ((70, -70, 200), 2), ((40, 40, 40), 1), ((-400, 900, 5), 2)]
)
def test_softmax_weights_of_rising_scores(rise: tuple[int, ...], rescalings: int) -> None:
    """``gluon_math.score``: its references, rescalings and sums, for heads that rise from tile to tile and heads that do not.

    The first tile has nothing selected in it, the others have holes. A weight counts as in the kernel: times all later alphas and
    the final factor.
    """
    module, heads, tiles = importlib.import_module("pallas_kernels.sparse_mla.gluon_math"), 16, 2 + len(rise)
    rng = np.random.default_rng(0)
    scores = rng.standard_normal((tiles, 64, heads)).astype(np.float32) * 3
    scores += np.cumsum([0, 0, *rise])[:, None, None] * (np.arange(heads) % 3 - 1)
    slots = np.where(rng.random((tiles, 64)) < 0.3, -1, 7)
    slots[0] = -1
    queue = iter(scores)
    fakes = {"gl": LANGUAGE, "hopper": HOPPER, "_mma": nothing, "_scores": lambda *_: block(next(queue))}
    fakes["layer_of"] = lambda layer: layer
    for name in ("_partial_sum", "_warps_above"):
        fakes[name] = types.FunctionType(getattr(module, name).fn.__code__, fakes)
    for name in ("FLAT", "BYTES", "HALVES", "_TOTALS", "_FLAGS"):
        fakes[name] = None
    score = types.FunctionType(module.score.fn.__code__, fakes | {"__builtins__": __builtins__, "range": range})
    names = score.__code__.co_varnames[: score.__code__.co_argcount]
    memory = {name: Memory() for name in names}
    constants = dict(HEADS=heads, N=heads, CAPACITY=64, OUT_FACTOR=1.0, LSE_FACTOR=1.0, TILES=tiles, STAGES=tiles)
    lse = Memory()
    lse_at = type("At", (), {"__add__": lambda self, head: lse})()
    memory["factors"].store(np.ones(heads, np.float32))
    for i in range(tiles):
        memory["picks"].index(i).store(slots[i])
    score(**(memory | constants | {"at": 0, "end": 64 * tiles - 1, "layer": 0, "first_head": 0, "lse": lse_at}))
    valid = (slots >= 0)[..., None] & (np.arange(64 * tiles).reshape(tiles, 64) < 64 * tiles - 1)[..., None]
    exact = np.where(valid, scores, -np.inf).astype(np.float64).reshape(-1, heads)
    want = np.exp2(exact - exact.max(0))
    total = want.sum(0)
    got = np.zeros((tiles, 64, heads))
    for i in range(tiles):
        buffer, turn = i & 1, i >> 1
        got *= memory["alphas"].buffers[buffer].stored[turn]
        got[i] = memory["weights"].buffers[buffer].stored[turn]
    got *= memory["final"].stored[-1]
    np.testing.assert_allclose(got.reshape(-1, heads), want / total, rtol=1e-4, atol=1e-30)
    np.testing.assert_allclose(lse.stored[-1], np.log2(total) + exact.max(0), rtol=2e-6)
    assert len(memory["bases"].stored) == 2 + rescalings  # zeros, and the first tile that has something selected
