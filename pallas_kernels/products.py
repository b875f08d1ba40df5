"""The one way in which references multiply and round: float32 accumulation, never TF32; a rounding point rounds."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rounded(x: jax.Array, dtype: jnp.dtype | type) -> jax.Array:
    """x rounded to dtype, for good: XLA for GPUs drops f32 -> bf16 -> f32 (its excess precision), and a reference that skips a
    rounding point of its contract differs from the kernel that has it."""
    if x.dtype == jnp.float32 and jnp.dtype(dtype) == jnp.bfloat16:
        x = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
    return x.astype(dtype)


def einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """jnp.einsum of two operands, accumulated and returned in float32.

    Two bfloat16 operands stay so on GPUs, where the matrix units multiply them exactly; everything else, and everything on CPUs
    (whose dot takes no bfloat16 with a float32 result), is widened to float32 first. Both give the same products.
    """

    def widened(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(spec, a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")

    def narrow(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)

    if a.dtype == b.dtype == jnp.bfloat16:
        return jax.lax.platform_dependent(a, b, cuda=narrow, default=widened)
    return widened(a, b)
