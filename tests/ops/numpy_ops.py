"""The specification's formulas in numpy and float64, written without looking at the jnp references, and comparisons."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike

from pallas_kernels.blocks import BlockScaled
from pallas_kernels.compare import compare

BF16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn
F32_TOLERANCE = 1e-6


def wide(x: ArrayLike) -> np.ndarray:
    """Any array in float64."""
    return np.asarray(x).astype(np.float64)


def normal(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    """Normal float32 numbers."""
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def to_bf16(x: ArrayLike) -> np.ndarray:
    """float64 values after one rounding to bfloat16."""
    return wide(np.asarray(x, np.float32).astype(BF16))


def to_jnp(x: np.ndarray, dtype: Any = jnp.float32) -> jax.Array:
    return jnp.asarray(x).astype(dtype)


def rms(x: ArrayLike, weight: ArrayLike, eps: float) -> np.ndarray:
    x = wide(x)
    return wide(weight) * (x / np.sqrt((x**2).mean(-1, keepdims=True) + eps))


def layer_norm(x: ArrayLike, weight: ArrayLike, bias: ArrayLike, eps: float) -> np.ndarray:
    x = wide(x)
    return wide(weight) * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) + wide(bias)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def rotate(x: ArrayLike, angle: ArrayLike) -> np.ndarray:
    """Pairs (2p, 2p+1) of the last axis of [rows, width] or [rows, heads, width] turned by angle [rows, width / 2]."""
    x, angle = wide(x), wide(angle)
    angle = angle[:, None, :] if x.ndim == 3 else angle
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def rotate_front(x: ArrayLike, angle: np.ndarray) -> np.ndarray:
    """The indexer's layout: the first 2 * angles dims turn, the others stay."""
    x, width = wide(x), 2 * angle.shape[-1]
    return np.concatenate([rotate(x[..., :width], angle), x[..., width:]], -1)


def quantize(x: ArrayLike, group: int, floor: float) -> tuple[np.ndarray, np.ndarray]:
    """e4m3 values and float32 scales of the last axis by groups; the last group may be short."""
    x = np.asarray(x, np.float32)
    values, scales = np.zeros(x.shape, E4M3), []
    for start in range(0, x.shape[-1], group):
        part = x[..., start : start + group]
        scale = np.maximum(np.abs(part).max(-1), np.float32(floor)) / np.float32(448)
        values[..., start : start + group] = np.clip(part / scale[..., None], -448, 448).astype(E4M3)
        scales.append(scale)
    return values, np.stack(scales, -1)


def regroup(values: ArrayLike, scale: ArrayLike, group: int) -> np.ndarray:
    """Inverse of ``quantize`` up to rounding, float64."""
    values = wide(values)
    return values * wide(scale)[..., np.arange(values.shape[-1]) // group]


def dequantize(w: BlockScaled | jax.Array) -> np.ndarray:
    """A weight in float64; the scale of element (r, c) is that of block (r // 128, c // 128)."""
    if not isinstance(w, BlockScaled):
        return wide(w)
    n, k = w.shape[-2:]
    scale = wide(w.scale)[..., np.arange(n)[:, None] // 128, np.arange(k)[None, :] // 128]
    return wide(w.data) * scale


def random_blocks(seed: int, *shape: int) -> BlockScaled:
    """FP8 blocks with every finite e4m3 value and scales over four decades, made in numpy."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 0x7F, size=shape, dtype=np.uint8) | (rng.integers(0, 2, size=shape, dtype=np.uint8) << 7)
    grid = (*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128))
    scale = (10 ** rng.uniform(-5, -1, size=grid)).astype(np.float32)
    return BlockScaled(jnp.asarray(codes.view(E4M3)), jnp.asarray(scale))


def assert_close(got: ArrayLike, want: ArrayLike, tolerance: float = F32_TOLERANCE) -> None:
    """Relative 2-norm, and no element off by more than the tolerance of the largest one."""
    found = compare(got, want)
    assert found.rel_l2 <= tolerance, str(found)
    largest = np.abs(wide(want))[np.isfinite(wide(want))].max(initial=0)
    assert found.max_abs <= 10 * tolerance * largest, str(found)


def assert_bf16(got: ArrayLike, want: ArrayLike, share: float = 0.01) -> None:
    """``got`` is ``want`` rounded once: all but a small share, near the middle between two bfloat16, agree bit for bit."""
    assert np.asarray(got).dtype == BF16
    assert_close(got, want, 2**-8)
    differing = (wide(got) != to_bf16(want)).mean()
    assert differing <= share, f"{differing:.2%} of the elements differ from one rounding"
