"""DSA indexer of a full layer: writes this layer's index keys, scores the cached ones, selects."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glm52_jax.cache import Rows, Selection, slots_of
from glm52_jax.config import Config
from glm52_jax.plan import Plan
from glm52_jax.weights import IndexerWeights
from pallas_kernels import index_keys, mqa_logits, top_k
from pallas_kernels.paged import PAGE


def select(
    weights: IndexerWeights,
    layer: int,
    latent: jax.Array,
    x: jax.Array,
    keys: jax.Array,
    rows: Rows,
    config: Config,
    plan: Plan,
) -> tuple[Selection, jax.Array]:
    """Selection of one full layer.

    Args:
      weights: stacked over full layers; ``layer`` counts full layers, in them and in ``keys``.
      latent: [rows, q_lora_rank], normed query latent. x: [rows, hidden], normed hidden state.
      keys: index-key cache of all full layers.

    Returns:
      the selection, k = min(index_topk, positions the block table can hold), and the updated key cache.
    """
    rotation = (rows.cos, rows.sin)
    keys = index_keys.write(x, weights.wk, weights.k_norm, weights.k_norm_bias, keys, layer, rows.slots, *rotation)
    q, head_weights = index_keys.query(
        latent,
        x,
        weights.wq_b,
        weights.weights_proj,
        layer,
        *rotation,
        quantized=plan.index_quantized,
        arithmetic=plan.linear,
    )
    batch, width = rows.positions.shape
    scores = mqa_logits.paged_logits(
        q.reshape(batch, width, *q.shape[1:]),
        head_weights.reshape(batch, width, -1),
        keys,
        layer,
        rows.table,
        rows.lengths,
    )
    k = min(config.index_topk, rows.table.shape[1] * PAGE)
    positions = top_k.top_k(scores.reshape(batch * width, -1), rows.lengths.reshape(-1), k)
    positions = positions.reshape(batch, width, k)
    return Selection(positions, slots_of(rows.table, positions)), keys


def pad_selection(selection: Selection, index_topk: int) -> jax.Array:
    """Selected positions padded with -1 to [batch, width, index_topk]."""
    missing = index_topk - selection.positions.shape[-1]
    return jnp.pad(selection.positions, ((0, 0), (0, 0), (0, missing)), constant_values=-1)
