"""MLA in the absorbed form over the selected part of the paged latent cache."""

from __future__ import annotations

import jax

from glm52_jax.cache import Cache, Rows, Selection
from glm52_jax.config import Config
from glm52_jax.layers import indexer
from glm52_jax.plan import Plan
from glm52_jax.weights import AttentionWeights, IndexerWeights
from pallas_kernels import fp8_linear, latent_write, mla_front, mla_out, norm_quant, sparse_mla


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
    """Attention of one layer, without the residual.

    Args:
      weights, index_weights: stacks; ``layer`` counts in the first, ``index_layer`` in the second. ``index_layer`` None is a
        shared layer, which attends to ``selection``, the set of the last full layer, over its own latents.
      x: [rows, hidden], the residual stream.

    Returns:
      [rows, hidden], the cache with this layer's keys written, and the selection used.
    """
    x = norm_quant.rms_norm(x, weights.input_norm[layer], config.rms_norm_eps)
    rotation = (rows.cos, rows.sin)
    q_a, kv_a = fp8_linear.linears(x, (weights.q_a, weights.kv_a), (layer,), arithmetic=plan.linear)
    latents = latent_write.write(
        kv_a,
        weights.kv_a_norm,
        cache.latent,
        layer,
        rows.slots,
        *rotation,
        eps=config.latent_norm_eps,
    )
    latent, query = mla_front.query(
        q_a,
        weights.q_a_norm,
        weights.q_b,
        weights.w_uk,
        layer,
        *rotation,
        eps=config.latent_norm_eps,
        arithmetic=plan.linear,
    )
    keys = cache.index_keys
    if index_layer is not None:
        selection, keys = indexer.select(index_weights, index_layer, latent, x, keys, rows, config, plan)
    if selection is None:
        raise ValueError(f"{layer=} shares a selection but no full layer ran before it")
    context, _ = sparse_mla.attend(
        query,
        latents,
        layer,
        selection.slots.reshape(query.shape[0], -1),
        kv_lora_rank=config.kv_lora_rank,
        scale=config.softmax_scale,
    )
    out = mla_out.output(context, weights.w_uv, weights.o_proj, layer, arithmetic=plan.linear)
    return out, Cache(latent=latents, index_keys=keys), selection
