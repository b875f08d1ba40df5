"""Angles of the rotary embedding, one table a step for all layers, queries, keys and index keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def rope_tables(positions: jax.Array, theta: float, width: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin of f32(position) * theta^(-2p / width), p = 0..width/2-1.

    Args:
      positions: int32 [...], 0 up to 1,048,575.
      theta: base.
      width: rotary dims, even.

    Returns:
      float32 cos, sin [..., width / 2].

    The product is taken in float32 like everywhere else (spec trap 12): at a million tokens it is only good to 0.06 rad, and an
    exact table would disagree with the weights' training.
    """
    # The official code's float32 values bit for bit: near position 2^20 one ulp of inv_freq already moves cos by 0.008.
    power = np.float64(theta) ** (np.arange(0, width, 2) / width)
    inv_freq = np.float32(1.0) / power.astype(np.float32)
    angle = positions[..., None].astype(jnp.float32) * jnp.asarray(inv_freq).reshape((1,) * positions.ndim + (-1,))
    return jnp.cos(angle), jnp.sin(angle)
