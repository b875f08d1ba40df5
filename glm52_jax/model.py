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
from glm52_jax.layers.mlp import add_dense_mlp, swiglu_mlp
from glm52_jax.layers.moe import Mailboxes, add_moe, mixed, new_mailboxes
from glm52_jax.plan import Plan
from glm52_jax.weights import Weights
from pallas_kernels import collectives, fp8_linear, norm_quant
from pallas_kernels.parts import Parts, whole

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
    delta: jax.Array | Parts | None = None
    selection: Selection | None = None
    mailbox = new_mailbox(weights, x.shape[0], config, plan)
    found: Taps = {}
    for layer in range(config.num_hidden_layers):
        full = config.indexer_types[layer] == FULL
        index_layer = config.full_layers.index(layer) if full else None
        with jax.named_scope(f"layer{layer}"):
            given = (
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
            with jax.named_scope("attention"):
                x, out, cache, selection = add_attention(*given)
            x, delta, chosen, mailbox = add_mlp(weights, layer, x, out, mailbox, config, plan)
        if taps:
            found[f"hidden.{layer}"] = (x + whole(delta, x.dtype)).reshape(batch, width, -1)
            if full:
                found[f"topk.{layer}"] = pad_selection(selection, config.index_topk)
            if chosen is not None:
                found[f"experts.{layer}"] = chosen.reshape(batch, width, -1)
    with jax.named_scope("head"):
        _, x = norm_quant.add_norm(x, delta, weights.norm[None], 0, config.rms_norm_eps)
    return x.reshape(batch, width, -1), cache, found


def embed(weights: Weights, tokens: jax.Array, plan: Plan) -> jax.Array:
    """Embeddings [batch * width, hidden] of tokens [batch, width]; ids outside the vocabulary (padding) are clamped."""
    ids = jnp.clip(tokens.reshape(-1), 0, weights.embed.shape[0] - 1)
    return weights.embed[ids].astype(plan.activation)


def add_mlp(
    weights: Weights,
    layer: int,
    x: jax.Array,
    out: jax.Array | None,
    mailbox: Mailboxes | None,
    config: Config,
    plan: Plan,
) -> tuple[jax.Array, jax.Array | Parts, jax.Array | None, Mailboxes | None]:
    """Adds attention's ``out``, of which each device has a summand, to the residual stream and applies the layer's MLP.

    mailbox: of ``new_mailbox``. Returns the stream, the MLP's output (summed over the devices, not added yet), the chosen experts
    of a sparse layer, and the mailbox. One device sums its experts, adds and norms in the launch of what follows, several add and
    norm in that of their sum.
    """
    alone, eps = plan.parallel is None or plan.parallel.devices == 1, config.rms_norm_eps
    if config.mlp_layer_types[layer] == DENSE:
        dense, index = weights.dense, config.dense_layers.index(layer)
        assert dense is not None
        with jax.named_scope("dense"):
            if alone:
                return *add_dense_mlp(dense, index, x, out, config, plan), None, mailbox
            x, normed = add_sum(x, out, dense.post_norm, index, eps, plan)
            return x, *mlp_sum(lambda rows: (swiglu_mlp(dense, index, rows, plan), None), normed, plan), mailbox
    sparse, index = weights.moe, config.sparse_layers.index(layer)
    assert sparse is not None and mailbox is not None
    if alone:
        return add_moe(sparse, index, x, out, mailbox, config, plan)

    def run(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        nonlocal mailbox
        assert mailbox is not None
        out, ids, mailbox = mixed(sparse, index, rows, mailbox, config, plan)
        return out, ids

    x, normed = add_sum(x, out, sparse.post_norm, index, eps, plan)
    summed, chosen = mlp_sum(run, normed, plan)
    return x, summed, chosen, mailbox


def new_mailbox(weights: Weights, rows: int, config: Config, plan: Plan) -> Mailboxes | None:
    """Zeros in which the programs of the router's and the experts' launches meet, for a device's ``rows`` rows: once a step."""
    share = plan.parallel
    rows = rows * share.devices if share is not None and share.own_sequences else rows
    return None if weights.moe is None else new_mailboxes(weights.moe, rows, config)


def add_sum(
    x: jax.Array, out: jax.Array | None, norm: jax.Array, layer: int, eps: float, plan: Plan
) -> tuple[jax.Array, jax.Array]:
    """(x + attention of all heads, its norm): in one launch with the sum over the devices, where there is one."""
    share = plan.parallel
    if out is not None and share is not None and not share.own_sequences:
        return collectives.all_reduce_add_norm(out, x, norm, layer, eps, share.axis)
    x = x if out is None else x + out
    return x, norm_quant.rms_norm(x, norm[layer], eps)


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
    first = collectives.rank(share.axis) * x.shape[0]
    own = jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, first, x.shape[0]), chosen)
    return collectives.reduce_scatter(out, share.axis), own


def logits(weights: Weights, hidden: jax.Array, plan: Plan) -> jax.Array:
    """Vocabulary logits float32 [batch, ..., vocab] of final-normed hidden states [batch, ..., hidden]."""
    share = plan.parallel
    if share is not None and share.own_sequences:
        hidden = collectives.all_gather(hidden, share.axis)
    with jax.named_scope("head"):
        found = fp8_linear.linear(hidden, weights.head, arithmetic=plan.linear, dtype=jnp.float32)
    if share is None:
        return found
    # Each device has a part of the vocabulary, for its own rows or for all.
    if share.own_sequences:
        return collectives.all_to_all(found, share.axis, split=0, into=-1)
    return collectives.all_gather(found, share.axis, dim=-1)
