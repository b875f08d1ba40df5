"""Reference of mla_out in jnp; runs anywhere."""

from __future__ import annotations

import jax

from pallas_kernels.blocks import Weight
from pallas_kernels.fp8_linear import reference as fp8_linear
from pallas_kernels.products import einsum, rounded


def output(context: jax.Array, w_uv: jax.Array, o_proj: Weight, layer: int | jax.Array, arithmetic: str) -> jax.Array:
    values = up_project(context, w_uv[layer])
    return fp8_linear.linear(values.reshape(values.shape[0], -1), o_proj, (layer,), arithmetic, context.dtype)


def up_project(context: jax.Array, w_uv: jax.Array) -> jax.Array:
    """context [rows, heads, latent] @ W_UV [heads, v, latent].T, rounded to context's dtype."""
    return rounded(einsum("rhc,hvc->rhv", context, w_uv), context.dtype)
