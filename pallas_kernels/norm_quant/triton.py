"""Residual add, RMSNorm and quantization in Triton, one program a row; portable from SM80 to SM120."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl

from pallas_kernels.e4m3_triton import quantize_rows
from pallas_kernels.layer_index import layer_argument
from pallas_kernels.layer_triton import layer_of
from pallas_kernels.lowering import triton_options
from pallas_kernels.norm_quant import split_triton
from pallas_kernels.norm_quant.spec import Spec
from pallas_kernels.parts import Parts, whole


@triton.jit
def row_kernel(
    x, residual, weight, layer, total, out, scales,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr, EPS: tl.constexpr,
    ADD: tl.constexpr, NORM: tl.constexpr, QUANT: tl.constexpr,
):  # fmt: skip
    """Grid (rows,). What a variant has no use for is passed as a dummy and not touched."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, PADDED)
    column = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    live = column < WIDTH
    # Everything is loaded before anything is used: behind the sum, the layer and its weight were two more memory latencies.
    if NORM:
        start = layer_of(layer).to(tl.int64) * WIDTH
    y = tl.load(x + row * WIDTH + column, mask=live, other=0.0).to(tl.float32)
    if ADD:
        delta = tl.load(residual + row * WIDTH + column, mask=live, other=0.0)
    if NORM:
        factor = tl.load(weight + start + column, mask=live, other=0.0)
    if ADD:
        y += delta.to(tl.float32)
        rounded = y.to(tl.bfloat16)
        tl.store(total + row * WIDTH + column, rounded, mask=live)
        y = rounded.to(tl.float32)
    if NORM:
        mean = tl.sum(tl.sum(y * y, 1), 0) / WIDTH
        y = y * tl.rsqrt(mean + EPS) * factor.to(tl.float32)
        y = y.to(tl.bfloat16).to(tl.float32)
    if QUANT:
        bits, scale = quantize_rows(y)
        tl.store(out + row * WIDTH + column, bits.to(tl.uint8), mask=live)
        tl.store(scales + row * GROUPS + group, scale, mask=group < GROUPS)
    else:
        tl.store(out + row * WIDTH + column, y.to(tl.bfloat16), mask=live)


def run(
    spec: Spec, x: jax.Array, residual: jax.Array | Parts | None, weight: jax.Array | None, layer: int | jax.Array
) -> tuple[jax.Array, ...]:
    """Parts are XLA's to sum, in a launch of its own."""
    residual = None if residual is None else whole(residual, x.dtype)
    if spec.split:
        assert residual is not None and weight is not None, spec
        return split_triton.run(spec, x, residual, weight, layer)
    groups = -(-spec.width // 128)
    shape = (spec.rows, spec.width)
    unused = jax.ShapeDtypeStruct((1,), jnp.float32)
    out_type: tuple[Any, ...] = (
        jax.ShapeDtypeStruct(shape, x.dtype) if spec.add else unused,
        jax.ShapeDtypeStruct(shape, jnp.uint8 if spec.quantize else x.dtype),
        jax.ShapeDtypeStruct((spec.rows, groups), jnp.float32) if spec.quantize else unused,
    )
    total, out, scales = jax_triton.triton_call(
        x, x if residual is None else residual, x if weight is None else weight, layer_argument(layer), kernel=row_kernel,
        out_type=out_type, grid=(spec.rows,), name="norm_quant", num_warps=16 if spec.width > 2048 else 4,
        **triton_options(), WIDTH=spec.width, GROUPS=groups, PADDED=triton.next_power_of_2(groups), EPS=spec.eps,
        ADD=spec.add, NORM=spec.norm, QUANT=spec.quantize,
    )  # fmt: skip
    results = (total,) if spec.add else ()
    if not spec.quantize:
        return *results, out
    return *results, jax.lax.bitcast_convert_type(out, jnp.float8_e4m3fn), scales
