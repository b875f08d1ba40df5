"""Reference of mla_out in jnp; runs anywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import Weight
from pallas_kernels.fp8_linear import reference as fp8_linear
from pallas_kernels.products import einsum, rounded


def output(
    context: jax.Array,
    w_uv: jax.Array,
    o_proj: Weight,
    layer: int | jax.Array,
    lse: jax.Array | None = None,
    *,
    arithmetic: str,
) -> jax.Array:
    if lse is not None:
        context = merged(context, lse, w_uv.dtype)
    values = up_project(context, w_uv[layer])
    return fp8_linear.linear(values.reshape(values.shape[0], -1), o_proj, (layer,), arithmetic, context.dtype)


def merged(parts: jax.Array, lse: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """parts float32 [rows, parts, heads, latent], lse [rows, parts, heads] -> their context, rounded to dtype."""
    peak = jnp.max(lse, axis=1, keepdims=True)
    weights = jnp.exp(lse - jnp.where(jnp.isfinite(peak), peak, 0.0))
    total = jnp.sum(weights, axis=1)[..., None]
    return rounded(jnp.sum(parts * weights[..., None], axis=1) / jnp.where(total > 0, total, 1.0), dtype)


def up_project(context: jax.Array, w_uv: jax.Array) -> jax.Array:
    """context [rows, heads, latent] @ W_UV [heads, v, latent].T, rounded to context's dtype."""
    return rounded(einsum("rhc,hvc->rhv", context, w_uv), context.dtype)
