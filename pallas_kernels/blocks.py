"""FP8 weights with one float32 scale a 128x128 block, as a pytree."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

BLOCK = 128
E4M3 = jnp.float8_e4m3fn
E4M3_MAX = 448.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockScaled:
    """A matrix, or a stack of matrices, W = data * scale by blocks.

    data: float8_e4m3fn [..., n, k], row-major.
    scale: float32 [..., ceil(n/128), ceil(k/128)], multiplied (the checkpoint's ``weight_scale_inv``). The last block of rows or
      columns may be partial. Scales are arbitrary positive numbers, not powers of two.
    """

    data: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim


# What a linear operation accepts: float32, bfloat16 or FP8 blocks.
type Weight = jax.Array | BlockScaled


def take(w: Weight, index: tuple[int | jax.Array, ...]) -> Weight:
    """The matrix of a stack at ``index`` (static or traced scalars); reads nothing else of the stack."""
    return jax.tree.map(lambda a: a[index], w) if index else w


def dequantize(w: Weight, dtype: jnp.dtype | type = jnp.float32) -> jax.Array:
    """W [..., n, k] in ``dtype``: f32(data) * scale[row // 128, column // 128], rounded once."""
    if not isinstance(w, BlockScaled):
        return w.astype(dtype)
    n, k = w.shape[-2:]
    scale = jnp.repeat(jnp.repeat(w.scale, BLOCK, axis=-2)[..., :n, :], BLOCK, axis=-1)[..., :k]
    return (w.data.astype(jnp.float32) * scale).astype(dtype)


def quantize_blocks(w: jax.Array, floor: float = 1e-10) -> BlockScaled:
    """FP8 blocks of a float matrix [..., n, k]; scale = max(amax, floor) / 448 per block."""
    n, k = w.shape[-2:]
    pad = [(0, 0)] * (w.ndim - 2) + [(0, -n % BLOCK), (0, -k % BLOCK)]
    padded = jnp.pad(w.astype(jnp.float32), pad)
    blocks = padded.reshape(*w.shape[:-2], padded.shape[-2] // BLOCK, BLOCK, padded.shape[-1] // BLOCK, BLOCK)
    scale = jnp.maximum(jnp.max(jnp.abs(blocks), axis=(-3, -1)), floor) / E4M3_MAX
    data = to_e4m3(blocks / scale[..., :, None, :, None]).reshape(padded.shape)[..., :n, :k]
    return BlockScaled(data, scale)


def random_blocks(key: jax.Array, layers: int, n: int, k: int) -> BlockScaled:
    """A stack [layers, n, k] of random weights: normal, a standard deviation near k^-1/2, scales that differ by block.

    For checks and benchmarks. One matrix is made at a time: float32 numbers of a whole stack would fill a GPU.
    """
    data = jax.lax.map(
        lambda one: to_e4m3(100 * jax.random.normal(one, (n, k), jnp.float32)), jax.random.split(key, layers)
    )
    grid = (layers, -(-n // BLOCK), -(-k // BLOCK))
    return BlockScaled(data, 0.01 * k**-0.5 * jax.random.uniform(key, grid, jnp.float32, 0.3, 1.7))


def to_e4m3(x: jax.Array) -> jax.Array:
    """Clamped cast: jnp's own cast turns values above 464 into NaN where the GPU's saturates."""
    return jnp.clip(x, -E4M3_MAX, E4M3_MAX).astype(E4M3)
