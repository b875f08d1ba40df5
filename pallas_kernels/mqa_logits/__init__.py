"""Scores of the DSA indexer: many query heads over one shared key a position."""

from __future__ import annotations

import jax

from pallas_kernels.mqa_logits import reference


def paged_logits(
    q: jax.Array,
    weights: jax.Array,
    cache: jax.Array,
    layer: int | jax.Array,
    table: jax.Array,
    lengths: jax.Array,
) -> jax.Array:
    """Index scores of query rows over their sequence's cached keys.

    Computes: score[b, t, s] = sum_h weights[b, t, h] * relu(q[b, t, h] . key[b, s]) for s < lengths[b, t], else -inf.
    Inputs: q [batch, rows, heads, head_dim] float32 or e4m3 (its scale already in weights); weights float32 [batch, rows,
      heads], signed; cache: index-key cache (formats in ``paged``); table int32 [batch, pages], page ids; lengths int32
      [batch, rows], the number of keys a row may see (its own position + 1).
    Outputs: float32 [batch, rows, pages * 64].
    Rounding points: dequantized keys, dot products, relu and the sum over heads in float32.
    Bound: bytes of the keys of each sequence once (132 a position for FP8).
    Source: spec sections 5.3 and 7.
    """
    return reference.paged_logits(q, weights, cache, layer, table, lengths)
