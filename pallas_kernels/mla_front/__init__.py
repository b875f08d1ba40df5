"""Between MLA's down-projections and its attention: absorbed query, and the row of the latent cache."""

from __future__ import annotations

import jax

from pallas_kernels.blocks import Weight
from pallas_kernels.mla_front import reference


def query(
    q_a: jax.Array,
    norm: jax.Array,
    q_b: Weight,
    w_uk: jax.Array,
    layer: int | jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    eps: float,
    arithmetic: str = "w8a16",
) -> tuple[jax.Array, jax.Array]:
    """Normed query latent and absorbed query.

    Computes: ql = RMS(q_a; norm[layer], eps); q = ql @ q_b[layer].T split by head into nope | rope;
      query = [q_nope @ W_UK[layer] | rotated q_rope].
    Inputs: q_a [rows, q_lora_rank]; norm [layers, q_lora_rank]; q_b [layers, heads * (nope + rope), q_lora_rank], head major;
      w_uk [layers, heads, nope, kv_lora_rank]; cos, sin float32 [rows, rope / 2]; layer: static or traced scalar.
    Outputs: ql [rows, q_lora_rank] (the indexer reads it too); query [rows, heads, kv_lora_rank + rope], both in q_a's dtype.
    Rounding points: ql, the output of q_b, the rotated part and the absorbed part, each once to q_a's dtype.
    Source: spec section 5.2.
    """
    return reference.query(q_a, norm, q_b, w_uk, layer, cos, sin, eps, arithmetic)


def write_latent(
    kv_a: jax.Array,
    norm: jax.Array,
    cache: jax.Array,
    layer: int | jax.Array,
    slots: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    eps: float,
) -> jax.Array:
    """Norms, rotates and stores the shared key of each row.

    Computes: c = RMS(kv_a[:, :kv_lora_rank]; norm[layer], eps); kr = rotated kv_a[:, kv_lora_rank:] (not normed);
      cache[layer, slot] = pack(c, kr).
    Inputs: kv_a [rows, kv_lora_rank + rope]; norm [layers, kv_lora_rank]; cache [layers, pages, 64, width] (see ``paged``);
      slots int32 [rows], -1 writes nothing; cos, sin float32 [rows, rope / 2].
    Outputs: the cache, same shape. In place: under jit with the cache donated.
    Rounding points: c and kr once to kv_a's dtype, then the cache's format.
    Source: spec sections 5.2 and 7.
    """
    return reference.write_latent(kv_a, norm, cache, layer, slots, cos, sin, eps)
