"""Reference of the experts in jnp; runs anywhere."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import Weight, take
from pallas_kernels.experts.spec import Spec
from pallas_kernels.fp8_linear import reference as fp8_linear


def run(
    spec: Spec,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up: Weight,
    down: Weight,
    shared_gate_up: Weight,
    shared_down: Weight,
    layer: int | jax.Array,
    after: Any = None,
    lists: Any = None,
    mailbox: Any = None,
    epoch: Any = None,
    quantized: Any = None,
) -> Any:
    """As ``experts.mix`` describes it; nothing reads what comes after ``layer``."""
    y = mix(x, ids, weights, gate_up, down, shared_gate_up, shared_down, layer, spec.arithmetic)
    return y if mailbox is None else (y, mailbox)


def mix(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up: Weight,
    down: Weight,
    shared_gate_up: Weight,
    shared_down: Weight,
    layer: int | jax.Array,
    arithmetic: str,
) -> jax.Array:
    def ffn(gate_up: Weight, down: Weight, index: tuple[int | jax.Array, ...]) -> jax.Array:
        hidden = fp8_linear.swiglu(x, gate_up, index, arithmetic)
        return fp8_linear.product(hidden, take(down, index), arithmetic)

    def add_expert(expert: jax.Array, total: jax.Array) -> jax.Array:
        weight = jnp.sum(jnp.where(ids == expert, weights, 0.0), axis=-1, keepdims=True)

        def hit(total: jax.Array) -> jax.Array:
            # Rows that did not choose this expert add exactly nothing, whatever it makes of them.
            out = ffn(gate_up, down, (layer, expert))
            return total + jnp.where(jnp.any(ids == expert, axis=-1, keepdims=True), weight * out, 0.0)

        return jax.lax.cond(jnp.any(ids == expert), hit, lambda total: total, total)

    routed = jnp.zeros(x.shape, jnp.float32)
    routed = jax.lax.fori_loop(0, gate_up.shape[1], add_expert, routed)
    return (routed + ffn(shared_gate_up, shared_down, (layer,))).astype(x.dtype)
