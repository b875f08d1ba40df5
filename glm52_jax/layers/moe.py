"""Mixture of experts of a layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glm52_jax.config import Config
from glm52_jax.plan import Plan
from glm52_jax.weights import MoeWeights
from pallas_kernels import collectives, experts, router
from pallas_kernels.parts import Parts, whole


class Mailboxes(NamedTuple):
    """Zeros at the start of a step, then threaded through its layers: words in which programs of a launch meet."""

    router: jax.Array
    experts: jax.Array


def new_mailboxes(weights: MoeWeights, rows: int, config: Config) -> Mailboxes:
    """For that many rows and a device's share of the weights."""
    widths = (weights.gate_up.shape[-2], weights.shared_gate_up.shape[-2])
    meeting = router.mailbox_words(rows, config.hidden_size, config.n_routed_experts)
    products = experts.mailbox_words(rows, config.num_experts_per_tok, *widths)
    return Mailboxes(jnp.zeros((meeting,), jnp.int32), jnp.zeros((products,), jnp.int32))


def moe(weights: MoeWeights, layer: int, x: jax.Array, config: Config, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Routed and shared experts of the normed residual stream x [rows, hidden], without the residual.

    ``layer`` counts sparse layers. Returns [rows, hidden], of which each device of a mesh has a summand, and the chosen experts
    int32 [rows, k], which every device knows.
    """
    mailbox = new_mailboxes(weights, x.shape[0], config)
    _, out, chosen, _ = add_moe(weights, layer, x, None, mailbox, config, plan)
    return whole(out, x.dtype), chosen


def add_moe(
    weights: MoeWeights,
    layer: int,
    x: jax.Array,
    delta: jax.Array | None,
    mailbox: Mailboxes,
    config: Config,
    plan: Plan,
) -> tuple[jax.Array, jax.Array | Parts, jax.Array, Mailboxes]:
    """Adds the block before (``delta`` [rows, hidden], or None) to the residual stream, norms, routes and applies ``moe``.

    mailbox: of ``new_mailboxes``, each layer once a step. Returns the stream with delta added, this layer's output (not added yet,
    nor summed over the experts where the launch that adds it can do that), the chosen experts, and the mailbox.
    """
    given = (x, delta, weights.post_norm, mailbox.router, config, plan)
    x, normed, routes, meeting = _routed(weights, layer, *given)
    out, products = _mixed(weights, layer, normed, routes, mailbox.experts, plan, apart=True)
    return x, out, routes.ids, Mailboxes(meeting, products)


def mixed(
    weights: MoeWeights, layer: int, normed: jax.Array, mailbox: Mailboxes, config: Config, plan: Plan
) -> tuple[jax.Array, jax.Array, Mailboxes]:
    """``moe`` of rows that are normed already: the output, the chosen experts, and the mailbox."""
    _, _, routes, meeting = _routed(weights, layer, normed, None, None, mailbox.router, config, plan)
    out, products = _mixed(weights, layer, normed, routes, mailbox.experts, plan)
    return out, routes.ids, Mailboxes(meeting, products)


class _Routes(NamedTuple):
    """What the router gives the experts: choices and their weights [rows, k], and what it has listed and quantized for them."""

    ids: jax.Array
    mixture: jax.Array
    lists: router.Lists | None
    quantized: tuple[jax.Array, jax.Array] | None


def _routed(
    weights: MoeWeights,
    layer: int,
    x: jax.Array,
    delta: jax.Array | None,
    norm: jax.Array | None,
    mailbox: jax.Array,
    config: Config,
    plan: Plan,
) -> tuple[jax.Array, jax.Array, _Routes, jax.Array]:
    """(x + delta, its norm, where its rows go, mailbox), as ``router.add_norm_route`` has them. It lists the rows of all experts:
    they must be all here."""
    elsewhere = plan.parallel is not None and plan.parallel.whole_experts
    widths = (weights.gate_up.shape[-2], weights.shared_gate_up.shape[-2])
    x, normed, ids, mixture, lists, *quantized, mailbox = router.add_norm_route(
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
        split=experts.takes_quantized(x.shape[0], *widths, plan.linear),
    )
    return x, normed, _Routes(ids, mixture, lists, quantized[0] if quantized else None), mailbox


def _mixed(
    weights: MoeWeights,
    layer: int,
    normed: jax.Array,
    routes: _Routes,
    mailbox: jax.Array,
    plan: Plan,
    apart: bool = False,
) -> tuple[Any, jax.Array]:
    return experts.mix(
        normed,
        _placed_here(routes.ids, weights.gate_up.shape[1], plan),
        routes.mixture,
        weights.gate_up,
        weights.down,
        weights.shared_gate_up,
        weights.shared_down,
        layer,
        arithmetic=plan.linear,
        lists=routes.lists,
        mailbox=mailbox,
        epoch=layer + 1,
        quantized=routes.quantized,
        apart=apart,
    )


def _placed_here(ids: jax.Array, experts: int, plan: Plan) -> jax.Array:
    """Ids counted from this device's first expert of ``experts``, -1 for experts of other devices."""
    if plan.parallel is None or not plan.parallel.whole_experts:
        return ids
    local = ids - collectives.rank(plan.parallel.axis) * experts
    return jnp.where((local >= 0) & (local < experts), local, -1)
