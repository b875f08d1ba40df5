"""MLA in the absorbed form over the selected part of the paged latent cache."""

from __future__ import annotations

import jax

from glm52_jax.cache import Cache, Rows, Selection
from glm52_jax.config import Config
from glm52_jax.layers import indexer
from glm52_jax.plan import Plan
from glm52_jax.weights import AttentionWeights, IndexerWeights
from pallas_kernels import fp8_linear, mla_front, mla_out, sparse_mla
from pallas_kernels.parts import Parts


def attention(
    weights: AttentionWeights,
    layer: int,
    index_weights: IndexerWeights,
    index_layer: int | None,
    x: jax.Array,
    cache: Cache,
    rows: Rows,
    selection: Selection | None,
    config: Config,
    plan: Plan,
) -> tuple[jax.Array, Cache, Selection]:
    """Attention of one layer, without the residual: ``add_attention`` where nothing is left to add."""
    given = (weights, layer, index_weights, index_layer, x, None, cache, rows, selection, config, plan)
    return add_attention(*given)[1:]


def add_attention(
    weights: AttentionWeights,
    layer: int,
    index_weights: IndexerWeights,
    index_layer: int | None,
    x: jax.Array,
    delta: jax.Array | Parts | None,
    cache: Cache,
    rows: Rows,
    selection: Selection | None,
    config: Config,
    plan: Plan,
) -> tuple[jax.Array, jax.Array, Cache, Selection]:
    """Adds the block before to the residual stream and attends: the sum shares a launch with the norm and projections after it.

    Args:
      weights, index_weights: stacks; ``layer`` counts in the first, ``index_layer`` in the second. ``index_layer`` None is a
        shared layer, which attends to ``selection``, the set of the last full layer, over its own latents.
      x: [rows, hidden], the residual stream. delta: [rows, hidden], what the block before has yet to add to it, also as parts of
        a sum, or None.

    Returns:
      the residual stream with delta added, this layer's output (not added yet), both [rows, hidden], the cache with this layer's
      keys written, and the selection used.
    """
    rotation = (rows.cos, rows.sin)
    x, normed, (q_a, kv_a) = fp8_linear.norm_linears(
        x,
        weights.input_norm,
        (weights.q_a, weights.kv_a),
        (layer,),
        eps=config.rms_norm_eps,
        delta=delta,
        arithmetic=plan.linear,
    )
    latent, query, latents = mla_front.query_and_write(
        q_a,
        weights.q_a_norm,
        weights.q_b,
        weights.w_uk,
        kv_a,
        weights.kv_a_norm,
        cache.latent,
        layer,
        rows.slots,
        *rotation,
        eps=config.latent_norm_eps,
        arithmetic=plan.linear,
    )
    keys = cache.index_keys
    if index_layer is not None:
        with jax.named_scope("indexer"):
            selection, keys = indexer.select(index_weights, index_layer, latent, normed, keys, rows, config, plan)
    if selection is None:
        raise ValueError(f"{layer=} shares a selection but no full layer ran before it")
    context, lse = sparse_mla.attend(
        query,
        latents,
        layer,
        selection.slots.reshape(query.shape[0], -1),
        kv_lora_rank=config.kv_lora_rank,
        scale=config.softmax_scale,
        apart=True,
    )
    out = mla_out.output(context, weights.w_uv, weights.o_proj, layer, lse=lse, arithmetic=plan.linear)
    return x, out, Cache(latent=latents, index_keys=keys), selection
