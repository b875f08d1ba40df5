"""Reference of mqa_logits in jnp; runs anywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels import paged
from pallas_kernels.products import einsum

# Per-head products kept at once, in elements.
_BLOCK_ELEMENTS = 1 << 25


def paged_logits(
    q: jax.Array,
    weights: jax.Array,
    cache: jax.Array,
    layer: int | jax.Array,
    table: jax.Array,
    lengths: jax.Array,
    starts: jax.Array | None = None,
) -> jax.Array:
    batch, rows, heads, head_dim = q.shape
    span = table.shape[1] * paged.PAGE
    position = jnp.arange(span, dtype=jnp.int32)

    def one_sequence(args: tuple[jax.Array, ...]) -> jax.Array:
        queries, head_weights, pages, limits, firsts = args
        keys = paged.read_index_pages(cache, layer, pages, head_dim)

        def one_row(row: tuple[jax.Array, ...]) -> jax.Array:
            query, weight, limit, first = row
            dots = einsum("hd,sd->hs", query, keys)
            scores = einsum("h,hs->s", weight, jax.nn.relu(dots))
            return jnp.where((position >= first) & (position < limit), scores, -jnp.inf)

        block = max(1, _BLOCK_ELEMENTS // (heads * span))
        return jax.lax.map(one_row, (queries, head_weights, limits, firsts), batch_size=min(block, rows))

    firsts = jnp.zeros_like(lengths) if starts is None else starts
    if batch == 1:
        return one_sequence((q[0], weights[0], table[0], lengths[0], firsts[0]))[None]
    return jax.lax.map(one_sequence, (q, weights, table, lengths, firsts))
