"""Reference of norm_quant in jnp; runs anywhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import E4M3, E4M3_MAX, to_e4m3
from pallas_kernels.norm_quant.spec import Spec, padded
from pallas_kernels.parts import Parts, whole
from pallas_kernels.products import rounded


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return rounded(y * _row(weight, y), x.dtype)


def add_norm(x: jax.Array, delta: jax.Array | None, norm: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """(x + delta, its RMSNorm by norm [n]), each rounded; (x, its norm) without delta."""
    total = x if delta is None else add(x, delta)
    return total, rms_norm(total, norm, eps)


def add(x: jax.Array, delta: jax.Array) -> jax.Array:
    return rounded(x.astype(jnp.float32) + delta.astype(jnp.float32), x.dtype)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return rounded(y * _row(weight, y) + _row(bias, y), x.dtype)


def quantize_groups(x: jax.Array, group: int = 128, floor: float = 1e-10) -> tuple[jax.Array, jax.Array]:
    k = x.shape[-1]
    padded = jnp.pad(x.astype(jnp.float32), [(0, 0)] * (x.ndim - 1) + [(0, -k % group)])
    groups = padded.reshape(*x.shape[:-1], -1, group)
    scale = jnp.maximum(jnp.max(jnp.abs(groups), axis=-1), floor) / E4M3_MAX
    values = to_e4m3(groups / scale[..., None]).reshape(padded.shape)[..., :k]
    return values, scale


def fused(
    spec: Spec, x: jax.Array, residual: jax.Array | Parts | None, weight: jax.Array | None, layer: jax.Array
) -> tuple[jax.Array, ...]:
    """Sum, add, norm and quantize one after the other, each with its own rounding."""
    results: tuple[jax.Array, ...] = ()
    if residual is not None:
        x = add(x, whole(residual, x.dtype))
        results = (x,)
    if weight is not None:
        x = rms_norm(x, weight[layer], spec.eps)
    if spec.split:
        return (*results, x, *split(x))
    return (*results, *quantize_groups(x)) if spec.quantize else (*results, x)


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [rows, k] as ``norm_quant.add_norm_split`` describes its last two results; zeros beyond the rows."""
    rows, k = x.shape
    groups = x.astype(jnp.float32).reshape(rows, k // 128, 128)
    # The power of two that amax / 448 rounds up to.
    amax = jnp.maximum(jnp.max(jnp.abs(groups), axis=-1), 2.0**-100) * (1 / E4M3_MAX)
    bits = (jax.lax.bitcast_convert_type(amax, jnp.int32) + 0x7FFFFF) & 0x7F800000
    scale = jax.lax.bitcast_convert_type(bits, jnp.float32)
    q = groups / scale[..., None]
    # The barrier keeps XLA for GPUs from simplifying f32 -> e4m3 -> f32 away.
    high = jax.lax.optimization_barrier(q.astype(E4M3))
    low = ((q - high.astype(jnp.float32)) * 16).astype(E4M3)
    values = jnp.stack([part.reshape(rows, k) for part in (high, low)])
    beyond = padded(rows) - rows
    return jnp.pad(values, ((0, 0), (0, beyond), (0, 0))), jnp.pad(scale.T, ((0, 0), (0, beyond)))


def _row(weight: jax.Array, like: jax.Array) -> jax.Array:
    """A vector [n] in float32, with leading axes of one, for an operand [..., n] (rank promotion is an error in tests)."""
    return weight.astype(jnp.float32).reshape((1,) * (like.ndim - 1) + weight.shape)
