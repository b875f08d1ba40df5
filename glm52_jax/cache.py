"""Paged caches of latents and index keys, and the geometry of a batch of rows over them.

Formats: ``pallas_kernels.paged``. One page id indexes every layer's latents and index keys.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from glm52_jax.config import Config
from glm52_jax.plan import Plan
from glm52_jax.rope import rope_tables
from pallas_kernels.paged import PAGE, index_page_width, latent_width


@struct.dataclass
class Cache:
    """latent [layers, pages, 64, width]; index_keys [full layers, pages, ...]; both count the MTP layer if it has a cache."""

    latent: jax.Array
    index_keys: jax.Array


@struct.dataclass
class Rows:
    """Query rows of one call: ``batch`` sequences of ``width`` consecutive positions each, right-padded.

    positions int32 [batch, width]; lengths int32 [batch, width]: keys a row may see, its own included, 0 for padding rows;
    slots int32 [batch * width]: where a row's keys are written, -1 for padding; table int32 [batch, pages];
    cos, sin float32 [batch * width, rope / 2].
    """

    positions: jax.Array
    lengths: jax.Array
    slots: jax.Array
    table: jax.Array
    cos: jax.Array
    sin: jax.Array


@struct.dataclass
class Selection:
    """Positions that each row attends to: positions int32 [batch, width, k] and their cache slots, -1 for none."""

    positions: jax.Array
    slots: jax.Array


def make_cache(config: Config, plan: Plan, pages: int, mtp: bool = False) -> Cache:
    """Zeroed caches of ``pages`` pages of 64 tokens; ``mtp`` adds the MTP layer's. ValueError for slots beyond int32."""
    if pages * PAGE > 2**31:
        raise ValueError(f"{pages=} of {PAGE} tokens: slots are int32, so at most {2**31 // PAGE} pages")
    layers, full = config.num_hidden_layers + mtp, len(config.full_layers) + mtp
    width = latent_width(config.kv_lora_rank, config.qk_rope_head_dim, plan.cache == "fp8")
    dtype = jnp.uint8 if plan.cache == "fp8" else jnp.dtype(plan.cache)
    if plan.index_quantized:
        index = jnp.zeros((full, pages, index_page_width(config.index_head_dim)), jnp.uint8)
    else:
        index = jnp.zeros((full, pages, PAGE, config.index_head_dim), jnp.float32)
    return Cache(latent=jnp.zeros((layers, pages, PAGE, width), dtype), index_keys=index)


def contiguous_table(batch: int, pages: int) -> jax.Array:
    """Block table int32 [batch, pages] in which sequence b owns pages b * pages onward."""
    return jnp.asarray(np.arange(batch * pages, dtype=np.int32).reshape(batch, pages))


def slots_of(table: jax.Array, positions: jax.Array) -> jax.Array:
    """Slots of positions int32 [batch, ...] of each sequence; negative positions and those past the table give -1."""
    flat = positions.reshape(positions.shape[0], -1)
    page = jnp.take_along_axis(table, jnp.clip(flat // PAGE, 0, table.shape[1] - 1), axis=1)
    inside = (flat >= 0) & (flat < table.shape[1] * PAGE)
    return jnp.where(inside, page * PAGE + flat % PAGE, -1).reshape(positions.shape)


def make_rows(config: Config, table: jax.Array, starts: jax.Array, counts: jax.Array, width: int) -> Rows:
    """Rows of positions starts[b] .. starts[b] + counts[b] - 1 of each sequence, padded to ``width``.

    starts, counts: int32 [batch]; table int32 [batch, pages]; width: static.
    """
    offset = jnp.arange(width, dtype=jnp.int32)[None, :]
    positions = starts[:, None] + offset
    real = offset < counts[:, None]
    slots = slots_of(table, jnp.where(real, positions, -1)).reshape(-1)
    cos, sin = rope_tables(positions.reshape(-1), config.rope_theta, config.qk_rope_head_dim)
    return Rows(positions, jnp.where(real, positions + 1, 0), slots, table, cos, sin)
