"""Dense MLP of a layer."""

from __future__ import annotations

import jax

from glm52_jax.config import Config
from glm52_jax.plan import Plan
from glm52_jax.weights import DenseWeights
from pallas_kernels import fp8_linear, norm_quant


def add_dense_mlp(
    weights: DenseWeights, layer: int, x: jax.Array, delta: jax.Array | None, config: Config, plan: Plan
) -> tuple[jax.Array, jax.Array]:
    """Adds the block before (``delta`` [rows, hidden], or None) to the residual stream, in one launch with the norm, and applies
    ``swiglu_mlp``. Returns the stream with delta added, and this layer's output, not added yet."""
    x, normed = norm_quant.add_norm(x, delta, weights.post_norm, layer, config.rms_norm_eps)
    return x, swiglu_mlp(weights, layer, normed, plan)


def swiglu_mlp(weights: DenseWeights, layer: int, normed: jax.Array, plan: Plan) -> jax.Array:
    """SwiGLU MLP of normed rows [rows, hidden], without the residual; ``layer`` counts dense layers."""
    hidden = fp8_linear.swiglu(normed, weights.gate_up, (layer,), arithmetic=plan.linear)
    return fp8_linear.linear(hidden, weights.down, (layer,), arithmetic=plan.linear)
