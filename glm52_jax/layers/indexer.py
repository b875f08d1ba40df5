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

# Most bytes of float32 scores that exist at once, and most query rows: a long prefill goes through its queries in pieces.
SCORE_BYTES = 1 << 27
SEARCH_ROWS = 1024


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

    Beside the caches and the selection it needs SCORE_BYTES and some tens of megabytes, whatever the number of rows.
    """
    batch, width = rows.positions.shape
    span = rows.table.shape[1] * PAGE
    to_key = (weights.wk, weights.k_norm, weights.k_norm_bias)
    to_query = (weights.wq_b, weights.weights_proj)
    how = {"quantized": plan.index_quantized, "arithmetic": plan.linear}
    rotation = (rows.cos, rows.sin)
    if span <= config.index_topk:
        # Everything is selected whatever the scores; later tokens need the keys all the same.
        keys = index_keys.write(x, *to_key, keys, layer, rows.slots, *rotation)
        position = jnp.arange(span, dtype=jnp.int32)[None, None, :]
        positions = jnp.where(position < rows.lengths[..., None], position, -1)
        return Selection(positions, slots_of(rows.table, positions)), keys
    piece = query_rows_at_once(batch, width, span)
    if piece == width:
        keys, q, head_weights = index_keys.write_and_query(
            latent, x, *to_key, *to_query, keys, layer, rows.slots, *rotation, **how
        )
        return _search(q, head_weights, keys, layer, rows.table, rows.lengths, config.index_topk), keys
    keys = index_keys.write(x, *to_key, keys, layer, rows.slots, *rotation)

    def search(part: tuple[jax.Array, ...]) -> Selection:
        latents, hidden, cos, sin, lengths = part
        flat = (side.reshape(batch * piece, -1) for side in (latents, hidden, cos, sin))
        latents, hidden, cos, sin = flat
        q, head_weights = index_keys.query(latents, hidden, *to_query, layer, cos, sin, **how)
        return _search(q, head_weights, keys, layer, rows.table, lengths, config.index_topk)

    # [batch, width, ...] as [pieces, batch, piece, ...], each searched after the other.
    sides = (latent, x, rows.cos, rows.sin, rows.lengths)
    parts = tuple(side.reshape(batch, width // piece, piece, -1).swapaxes(0, 1) for side in sides)
    found = jax.lax.map(search, (*parts[:-1], parts[-1][..., 0]))
    return jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(batch, width, -1), found), keys


def query_rows_at_once(batch: int, width: int, span: int) -> int:
    """Query rows of each sequence within SCORE_BYTES over ``span`` positions, and SEARCH_ROWS: a divisor of ``width``."""
    most = max(1, min(SCORE_BYTES // (4 * span), SEARCH_ROWS) // batch)
    return max(n for n in range(1, min(width, most) + 1) if width % n == 0)


def _search(
    q: jax.Array,
    head_weights: jax.Array,
    keys: jax.Array,
    layer: int,
    table: jax.Array,
    lengths: jax.Array,
    index_topk: int,
) -> Selection:
    """Scores of some rows and their selection; lengths int32 [batch, rows of each]."""
    batch, width = lengths.shape
    q, head_weights = q.reshape(batch, width, *q.shape[1:]), head_weights.reshape(batch, width, -1)
    scores = mqa_logits.paged_logits(q, head_weights, keys, layer, table, lengths)
    positions, slots = top_k.top_k(scores.reshape(batch * width, -1), lengths.reshape(-1), index_topk, table=table)
    return Selection(positions.reshape(batch, width, -1), slots.reshape(batch, width, -1))


def pad_selection(selection: Selection, index_topk: int) -> jax.Array:
    """Selected positions padded with -1 to [batch, width, index_topk]."""
    missing = index_topk - selection.positions.shape[-1]
    return jnp.pad(selection.positions, ((0, 0), (0, 0), (0, missing)), constant_values=-1)
