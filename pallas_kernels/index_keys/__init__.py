"""The two sides of the DSA indexer's dot products: cached index keys, and queries with their head weights."""

from __future__ import annotations

import jax

from pallas_kernels.blocks import Weight
from pallas_kernels.index_keys import reference


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
    """Computes and stores the index key of each row.

    Computes: k = LayerNorm(x @ wk[layer].T; weight, bias, eps 1e-6), its first rope dims rotated; cache[layer, slot] = pack(k).
    Inputs: x [rows, hidden], the normed hidden state; wk [full layers, head_dim, hidden]; norm_weight, norm_bias
      [full layers, head_dim]; cache: index-key cache (formats in ``paged``); slots int32 [rows], -1 writes nothing;
      cos, sin float32 [rows, rope / 2]; layer: position among the full layers, static or traced.
    Outputs: the cache, same shape. In place: under jit with the cache donated.
    Rounding points: float32 until the cache's format; FP8: scale = max(amax, 1e-4) / 448, one a key.
    Source: spec sections 5.3 and 7.
    """
    return reference.write(x, wk, norm_weight, norm_bias, cache, layer, slots, cos, sin)


def query(
    latent: jax.Array,
    x: jax.Array,
    wq_b: Weight,
    weights_proj: jax.Array,
    layer: int | jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    quantized: bool,
    arithmetic: str = "w8a16",
) -> tuple[jax.Array, jax.Array]:
    """Index queries and head weights, all scales folded into the weights.

    Computes: q = latent @ wq_b[layer].T by head, first rope dims rotated; w = (x @ weights_proj[layer].T) * heads^-1/2 *
      head_dim^-1/2; quantized: q -> e4m3 with one scale a head, which is folded into w.
    Inputs: latent [rows, q_lora_rank], the *normed* query latent; x [rows, hidden]; wq_b [full layers, heads * head_dim,
      q_lora_rank]; weights_proj [full layers, heads, hidden]; cos, sin float32 [rows, rope / 2].
    Outputs: q [rows, heads, head_dim], float32 or float8_e4m3fn; w float32 [rows, heads], signed.
    Rounding points: float32 until the quantization.
    Source: spec sections 5.3 and 7.
    """
    return reference.query(latent, x, wq_b, weights_proj, layer, cos, sin, quantized, arithmetic)
