"""Reference of mla_front in jnp; runs anywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import rotary
from pallas_kernels.blocks import Weight
from pallas_kernels.fp8_linear import reference as fp8_linear
from pallas_kernels.latent_write import reference as latent_write
from pallas_kernels.mla_front.spec import Spec
from pallas_kernels.norm_quant import reference as norm_quant
from pallas_kernels.products import einsum, rounded


def query(
    q_a: jax.Array,
    norm: jax.Array,
    q_b: Weight,
    w_uk: jax.Array,
    layer: int | jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    eps: float,
    arithmetic: str,
) -> tuple[jax.Array, jax.Array]:
    heads, nope, _ = w_uk.shape[1:]
    latent = norm_quant.rms_norm(q_a, norm[layer], eps)
    q = fp8_linear.linear(latent, q_b, (layer,), arithmetic, q_a.dtype).reshape(q_a.shape[0], heads, -1)
    q_rope = rotary.apply_rotary(q[..., nope:], cos, sin)
    return latent, jnp.concatenate([absorb(q[..., :nope], w_uk[layer]), q_rope], axis=-1)


def run(
    spec: Spec,
    q_a: jax.Array,
    norm: jax.Array,
    q_b: Weight,
    w_uk: jax.Array,
    layer: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    cache: jax.Array | None = None,
    key: tuple[jax.Array, ...] = (),
) -> tuple[jax.Array, ...]:
    """The query and, with a key, the cache it is written to."""
    results = query(q_a, norm, q_b, w_uk, layer, cos, sin, spec.eps, spec.arithmetic)
    if not key or cache is None:
        return results
    kv_a, kv_norm, slots = key
    return *results, latent_write.write(kv_a, kv_norm, cache, layer, slots, cos, sin, spec.eps)


def absorb(q_nope: jax.Array, w_uk: jax.Array) -> jax.Array:
    """q_nope [rows, heads, nope] @ W_UK [heads, nope, latent], rounded to q_nope's dtype."""
    return rounded(einsum("rhd,hdc->rhc", q_nope, w_uk), q_nope.dtype)
