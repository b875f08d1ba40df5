"""Residual add and RMSNorm in Triton whose result also comes quantized as ``fp8_linear``'s Hopper kernel reads it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl

from pallas_kernels.layer_index import layer_argument
from pallas_kernels.layer_triton import layer_of
from pallas_kernels.lowering import triton_options
from pallas_kernels.norm_quant.spec import Spec, padded


@triton.jit
def add_norm_split_kernel(
    x, residual, weight, layer, total, out, values, scales,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr, STRIDE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Grid (rows,). values [2, STRIDE, WIDTH], scales [GROUPS, STRIDE]."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, PADDED)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    live = column < WIDTH
    # Everything is loaded before anything is used: behind the sum, the layer and its weight were two more memory latencies.
    start = layer_of(layer).to(tl.int64) * WIDTH
    y = tl.load(x + row * WIDTH + column, mask=live, other=0.0).to(tl.float32)
    delta = tl.load(residual + row * WIDTH + column, mask=live, other=0.0)
    factor = tl.load(weight + start + column, mask=live, other=0.0)
    rounded = (y + delta.to(tl.float32)).to(tl.bfloat16)
    tl.store(total + row * WIDTH + column, rounded, mask=live)
    y = rounded.to(tl.float32)
    mean = tl.sum(tl.sum(y * y, 1), 0) / WIDTH
    normed = (y * tl.rsqrt(mean + EPS) * factor.to(tl.float32)).to(tl.bfloat16)
    tl.store(out + row * WIDTH + column, normed, mask=live)
    y = normed.to(tl.float32)
    amax = tl.max(tl.abs(y), 1)
    at = values + row * WIDTH + column
    # A power of two, so that the terms are exact; amax / scale is in (224, 448].
    bits = (tl.maximum(amax, 7.888609052210118e-31) * (1.0 / 448.0)).to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFFF) & 0x7F800000
    scale = bits.to(tl.float32, bitcast=True)
    q = y * (0x7F000000 - bits).to(tl.float32, bitcast=True)[:, None]
    high = q.to(tl.float8e4nv)
    tl.store(at, high, mask=live)
    low = ((q - high.to(tl.float32)) * 16.0).to(tl.float8e4nv)
    tl.store(at + STRIDE * WIDTH, low, mask=live)
    tl.store(scales + group * STRIDE + row, scale, mask=group < GROUPS)


def run(
    spec: Spec, x: jax.Array, residual: jax.Array, weight: jax.Array, layer: int | jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    stride, groups = padded(spec.rows), spec.width // 128
    rows_type = jax.ShapeDtypeStruct((spec.rows, spec.width), x.dtype)
    out_type = (
        rows_type,
        rows_type,
        jax.ShapeDtypeStruct((2, stride, spec.width), jnp.float8_e4m3fn),
        jax.ShapeDtypeStruct((groups, stride), jnp.float32),
    )
    return jax_triton.triton_call(
        x, residual, weight, layer_argument(layer), kernel=add_norm_split_kernel, out_type=out_type, grid=(spec.rows,),
        name="add_norm_split", num_warps=16 if spec.width > 2048 else 4, **triton_options(), WIDTH=spec.width, GROUPS=groups,
        PADDED=triton.next_power_of_2(groups), STRIDE=stride, EPS=spec.eps,
    )  # fmt: skip
