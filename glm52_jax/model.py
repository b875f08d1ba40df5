"""The decoder: embedding, layers, final norm, head. Pure functions; no jit, no mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glm52_jax.cache import Cache, Rows, Selection
from glm52_jax.config import DENSE, FULL, Config
from glm52_jax.layers.attention import attention
from glm52_jax.layers.indexer import pad_selection
from glm52_jax.layers.mlp import dense_mlp
from glm52_jax.layers.moe import moe
from glm52_jax.plan import Plan
from glm52_jax.weights import Weights
from pallas_kernels import fp8_linear, norm_quant

# Inspection points: "hidden.<layer>" [batch, width, hidden], "topk.<layer>" [batch, width, index_topk], "experts.<layer>" [.., k].
type Taps = dict[str, jax.Array]


def forward(
    weights: Weights, tokens: jax.Array, cache: Cache, rows: Rows, config: Config, plan: Plan, taps: bool = False
) -> tuple[jax.Array, Cache, Taps]:
    """Runs rows of tokens through all layers, writing their keys before attending.

    Args:
      weights: the model's.
      tokens: int32 [batch, width]; padding rows may hold anything.
      cache: holds every earlier position of the sequences.
      rows: geometry of the call.
      taps: static; also returns the residual stream after each layer, selections and chosen experts.

    Returns:
      the final-normed hidden state [batch, width, hidden] in plan.dtype, the cache, and the taps ({} without).
    """
    batch, width = tokens.shape
    x = embed(weights, tokens, plan)
    selection: Selection | None = None
    found: Taps = {}
    for layer in range(config.num_hidden_layers):
        full = config.indexer_types[layer] == FULL
        index_layer = config.full_layers.index(layer) if full else None
        with jax.named_scope(f"layer{layer}"):
            out, cache, selection = attention(
                weights.attention,
                layer,
                weights.indexer,
                index_layer,
                x,
                cache,
                rows,
                selection,
                config,
                plan,
            )
            x = x + out
            out, chosen = _mlp(weights, layer, x, config, plan)
            x = x + out
        if taps:
            found[f"hidden.{layer}"] = x.reshape(batch, width, -1)
            if full:
                found[f"topk.{layer}"] = pad_selection(selection, config.index_topk)
            if chosen is not None:
                found[f"experts.{layer}"] = chosen.reshape(batch, width, -1)
    x = norm_quant.rms_norm(x, weights.norm, config.rms_norm_eps)
    return x.reshape(batch, width, -1), cache, found


def embed(weights: Weights, tokens: jax.Array, plan: Plan) -> jax.Array:
    """Embeddings [batch * width, hidden] of tokens [batch, width]; ids outside the vocabulary (padding) are clamped."""
    ids = jnp.clip(tokens.reshape(-1), 0, weights.embed.shape[0] - 1)
    return weights.embed[ids].astype(plan.activation)


def _mlp(weights: Weights, layer: int, x: jax.Array, config: Config, plan: Plan) -> tuple[jax.Array, jax.Array | None]:
    if config.mlp_layer_types[layer] == DENSE:
        assert weights.dense is not None
        return dense_mlp(weights.dense, config.dense_layers.index(layer), x, config, plan), None
    assert weights.moe is not None
    return moe(weights.moe, config.sparse_layers.index(layer), x, config, plan)


def logits(weights: Weights, hidden: jax.Array, plan: Plan) -> jax.Array:
    """Vocabulary logits float32 [..., vocab] of final-normed hidden states [..., hidden]."""
    return fp8_linear.linear(hidden, weights.head, arithmetic=plan.linear, dtype=jnp.float32)
