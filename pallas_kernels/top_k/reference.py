"""Reference of top_k in jnp; runs anywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.paged import PAGE


def order_key(scores: jax.Array) -> jax.Array:
    """int32 [...], larger is better: the order of the scores as numbers, NaN as minus infinity, both zeros alike.

    On the bits, because a float comparison may take denormals for zeros, and lax.top_k ranks 0.0 above -0.0.
    """
    bits = jax.lax.bitcast_convert_type(scores, jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    bits = jnp.where(magnitude > 0x7F800000, -0x800000, jnp.where(magnitude == 0, 0, bits))
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def top_k(scores: jax.Array, lengths: jax.Array, k: int) -> jax.Array:
    rows, n = scores.shape
    inside = jnp.arange(n, dtype=jnp.int32)[None, :] < lengths[:, None]
    # No score has the smallest key: positions past the length come last.
    key = jnp.where(inside, order_key(scores), jnp.iinfo(jnp.int32).min)
    _, chosen = jax.lax.top_k(key, min(k, n))  # equal keys by position
    chosen = jnp.pad(jnp.sort(chosen.astype(jnp.int32), axis=-1), ((0, 0), (0, k - min(k, n))), constant_values=-1)
    rank = jnp.arange(k, dtype=jnp.int32)[None, :]
    count = jnp.minimum(lengths, n)[:, None]
    everything = jnp.where(rank < count, rank, -1)
    return jnp.where(count <= k, jnp.broadcast_to(everything, (rows, k)), chosen)


def slots_of(table: jax.Array, positions: jax.Array) -> jax.Array:
    """Cache slots of positions [rows, k] through table int32 [sequences, pages]; -1 for -1, past the table, for negative ids."""
    sequences, pages = table.shape
    flat = positions.reshape(sequences, -1)
    page = jnp.take_along_axis(table, jnp.clip(flat // PAGE, 0, pages - 1), axis=1)
    inside = (flat >= 0) & (flat < pages * PAGE) & (page >= 0)
    return jnp.where(inside, page * PAGE + flat % PAGE, -1).reshape(positions.shape)


def run(
    k: int, scores: jax.Array, lengths: jax.Array, table: jax.Array | None = None
) -> jax.Array | tuple[jax.Array, jax.Array]:
    positions = top_k(scores, lengths, k)
    return positions if table is None else (positions, slots_of(table, positions))
