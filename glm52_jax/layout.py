"""Pure re-layouts of weights, each with its exact inverse."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def split_kv_b(kv_b: jax.Array, heads: int, nope: int, v: int) -> tuple[jax.Array, jax.Array]:
    """kv_b [heads * (nope + v), latent] -> W_UK [heads, nope, latent], W_UV [heads, v, latent].

    Head h owns rows h * (nope + v) onward, its key rows first. Dequantize before splitting: FP8 blocks straddle heads.
    """
    by_head = kv_b.reshape(heads, nope + v, kv_b.shape[-1])
    return by_head[:, :nope], by_head[:, nope:]


def merge_kv_b(w_uk: jax.Array, w_uv: jax.Array) -> jax.Array:
    """Inverse of ``split_kv_b``."""
    merged = jnp.concatenate([w_uk, w_uv], axis=1)
    return merged.reshape(-1, merged.shape[-1])
