"""Mixture of experts of a layer."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from glm52_jax.config import Config
from glm52_jax.plan import Plan
from glm52_jax.weights import MoeWeights
from pallas_kernels import experts, norm_quant, router


def moe(weights: MoeWeights, layer: int, x: jax.Array, config: Config, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Routed and shared experts of the normed residual stream x [rows, hidden], without the residual.

    ``layer`` counts sparse layers. Returns [rows, hidden], of which each device of a mesh has a summand, and the chosen experts
    int32 [rows, k], which every device knows.
    """
    x = norm_quant.rms_norm(x, weights.post_norm[layer], config.rms_norm_eps)
    ids, mixture = router.route(
        x,
        weights.router,
        weights.router_bias,
        layer,
        k=config.num_experts_per_tok,
        scale=config.routed_scaling_factor,
    )
    out = experts.mix(
        x,
        _placed_here(ids, weights.gate_up.shape[1], plan),
        mixture,
        weights.gate_up,
        weights.down,
        weights.shared_gate_up,
        weights.shared_down,
        layer,
        arithmetic=plan.linear,
    )
    return out, ids


def _placed_here(ids: jax.Array, experts: int, plan: Plan) -> jax.Array:
    """Ids counted from this device's first expert of ``experts``, -1 for experts of other devices."""
    if plan.parallel is None or not plan.parallel.whole_experts:
        return ids
    local = ids - jax.lax.axis_index(plan.parallel.axis) * experts
    return jnp.where((local >= 0) & (local < experts), local, -1)
