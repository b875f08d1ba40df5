"""Reference of fp8_linear in jnp; runs anywhere."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import BlockScaled, Weight, dequantize, take
from pallas_kernels.fp8_linear.spec import Spec
from pallas_kernels.norm_quant.reference import add_norm, quantize_groups
from pallas_kernels.products import einsum, rounded


def run(
    spec: Spec,
    x: jax.Array,
    weights: tuple[Weight, ...],
    index: tuple[int | jax.Array, ...],
    after: Any = None,
    norm: jax.Array | None = None,
    delta: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    """Outputs of every weight, as ``fp8_linear`` describes them; with a norm (total, normed, outputs ...) of ``norm_linears``.

    ``after`` is for kernels; nothing reads it here.
    """
    if norm is not None:
        total, normed = add_norm(x, delta, norm[tuple(index)], spec.eps)
        plain = dataclasses.replace(spec, norm="", delta=False, eps=0.0)
        return (total, normed, *run(plain, normed, weights, index))
    if spec.form == "swiglu":
        return (swiglu(x, weights[0], index, spec.arithmetic),)
    return tuple(linear(x, w, index, spec.arithmetic, jnp.dtype(spec.out_dtype)) for w in weights)


def product(x: jax.Array, w: Weight, arithmetic: str) -> jax.Array:
    """x @ W.T in float32, before the rounding of the output."""
    if not isinstance(w, BlockScaled):
        return einsum("...k,nk->...n", x, w)
    if arithmetic == "w8a8":
        # The barrier keeps XLA for GPUs from simplifying f32 -> e4m3 -> f32 away, which it does by default.
        values, scale = jax.lax.optimization_barrier(quantize_groups(x))
        x = values.astype(jnp.float32) * jnp.repeat(scale, 128, axis=-1)[..., : x.shape[-1]]
    return einsum("...k,nk->...n", x, dequantize(w))


def linear(
    x: jax.Array, w: Weight, index: tuple[int | jax.Array, ...], arithmetic: str, dtype: jnp.dtype | type
) -> jax.Array:
    return rounded(product(x, take(w, index), arithmetic), dtype)


def swiglu(x: jax.Array, gate_up: Weight, index: tuple[int | jax.Array, ...], arithmetic: str) -> jax.Array:
    gate = product(x, take(gate_up, (*index, 0)), arithmetic)
    up = product(x, take(gate_up, (*index, 1)), arithmetic)
    return rounded(jax.nn.silu(gate) * up, x.dtype)
