"""Reference of latent_write in jnp; runs anywhere."""

from __future__ import annotations

import jax

from pallas_kernels import paged, rotary
from pallas_kernels.norm_quant import reference as norm_quant


def write(
    kv_a: jax.Array,
    norm: jax.Array,
    cache: jax.Array,
    layer: int | jax.Array,
    slots: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    eps: float,
) -> jax.Array:
    kv_lora_rank = norm.shape[-1]
    c = norm_quant.rms_norm(kv_a[:, :kv_lora_rank], norm[layer], eps)
    kr = rotary.apply_rotary(kv_a[:, kv_lora_rank:], cos, sin)
    return paged.write_rows(cache, layer, slots, paged.pack_latent(c, kr, cache.dtype))
