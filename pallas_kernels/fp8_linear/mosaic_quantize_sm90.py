"""x to e4m3 terms within the Hopper kernel of fp8_linear: registers only, no branch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import ptxas_version
from pallas_kernels.blocks import E4M3, E4M3_MAX

ptxas_version.install()

# [rows, 128] with a row in 16 lanes of 8 neighbouring elements: the maximum of a row stays in registers and shuffles.
GROUPS = plgpu.Layout.TILED(
    plgpu.Tiling(((8, 128), (2, 128), (8,))), warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1
)


def split(v: jax.Array, terms: int) -> tuple[list[jax.Array], jax.Array]:
    """v [rows, 128] as scale * sum of terms[t] / 16^t, e4m3; the scale [rows] of term 0."""
    amax = jnp.max(jnp.abs(v), axis=1)
    if terms == 1:
        # XLA turns the reference's division by 448 into this product too.
        scale = jnp.maximum(amax, 1e-10) * (1 / E4M3_MAX)
        inverse = _reciprocal(scale)
    else:
        # A power of two, so that the split is exact; amax / scale is in (224, 448].
        bits = lax.bitcast_convert_type(jnp.maximum(amax, 2.0**-100) * (1 / E4M3_MAX), jnp.int32)
        bits = (bits + 0x7FFFFF) & 0x7F800000
        scale = lax.bitcast_convert_type(bits, jnp.float32)
        inverse = lax.bitcast_convert_type(0x7F000000 - bits, jnp.float32)
    q = v * plgpu.layout_cast(lax.broadcast_in_dim(inverse, v.shape, (0,)), GROUPS)
    parts = []
    for t in range(terms):
        parts.append(q.astype(E4M3))
        if t + 1 < terms:
            q = (q - parts[-1].astype(jnp.float32)) * 16.0
    return parts, scale


def _reciprocal(s: jax.Array) -> jax.Array:
    """1 / s to an ulp or better, without the branch of a division."""
    root = lax.rsqrt(s)
    guess = root * root

    def upper(a: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(lax.bitcast_convert_type(a, jnp.int32) & -4096, jnp.float32)

    high, guess_high = upper(s), upper(guess)
    low, guess_low = s - high, guess - guess_high
    # 1 - s * guess, from exact products of halves.
    rest = ((1.0 - high * guess_high) - high * guess_low) - low * guess_high - low * guess_low
    return guess + guess * rest
