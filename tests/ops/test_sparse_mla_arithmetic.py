"""Bit tricks of the Hopper kernel of sparse MLA, run in numpy: its PTX for the values, its query as two e4m3 terms."""

from __future__ import annotations

import importlib
import re

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
