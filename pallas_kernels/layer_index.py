"""The index of a layer as operations pass it on to their backends."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def layer_index(layer: int | jax.Array) -> int | jax.Array:
    """An int as it is, which kernels can take as a number of the launch; anything else as an int32 scalar."""
    return layer if isinstance(layer, int) else jnp.asarray(layer, jnp.int32)
