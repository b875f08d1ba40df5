"""Mixture of experts of a layer."""

from __future__ import annotations

import jax

from glm52_jax.config import Config
from glm52_jax.plan import Plan
from glm52_jax.weights import MoeWeights
from pallas_kernels import experts, norm_quant, router


def moe(weights: MoeWeights, layer: int, x: jax.Array, config: Config, plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Routed and shared experts of the normed residual stream x [rows, hidden], without the residual.

    ``layer`` counts sparse layers. Returns [rows, hidden] and the chosen experts int32 [rows, k].
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
        ids,
        mixture,
        weights.gate_up,
        weights.down,
        weights.shared_gate_up,
        weights.shared_down,
        layer,
        arithmetic=plan.linear,
    )
    return out, ids
