"""Routed experts and the shared expert of one layer."""

from __future__ import annotations

import jax

from pallas_kernels.blocks import Weight
from pallas_kernels.experts import reference


def mix(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up: Weight,
    down: Weight,
    shared_gate_up: Weight,
    shared_down: Weight,
    layer: int | jax.Array,
    *,
    arithmetic: str = "w8a16",
) -> jax.Array:
    """Weighted sum of the chosen experts, plus the shared expert.

    Computes: sum_j weights[r, j] * ffn_{ids[r, j]}(x[r]) + ffn_shared(x[r]), ffn(x) = (silu(x @ gate.T) * (x @ up.T)) @ down.T.
    Inputs: x [rows, hidden]; ids int32 [rows, k], a negative id adds nothing; weights float32 [rows, k], 2.5 included;
      gate_up [moe layers, experts, 2, width, hidden]; down [moe layers, experts, hidden, width]; shared_gate_up
      [moe layers, 2, width, hidden]; shared_down [moe layers, hidden, width]; layer: static or traced scalar.
    Outputs: [rows, hidden] in x's dtype.
    Rounding points: the SwiGLU product once to x's dtype; down-projections, weights and sums in float32; one rounding at the end.
    Bound: bytes of the distinct experts hit and of the shared one, once.
    Source: spec section 5.6; the weight multiplies the expert's output.
    """
    return reference.mix(x, ids, weights, gate_up, down, shared_gate_up, shared_down, layer, arithmetic)
