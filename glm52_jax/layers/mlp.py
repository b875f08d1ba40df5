"""Dense MLP of a layer."""

from __future__ import annotations

import jax

from glm52_jax.config import Config
from glm52_jax.plan import Plan
from glm52_jax.weights import DenseWeights
from pallas_kernels import fp8_linear, norm_quant


def dense_mlp(weights: DenseWeights, layer: int, x: jax.Array, config: Config, plan: Plan) -> jax.Array:
    """SwiGLU MLP of the normed residual stream x [rows, hidden], without the residual; ``layer`` counts dense layers."""
    x = norm_quant.rms_norm(x, weights.post_norm[layer], config.rms_norm_eps)
    hidden = fp8_linear.swiglu(x, weights.gate_up, (layer,), arithmetic=plan.linear)
    return fp8_linear.linear(hidden, weights.down, (layer,), arithmetic=plan.linear)
