"""Reference of sparse_mla in jnp; runs anywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import paged
from pallas_kernels.products import einsum, rounded

# Gathered latents kept at once, in elements: bounds the reference's memory for long prefills.
_BLOCK_ELEMENTS = 1 << 25


def attend(
    q: jax.Array,
    cache: jax.Array,
    layer: int | jax.Array,
    slots: jax.Array,
    kv_lora_rank: int,
    scale: float,
) -> tuple[jax.Array, jax.Array]:
    rope = q.shape[-1] - kv_lora_rank
    capacity = cache.shape[1] * paged.PAGE

    def one_row(row: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        query, at = row
        valid = (at >= 0) & (at < capacity)
        safe = jnp.where(valid, at, 0)
        stored = cache[layer, safe // paged.PAGE, safe % paged.PAGE]
        keys = paged.unpack_latent(stored, kv_lora_rank, rope, q.dtype).astype(jnp.float32)
        # A slot that is not selected may hold anything, NaN included: it must not reach the sums through 0 * NaN.
        keys = jnp.where(valid[:, None], keys, 0.0)
        logits = einsum("hd,kd->hk", query, keys) * scale
        logits = jnp.where(valid[None, :], logits, -jnp.inf)
        peak = jnp.max(logits, axis=-1, keepdims=True)
        weights = jnp.exp(logits - jnp.where(jnp.isfinite(peak), peak, 0.0))
        total = jnp.sum(weights, axis=-1, keepdims=True)
        context = einsum("hk,kc->hc", weights, keys[:, :kv_lora_rank])
        context = context / jnp.where(total > 0, total, 1.0)
        return rounded(context, q.dtype), (jnp.log(total) + peak)[:, 0]

    rows = max(1, _BLOCK_ELEMENTS // (slots.shape[1] * q.shape[-1]))
    return jax.lax.map(one_row, (q, slots), batch_size=min(rows, q.shape[0]))
