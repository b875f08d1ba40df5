"""Router of the mixture of experts (noaux_tc, one group)."""

from __future__ import annotations

import jax

from pallas_kernels.router import reference


def route(
    x: jax.Array, gate: jax.Array, bias: jax.Array, layer: int | jax.Array, *, k: int, scale: float
) -> tuple[jax.Array, jax.Array]:
    """Chosen experts of each row and their weights.

    Computes: s = sigmoid(f32(x) @ f32(gate[layer]).T); ids = the k largest of s + bias[layer] (equal values: lower id);
      weights = s[ids] / (sum s[ids] + 1e-20) * scale.
    Inputs: x [rows, hidden]; gate [moe layers, experts, hidden]; bias float32 [moe layers, experts]; k, scale: static.
    Outputs: ids int32 [rows, k] by descending biased score; weights float32 [rows, k].
    Rounding points: float32 throughout.
    Source: spec section 5.5.
    """
    return reference.route(x, gate, bias, layer, k, scale)
