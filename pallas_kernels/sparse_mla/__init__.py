"""MLA attention over a selected set of cached latents."""

from __future__ import annotations

import jax

from pallas_kernels.sparse_mla import reference


def attend(
    q: jax.Array, cache: jax.Array, layer: int | jax.Array, slots: jax.Array, *, kv_lora_rank: int, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Absorbed multi-query attention of each row over its own slots.

    Computes: p = softmax_j(scale * q[h] . key_j) over the selected slots; context[h] = sum_j p_j * key_j[:kv_lora_rank].
    Inputs: q [rows, heads, kv_lora_rank + rope]; cache [layers, pages, 64, width] (formats in ``paged``); layer: static or
      traced scalar; slots int32 [rows, k], negative or out of the cache = not selected, any order; scale: (nope + rope)^-1/2.
    Outputs: context [rows, heads, kv_lora_rank] in q's dtype; lse float32 [rows, heads], the natural log of the sum of
      exponentials, for merging shards of a context (-inf and a zero context where nothing is selected).
    Rounding points: FP8 latents are dequantized to q's dtype; scores, softmax and sums in float32; one rounding at the end.
    Graph-safe: yes. What is not selected is not used, NaN included.
    Bound: rows * k * row bytes of the cache (656 for FP8).
    Source: spec sections 5.2, 5.4 and 7.
    """
    return reference.attend(q, cache, layer, slots, kv_lora_rank, scale)
