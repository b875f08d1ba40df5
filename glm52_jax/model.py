"""The decoder: embedding, layers, final norm, head. Pure functions; no jit, no mesh.

On several devices they run on each of them (``parallel.spread``) with that device's slices of the weights. The residual stream is
the same everywhere, or, where devices have sequences of their own, holds this device's rows; where a layer's functions return
summands, the sums are here.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from glm52_jax.cache import Cache, Rows, Selection
from glm52_jax.config import DENSE, FULL, Config
from glm52_jax.layers.attention import add_attention
from glm52_jax.layers.indexer import pad_selection
from glm52_jax.layers.mlp import dense_mlp
from glm52_jax.layers.moe import moe
from glm52_jax.plan import Plan
from glm52_jax.weights import Weights
from pallas_kernels import collectives, fp8_linear, norm_quant

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
    # What the block before has yet to add to x: the sum shares a launch with the norm after it.
    delta: jax.Array | None = None
    selection: Selection | None = None
    found: Taps = {}
    for layer in range(config.num_hidden_layers):
        full = config.indexer_types[layer] == FULL
        index_layer = config.full_layers.index(layer) if full else None
        with jax.named_scope(f"layer{layer}"):
            x, out, cache, selection = add_attention(
                weights.attention,
                layer,
                weights.indexer,
                index_layer,
                x,
                delta,
                cache,
                rows,
                selection,
                config,
                plan,
            )
            x = x + attention_sum(out, plan)
            delta, chosen = _mlp(weights, layer, x, config, plan)
        if taps:
            found[f"hidden.{layer}"] = (x + delta).reshape(batch, width, -1)
            if full:
                found[f"topk.{layer}"] = pad_selection(selection, config.index_topk)
            if chosen is not None:
                found[f"experts.{layer}"] = chosen.reshape(batch, width, -1)
    if delta is not None:
        x = x + delta
    x = norm_quant.rms_norm(x, weights.norm, config.rms_norm_eps)
    return x.reshape(batch, width, -1), cache, found


def embed(weights: Weights, tokens: jax.Array, plan: Plan) -> jax.Array:
    """Embeddings [batch * width, hidden] of tokens [batch, width]; ids outside the vocabulary (padding) are clamped."""
    ids = jnp.clip(tokens.reshape(-1), 0, weights.embed.shape[0] - 1)
    return weights.embed[ids].astype(plan.activation)


def _mlp(weights: Weights, layer: int, x: jax.Array, config: Config, plan: Plan) -> tuple[jax.Array, jax.Array | None]:
    if config.mlp_layer_types[layer] == DENSE:
        dense, index = weights.dense, config.dense_layers.index(layer)
        assert dense is not None
        return mlp_sum(lambda rows: (dense_mlp(dense, index, rows, config, plan), None), x, plan)
    sparse, index = weights.moe, config.sparse_layers.index(layer)
    assert sparse is not None
    return mlp_sum(lambda rows: moe(sparse, index, rows, config, plan), x, plan)


def attention_sum(out: jax.Array, plan: Plan) -> jax.Array:
    """Attention of all heads from this device's: a sum over the devices, unless each of them has all heads.

    The layers round their summands to the activations' dtype; the sum itself is taken in float32.
    """
    share = plan.parallel
    return out if share is None or share.own_sequences else collectives.all_reduce(out, share.axis)


def mlp_sum(
    run: Callable[[jax.Array], tuple[jax.Array, jax.Array | None]], x: jax.Array, plan: Plan
) -> tuple[jax.Array, jax.Array | None]:
    """``run(x)`` -> (out [rows, hidden], chosen experts of each row or None), with out summed over the devices.

    Where devices have rows of their own, ``run`` gets the rows of all of them and each device keeps its own of the results.
    """
    share = plan.parallel
    if share is None:
        return run(x)
    if not share.own_sequences:
        out, chosen = run(x)
        return collectives.all_reduce(out, share.axis), chosen
    out, chosen = run(collectives.all_gather(x, share.axis))
    first = jax.lax.axis_index(share.axis) * x.shape[0]
    own = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, first, x.shape[0]), chosen)
    return collectives.reduce_scatter(out, share.axis), own


def logits(weights: Weights, hidden: jax.Array, plan: Plan) -> jax.Array:
    """Vocabulary logits float32 [batch, ..., vocab] of final-normed hidden states [batch, ..., hidden]."""
    share = plan.parallel
    if share is not None and share.own_sequences:
        hidden = collectives.all_gather(hidden, share.axis)
    found = fp8_linear.linear(hidden, weights.head, arithmetic=plan.linear, dtype=jnp.float32)
    if share is None:
        return found
    # Each device has a part of the vocabulary, for its own rows or for all.
    if share.own_sequences:
        return collectives.all_to_all(found, share.axis, split=0, into=-1)
    return collectives.all_gather(found, share.axis, dim=-1)
