"""Reference of the collectives: XLA's own, which run on every platform and across hosts."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.collectives.message import ADD_NORM, ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER, Message
from pallas_kernels.norm_quant import reference as norm_quant
from pallas_kernels.products import rounded


def run(
    spec: Message,
    axis: str,
    x: jax.Array,
    residual: jax.Array | None = None,
    weight: jax.Array | None = None,
    layer: jax.Array | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """The spec's form; residual, weight and layer belong to ``all_reduce_add_norm``."""
    if spec.form == ALL_REDUCE:
        return jax.lax.psum(x.astype(jnp.float32), axis).astype(x.dtype)
    if spec.form == ADD_NORM:
        assert residual is not None and weight is not None
        total = jax.lax.psum(x.astype(jnp.float32), axis) + residual.astype(jnp.float32)
        return norm_quant.add_norm(rounded(total, x.dtype), None, weight[layer], spec.eps)
    if spec.form == ALL_GATHER:
        return jax.lax.all_gather(x, axis, axis=spec.dim, tiled=True)
    if spec.form == REDUCE_SCATTER:
        summed = jax.lax.psum_scatter(x.astype(jnp.float32), axis, scatter_dimension=spec.dim, tiled=True)
        return summed.astype(x.dtype)
    return jax.lax.all_to_all(x, axis, split_axis=spec.dim, concat_axis=spec.into, tiled=True)
