"""Reference of fp8_linear in jnp; runs anywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import BlockScaled, Weight, dequantize, take
from pallas_kernels.norm_quant.reference import quantize_groups
from pallas_kernels.products import einsum


def product(x: jax.Array, w: Weight, arithmetic: str) -> jax.Array:
    """x @ W.T in float32, before the rounding of the output."""
    if not isinstance(w, BlockScaled):
        return einsum("...k,nk->...n", x, w)
    if arithmetic == "w8a8":
        values, scale = quantize_groups(x)
        x = values.astype(jnp.float32) * jnp.repeat(scale, 128, axis=-1)[..., : x.shape[-1]]
    return einsum("...k,nk->...n", x, dequantize(w))


def linear(
    x: jax.Array, w: Weight, index: tuple[int | jax.Array, ...], arithmetic: str, dtype: jnp.dtype | type
) -> jax.Array:
    return product(x, take(w, index), arithmetic).astype(dtype)


def swiglu(x: jax.Array, gate_up: Weight, index: tuple[int | jax.Array, ...], arithmetic: str) -> jax.Array:
    gate = product(x, take(gate_up, (*index, 0)), arithmetic)
    up = product(x, take(gate_up, (*index, 1)), arithmetic)
    return (jax.nn.silu(gate) * up).astype(x.dtype)
