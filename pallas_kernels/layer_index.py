"""The index of a layer as operations pass it on to their backends, and these to Triton."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def layer_index(layer: int | jax.Array) -> int | jax.Array:
    """An int as it is, which kernels can take as a number of the launch; anything else as an int32 scalar."""
    return layer if isinstance(layer, int) else jnp.asarray(layer, jnp.int32)


def layer_argument(layer: int | jax.Array) -> int | jax.Array:
    """What a Triton or Gluon kernel is given for a layer: a number of the launch, or int32 [1] to load; see ``layer_triton``."""
    # Odd and above 1, for which Triton does not compile once more: one kernel serves all layers.
    return layer * 32 + 17 if isinstance(layer, int) else layer.reshape(1)
