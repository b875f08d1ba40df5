"""Residual add and RMSNorm in a launch of their own, for projections that have none in theirs."""

from __future__ import annotations

import jax

from pallas_kernels import norm_quant
from pallas_kernels.parts import Parts


def flat_layer(stack: tuple[int, ...], index: tuple[int | jax.Array, ...]) -> int | jax.Array:
    """The position in the flattened stack."""
    layer: int | jax.Array = 0
    for size, i in zip(stack, index, strict=True):
        layer = layer * size + i
    return layer


def add_norm(
    x: jax.Array, delta: jax.Array | Parts | None, norm: jax.Array, index: tuple[int | jax.Array, ...], eps: float
) -> tuple[jax.Array, jax.Array]:
    """(x + delta, its RMSNorm by norm[index]) of ``norm_linears``; (x, its norm) without delta."""
    layer, rows = flat_layer(norm.shape[:-1], index), (-1, x.shape[-1])
    added = delta.reshape(rows) if isinstance(delta, jax.Array) else delta
    total, normed = norm_quant.add_norm(x.reshape(rows), added, norm.reshape(rows), layer, eps)
    return total.reshape(x.shape), normed.reshape(x.shape)


def add_norm_split(
    x: jax.Array,
    delta: jax.Array,
    norm: jax.Array,
    index: tuple[int | jax.Array, ...],
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """``add_norm`` and the e4m3 terms of the norm, with their scales, as ``norm_quant.add_norm_split`` lays them out."""
    layer, rows = flat_layer(norm.shape[:-1], index), (-1, x.shape[-1])
    given = (x.reshape(rows), delta.reshape(rows), norm.reshape(rows))
    total, normed, values, scales = norm_quant.add_norm_split(*given, layer, eps)
    return total.reshape(x.shape), normed.reshape(x.shape), values, scales
