"""Byte formats of the two paged caches (pages of 64 tokens), packing and reading of rows.

Latent cache, one array for all layers [layers, pages, 64, width]:
  float32 / bfloat16: width = kv_lora_rank + rope: normed latent, then the roped shared key.
  uint8: width = kv_lora_rank + 4 * groups + 2 * rope, groups = ceil(kv_lora_rank / 128): e4m3 latent, one float32 scale a group
    of 128, bfloat16 roped key (656 bytes for 512 + 64: FlashMLA's "fp8_ds_mla").
Index-key cache:
  float32: [full layers, pages, 64, head_dim].
  uint8: [full layers, pages, 64 * head_dim + 64 * 4]: all e4m3 values of a page, then its 64 float32 scales.

A slot is page * 64 + offset. Slot -1 means "nothing": it is not written, and reads as not selected.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import E4M3
from pallas_kernels.norm_quant.reference import quantize_groups

PAGE = 64
INDEX_SCALE_FLOOR = 1e-4


def latent_width(kv_lora_rank: int, rope: int, quantized: bool) -> int:
    """Elements (bytes when quantized) of one latent row."""
    return kv_lora_rank + 4 * -(-kv_lora_rank // 128) + 2 * rope if quantized else kv_lora_rank + rope


def index_page_width(head_dim: int) -> int:
    """Bytes of one page of quantized index keys."""
    return PAGE * (head_dim + 4)


def _bytes(x: jax.Array) -> jax.Array:
    """[..., n] of any dtype -> uint8 [..., n * itemsize], little endian."""
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(*x.shape[:-1], -1)


def _from_bytes(x: jax.Array, dtype: jnp.dtype | type) -> jax.Array:
    """uint8 [..., n * itemsize] -> [..., n] of dtype."""
    size = jnp.dtype(dtype).itemsize
    split = x if size == 1 else x.reshape(*x.shape[:-1], -1, size)
    return jax.lax.bitcast_convert_type(split, dtype)


def _rounded(quantized: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Keeps XLA for GPUs from simplifying f32 -> e4m3 -> f32 away where rows are packed and read back in one program."""
    return jax.lax.optimization_barrier(quantized)


def pack_latent(c: jax.Array, kr: jax.Array, dtype: jnp.dtype | type) -> jax.Array:
    """Rows of the latent cache: c [rows, kv_lora_rank], kr [rows, rope] -> [rows, width] of the cache's dtype."""
    if dtype != jnp.uint8:
        return jnp.concatenate([c, kr], axis=-1).astype(dtype)
    values, scale = _rounded(quantize_groups(c))
    return jnp.concatenate([_bytes(values), _bytes(scale), _bytes(kr.astype(jnp.bfloat16))], axis=-1)


def unpack_latent(row: jax.Array, kv_lora_rank: int, rope: int, dtype: jnp.dtype | type) -> jax.Array:
    """Rows [..., width] of the latent cache -> [..., kv_lora_rank + rope] in dtype."""
    if row.dtype != jnp.uint8:
        return row.astype(dtype)
    groups = -(-kv_lora_rank // 128)
    values = _from_bytes(row[..., :kv_lora_rank], E4M3).astype(jnp.float32)
    scale = _from_bytes(row[..., kv_lora_rank : kv_lora_rank + 4 * groups], jnp.float32)
    c = values * jnp.repeat(scale, 128, axis=-1)[..., :kv_lora_rank]
    kr = _from_bytes(row[..., row.shape[-1] - 2 * rope :], jnp.bfloat16)
    return jnp.concatenate([c.astype(dtype), kr.astype(dtype)], axis=-1)


def write_rows(cache: jax.Array, layer: int | jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
    """Writes rows [n, width] at slots [n] of one layer of a [layers, pages, 64, width] cache; slot -1 writes nothing."""
    page, offset = _split(slots, cache.shape[1])
    return cache.at[layer, page, offset].set(rows, mode="drop")


def write_index_keys(cache: jax.Array, layer: int | jax.Array, slots: jax.Array, keys: jax.Array) -> jax.Array:
    """Writes index keys [n, head_dim] (float) at slots [n] of one full layer; quantizes for a uint8 cache."""
    if cache.dtype != jnp.uint8:
        return write_rows(cache, layer, slots, keys.astype(cache.dtype))
    head_dim = keys.shape[-1]
    # One group a key, also where head_dim is not 128.
    values, scale = _rounded(quantize_groups(keys, group=head_dim, floor=INDEX_SCALE_FLOOR))
    page, offset = _split(slots, cache.shape[1])
    at_value = offset[:, None] * head_dim + jnp.arange(head_dim, dtype=jnp.int32)[None, :]
    at_scale = PAGE * head_dim + offset[:, None] * 4 + jnp.arange(4, dtype=jnp.int32)[None, :]
    cache = cache.at[layer, page[:, None], at_value].set(_bytes(values), mode="drop")
    return cache.at[layer, page[:, None], at_scale].set(_bytes(scale), mode="drop")


def read_index_pages(cache: jax.Array, layer: int | jax.Array, pages: jax.Array, head_dim: int) -> jax.Array:
    """Keys of whole pages in float32: pages int32 [..., p] -> [..., p * 64, head_dim]; ids outside the cache are clamped."""
    ids = jnp.clip(pages, 0, cache.shape[1] - 1)
    raw = cache[layer, ids]
    if cache.dtype != jnp.uint8:
        return raw.astype(jnp.float32).reshape(*pages.shape[:-1], -1, head_dim)
    values = _from_bytes(raw[..., : PAGE * head_dim], E4M3).astype(jnp.float32)
    scale = _from_bytes(raw[..., PAGE * head_dim :], jnp.float32)
    keys = values.reshape(*pages.shape, PAGE, head_dim) * scale[..., None]
    return keys.reshape(*pages.shape[:-1], -1, head_dim)


def _split(slots: jax.Array, pages: int) -> tuple[jax.Array, jax.Array]:
    """(page, offset) of slots; slot -1 maps past the last page, where mode="drop" discards it."""
    page = jnp.where(slots >= 0, slots // PAGE, pages)
    return page, jnp.where(slots >= 0, slots % PAGE, 0)
