"""Latent write in Triton, one program a row; portable from SM80 to SM120."""

from __future__ import annotations

import jax
import jax_triton
import triton
import triton.language as tl

from pallas_kernels.e4m3_triton import quantize_rows
from pallas_kernels.latent_write.spec import Spec
from pallas_kernels.layer_index import layer_argument
from pallas_kernels.layer_triton import layer_of
from pallas_kernels.lowering import triton_options


@triton.jit
def write_row(
    kv_a, norm, cache, layer, slots, cos, sin, row,
    EPS: tl.constexpr, CAPACITY: tl.constexpr, WIDTH: tl.constexpr, QUANT: tl.constexpr,
):  # fmt: skip
    """Writes one row into ``cache``, by all warps of a program; nothing where its slot is out of the cache.

    Everything is loaded before anything is used or decided: the row's time is one memory latency, not four.
    """
    slot, which = tl.load(slots + row), layer_of(layer)
    group, lane = tl.arange(0, 4)[:, None], tl.arange(0, 128)[None, :]
    column = group * 128 + lane
    pair = tl.arange(0, 32)
    x = tl.load(kv_a + row * 576 + column).to(tl.float32)
    even = tl.load(kv_a + row * 576 + 512 + 2 * pair).to(tl.float32)
    odd = tl.load(kv_a + row * 576 + 513 + 2 * pair).to(tl.float32)
    co, si = tl.load(cos + row * 32 + pair), tl.load(sin + row * 32 + pair)
    weight = tl.load(norm + which * 512 + column).to(tl.float32)
    mean = tl.sum(tl.sum(x * x, 1), 0) / 512.0
    c = (x * tl.rsqrt(mean + EPS) * weight).to(tl.bfloat16)
    first, second = (even * co - odd * si).to(tl.bfloat16), (odd * co + even * si).to(tl.bfloat16)
    if (slot >= 0) & (slot < CAPACITY):
        base = (which.to(tl.int64) * CAPACITY + slot) * WIDTH
        if QUANT:
            bits, scale = quantize_rows(c.to(tl.float32))
            tl.store(cache + base + column, bits.to(tl.uint8))
            scales = (cache + base + 512).to(tl.pointer_type(tl.float32))
            tl.store(scales + tl.arange(0, 4), scale)
            keys = (cache + base + 528).to(tl.pointer_type(tl.bfloat16))
        else:
            tl.store(cache + base + column, c)
            keys = cache + base + 512
        tl.store(keys + 2 * pair, first)
        tl.store(keys + 2 * pair + 1, second)


@triton.jit
def write_kernel(
    kv_a, norm, cache, layer, slots, cos, sin,
    EPS: tl.constexpr, CAPACITY: tl.constexpr, WIDTH: tl.constexpr, QUANT: tl.constexpr,
):  # fmt: skip
    """Grid (rows,)."""
    write_row(kv_a, norm, cache, layer, slots, cos, sin, tl.program_id(0), EPS, CAPACITY, WIDTH, QUANT)


def run(
    spec: Spec,
    kv_a: jax.Array,
    norm: jax.Array,
    cache: jax.Array,
    layer: int | jax.Array,
    slots: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
) -> jax.Array:
    target = jax.new_ref(cache)
    jax_triton.triton_call(
        kv_a, norm, target, layer_argument(layer), slots, cos, sin, kernel=write_kernel, out_type=(),
        grid=(spec.rows,), name="latent_write", num_warps=4, **triton_options(),
        EPS=spec.eps, CAPACITY=spec.pages * 64, WIDTH=spec.width, QUANT=spec.cache_dtype == "uint8",
    )  # fmt: skip
    return jax.freeze(target)
