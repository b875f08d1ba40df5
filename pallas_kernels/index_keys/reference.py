"""Reference of index_keys in jnp; runs anywhere."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import paged, rotary
from pallas_kernels.blocks import Weight
from pallas_kernels.fp8_linear import reference as fp8_linear
from pallas_kernels.index_keys.spec import QUERY, WRITE, Spec
from pallas_kernels.norm_quant import reference as norm_quant

LAYER_NORM_EPS = 1e-6


def run(
    spec: Spec,
    cache: Any,
    latent: Any,
    x: jax.Array,
    wk: Any,
    norm: Any,
    bias: Any,
    wq_b: Any,
    proj: Any,
    layer: jax.Array,
    slots: Any,
    cos: jax.Array,
    sin: jax.Array,
) -> Any:
    """Outputs of the spec's form: the cache, (q, w), or (cache, q, w)."""
    rotation = (cos, sin)
    if spec.form != QUERY:
        cache = write(x, wk, norm, bias, cache, layer, slots, *rotation)
    if spec.form == WRITE:
        return cache
    found = query(latent, x, wq_b, proj, layer, *rotation, spec.quantized, spec.arithmetic)
    return found if spec.form == QUERY else (cache, *found)


def write(
    x: jax.Array,
    wk: Weight,
    norm_weight: jax.Array,
    norm_bias: jax.Array,
    cache: jax.Array,
    layer: int | jax.Array,
    slots: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
) -> jax.Array:
    keys = fp8_linear.linear(x, wk, (layer,), "w8a16", jnp.float32)
    keys = norm_quant.layer_norm(keys, norm_weight[layer], norm_bias[layer], LAYER_NORM_EPS)
    return paged.write_index_keys(cache, layer, slots, _rotate_front(keys, cos, sin))


def query(
    latent: jax.Array,
    x: jax.Array,
    wq_b: Weight,
    weights_proj: jax.Array,
    layer: int | jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    quantized: bool,
    arithmetic: str,
) -> tuple[jax.Array, jax.Array]:
    heads = weights_proj.shape[-2]
    q = fp8_linear.linear(latent, wq_b, (layer,), arithmetic, jnp.float32).reshape(latent.shape[0], heads, -1)
    q = _rotate_front(q, cos, sin)
    weights = fp8_linear.linear(x, weights_proj, (layer,), "w8a16", jnp.float32)
    weights = weights * (heads**-0.5 * q.shape[-1] ** -0.5)
    if not quantized:
        return q, weights
    # The barrier keeps XLA for GPUs from simplifying f32 -> e4m3 -> f32 away where the scores are computed in the same program.
    values, scale = jax.lax.optimization_barrier(norm_quant.quantize_groups(q, group=q.shape[-1]))
    return values, weights * scale[..., 0]


def _rotate_front(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """The indexer keeps its rotary dims first, unlike MLA's query, which keeps them last."""
    rope = 2 * cos.shape[-1]
    return jnp.concatenate([rotary.apply_rotary(x[..., :rope], cos, sin), x[..., rope:]], axis=-1)
