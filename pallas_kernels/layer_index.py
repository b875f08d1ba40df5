"""The index of a layer as operations pass it on to their backends, and these to Triton."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

_ALIGNED = 64  # float32 of 256 bytes


@jax.tree_util.register_static
class KnownLayer(int):
    """A layer as an argument of a jitted function, which is traced for it: to such a function an int is an array."""


def layer_index(layer: int | jax.Array) -> int | jax.Array:
    """An int as it is, which kernels can take as a number of the launch; anything else as an int32 scalar."""
    return layer if isinstance(layer, int) else jnp.asarray(layer, jnp.int32)


def cut_index(layer: int | jax.Array, stack: Any) -> int | jax.Array:
    """``layer_index`` for kernels that may be given a part of ``stack``, an array or a pytree of some.

    An int stays one only where the stack is traced: what is cut out of an array that is there, by a call outside of jit, is a copy.
    """
    if isinstance(jax.tree.leaves(stack)[0], jax.core.Tracer):
        return layer_index(layer)
    return jnp.asarray(int(layer) if isinstance(layer, int) else layer, jnp.int32)


def layer_argument(layer: int | jax.Array) -> int | jax.Array:
    """What Triton or Gluon kernels are given for a layer: a number of the launch, or int32 [1] to load; see ``layer_triton``."""
    # Odd and above 1, for which Triton does not compile once more: one kernel serves all layers.
    return layer * 32 + 17 if isinstance(layer, int) else layer.reshape(1)


def layer_slice(stack: jax.Array, layer: int, size: int = 1) -> jax.Array:
    """A layer of a stack, [size, ...], in front of a kernel: XLA gives the kernel a pointer into the stack and copies nothing.

    Only for a layer known when it is traced, where nothing but a change of shape stands between this and the kernel, and where
    a layer is a multiple of 256 bytes: XLA copies slices of other sizes, and Mosaic refuses operands that start elsewhere (JAX
    0.11.2). size: neighbouring entries of the stack that a layer has.
    """
    return jax.lax.slice_in_dim(stack, layer * size, (layer + 1) * size)


def scale_slice(flat: jax.Array, size: int, layer: int, least: int = 0) -> tuple[jax.Array, int]:
    """``layer_slice`` of a flat stack of float32 whose layers have ``size`` each: a part of it and where in that the layer starts.

    The part has ``least`` elements or more; where it starts is that of the layer rounded down to 256 bytes, so few places, and
    few kernels, serve all layers. All of the stack where it has no such part: few scales, or the end of a stack.
    """
    start = layer * size // _ALIGNED * _ALIGNED
    before = _ALIGNED - math.gcd(size, _ALIGNED)  # the most over all layers
    count = -(-max(size + before, least) // _ALIGNED) * _ALIGNED
    if start + count > flat.size:
        return flat, layer * size
    return jax.lax.slice_in_dim(flat, start, start + count), layer * size - start
