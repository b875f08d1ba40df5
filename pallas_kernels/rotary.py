"""Rotation of interleaved pairs; the angles come in as arrays, so that one table serves every layer of a step."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.products import rounded


def apply_rotary(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates pairs (2p, 2p+1) of the last axis by angle p, in place of the pair.

    x: [rows, width] or [rows, heads, width]; cos, sin: float32 [rows, width/2]. Computed in float32, returned in x's dtype.
    """
    if x.ndim == 3:
        cos, sin = cos[:, None, :], sin[:, None, :]
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    cos, sin = jnp.broadcast_to(cos, even.shape), jnp.broadcast_to(sin, even.shape)
    rotated = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1)
    return rounded(rotated.reshape(x.shape), x.dtype)
