"""Reference of top_k in jnp; runs anywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def top_k(scores: jax.Array, lengths: jax.Array, k: int) -> jax.Array:
    rows, n = scores.shape
    inside = jnp.arange(n, dtype=jnp.int32)[None, :] < lengths[:, None]
    # NaN counts as -inf; positions past the length come after all others, since equal scores go by position. lax.top_k ranks
    # +0.0 above -0.0, which are equal scores.
    ranked = jnp.where(inside & ~jnp.isnan(scores), jnp.where(scores == 0, 0.0, scores), -jnp.inf)
    _, indices = jax.lax.top_k(ranked, min(k, n))
    indices = jnp.pad(indices.astype(jnp.int32), ((0, 0), (0, k - min(k, n))), constant_values=-1)
    rank = jnp.arange(k, dtype=jnp.int32)[None, :]
    count = jnp.minimum(jnp.minimum(lengths, k), n)[:, None]
    # Rows that keep everything return it in order of position.
    indices = jnp.where((lengths <= k)[:, None], jnp.broadcast_to(rank, (rows, k)), indices)
    return jnp.where(rank < count, indices, -1)
