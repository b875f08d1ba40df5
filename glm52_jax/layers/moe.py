"""Mixture of experts of a layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glm52_jax.config import Config
from glm52_jax.plan import Plan
from glm52_jax.weights import MoeWeights
from pallas_kernels import collectives, experts, router


def moe(weights: MoeWeights, layer: int, x: jax.Array, config: Config, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Routed and shared experts of the normed residual stream x [rows, hidden], without the residual.

    ``layer`` counts sparse layers. Returns [rows, hidden], of which each device of a mesh has a summand, and the chosen experts
    int32 [rows, k], which every device knows.
    """
    words = router.mailbox_words(x.shape[0], config.hidden_size, config.n_routed_experts)
    mailbox = jnp.zeros((words,), jnp.int32)
    return add_moe(weights, layer, x, None, mailbox, config, plan)[1:3]


def add_moe(
    weights: MoeWeights,
    layer: int,
    x: jax.Array,
    delta: jax.Array | None,
    mailbox: jax.Array,
    config: Config,
    plan: Plan,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Adds the block before (``delta`` [rows, hidden], or None) to the residual stream, norms, routes and applies ``moe``.

    mailbox: zeros, of the router (``router.mailbox_words``). Returns the stream with delta added, this layer's output (not added
    yet), the chosen experts, and the mailbox.
    """
    given = (x, delta, weights.post_norm, mailbox, config, plan)
    x, normed, ids, mixture, lists, mailbox = _routed(weights, layer, *given)
    return x, _mixed(weights, layer, normed, ids, mixture, lists, plan), ids, mailbox


def mixed(
    weights: MoeWeights, layer: int, normed: jax.Array, mailbox: jax.Array, config: Config, plan: Plan
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``moe`` of rows that are normed already: the output, the chosen experts, and the mailbox."""
    _, _, ids, mixture, lists, mailbox = _routed(weights, layer, normed, None, None, mailbox, config, plan)
    return _mixed(weights, layer, normed, ids, mixture, lists, plan), ids, mailbox


def _routed(
    weights: MoeWeights,
    layer: int,
    x: jax.Array,
    delta: jax.Array | None,
    norm: jax.Array | None,
    mailbox: jax.Array,
    config: Config,
    plan: Plan,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, router.Lists | None, jax.Array]:
    """As ``router.add_norm_route``, which lists the rows of all experts: they must be all here."""
    elsewhere = plan.parallel is not None and plan.parallel.whole_experts
    return router.add_norm_route(
        x,
        delta,
        norm,
        weights.router,
        weights.router_bias,
        layer,
        mailbox,
        eps=config.rms_norm_eps,
        k=config.num_experts_per_tok,
        scale=config.routed_scaling_factor,
        unit=0 if elsewhere else experts.list_unit(),
    )


def _mixed(
    weights: MoeWeights,
    layer: int,
    normed: jax.Array,
    ids: jax.Array,
    mixture: jax.Array,
    lists: router.Lists | None,
    plan: Plan,
) -> jax.Array:
    return experts.mix(
        normed,
        _placed_here(ids, weights.gate_up.shape[1], plan),
        mixture,
        weights.gate_up,
        weights.down,
        weights.shared_gate_up,
        weights.shared_down,
        layer,
        arithmetic=plan.linear,
        lists=lists,
    )


def _placed_here(ids: jax.Array, experts: int, plan: Plan) -> jax.Array:
    """Ids counted from this device's first expert of ``experts``, -1 for experts of other devices."""
    if plan.parallel is None or not plan.parallel.whole_experts:
        return ids
    local = ids - collectives.rank(plan.parallel.axis) * experts
    return jnp.where((local >= 0) & (local < experts), local, -1)
