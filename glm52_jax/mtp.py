"""The multi-token-prediction layer: from a hidden state and the next token, a draft of the token after it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glm52_jax.cache import Cache, Rows
from glm52_jax.config import Config
from glm52_jax.layers.attention import attention
from glm52_jax.layers.moe import moe
from glm52_jax.model import attention_sum, embed, mlp_sum
from glm52_jax.plan import Plan
from glm52_jax.weights import Weights
from pallas_kernels import collectives, fp8_linear, norm_quant


def draft(
    weights: Weights, hidden: jax.Array, successors: jax.Array, cache: Cache, rows: Rows, config: Config, plan: Plan
) -> tuple[jax.Array, Cache]:
    """First draft step of each row, with the layer's own indexer and caches.

    Args:
      hidden: [batch, width, hidden], the model's output *after* its final norm, at the rows' positions.
      successors: int32 [batch, width], the tokens at position + 1.
      cache: with the MTP layer's entries (``make_cache(..., mtp=True)``).
      rows: geometry; the layer works at the rows' own positions, not at position + 1.

    Returns:
      the normed hidden state [batch, width, hidden], which the head turns into logits for position + 2 and which a further
      draft step would take as ``hidden``, and the cache. Source: spec section 6.
    """
    assert weights.mtp is not None and weights.moe is not None
    extra, sparse, flat = weights.mtp, weights.moe, rows.positions.reshape(-1, 1)
    # The mask tests the position, not the token: position 0 never saw a predecessor in training.
    token = jnp.where(flat == 0, jnp.zeros((), plan.activation), embed(weights, successors, plan))
    token = norm_quant.rms_norm(token, extra.enorm, config.rms_norm_eps)
    state = norm_quant.rms_norm(hidden.reshape(token.shape), extra.hnorm, config.rms_norm_eps)
    x = fp8_linear.linear(jnp.concatenate([token, state], axis=-1), extra.eh_proj, arithmetic=plan.linear)
    if plan.parallel is not None and not plan.parallel.own_sequences:
        x = collectives.all_gather(x, plan.parallel.axis, dim=-1)
    layer, full, last = config.num_hidden_layers, len(config.full_layers), len(config.sparse_layers)
    out, cache, _ = attention(weights.attention, layer, weights.indexer, full, x, cache, rows, None, config, plan)
    x = x + attention_sum(out, plan)
    x = x + mlp_sum(lambda rows: moe(sparse, last, rows, config, plan), x, plan)[0]
    return norm_quant.rms_norm(x, extra.norm, config.rms_norm_eps).reshape(hidden.shape), cache
