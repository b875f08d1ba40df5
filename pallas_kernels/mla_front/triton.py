"""MLA front in Triton; portable from SM80 to SM120.

The norm and q_b are one launch of fp8_linear. What is written here is the other: programs that absorb W_UK, and beside them
programs that rotate the rope part and that write the rows of the latent cache. W_UK is streamed once; a program has all its loads
in flight before it uses the first.
"""

from __future__ import annotations

from typing import Any

import jax
import jax_triton
import triton
import triton.language as tl

from pallas_kernels import fp8_linear, latent_write
from pallas_kernels.blocks import Weight
from pallas_kernels.latent_write.triton import write_row
from pallas_kernels.layer_index import layer_argument
from pallas_kernels.layer_triton import layer_of
from pallas_kernels.loaded_triton import loaded
from pallas_kernels.lowering import triton_options
from pallas_kernels.mla_front.spec import Spec

# Pairs of a row and a head that one program rotates.
_ROTATED = tl.constexpr(32)


@triton.jit
def _rotate(
    q, cos, sin, out, first, TOTAL: tl.constexpr,
    HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, LATENT: tl.constexpr,
):  # fmt: skip
    """Rotates the rope part of some of the TOTAL = rows * heads queries."""
    which = first + tl.arange(0, _ROTATED)
    mask, row = (which < TOTAL)[:, None], which // HEADS
    pair = tl.arange(0, ROPE // 2)[None, :]
    # Pairs are loaded as words: three loads of one layout, all in flight together.
    words = (q + NOPE).to(tl.pointer_type(tl.int32)) + which[:, None] * ((NOPE + ROPE) // 2) + pair
    both = tl.load(words, mask=mask, other=0)
    co = tl.load(cos + row[:, None] * (ROPE // 2) + pair, mask=mask, other=0.0)
    si = tl.load(sin + row[:, None] * (ROPE // 2) + pair, mask=mask, other=0.0)
    even = (both << 16).to(tl.float32, bitcast=True)
    odd = (both & -65536).to(tl.float32, bitcast=True)
    low = (even * co - odd * si).to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    high = (odd * co + even * si).to(tl.bfloat16).to(tl.int16, bitcast=True).to(tl.int32) << 16
    words = (out + LATENT).to(tl.pointer_type(tl.int32)) + which[:, None] * ((LATENT + ROPE) // 2) + pair
    tl.store(words, low | high, mask=mask)


@triton.jit
def _absorb_row(
    q, w_uk, layer, head, column, out,
    HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, LATENT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One row by vector instructions: chunks of 64 rows of W_UK, all loaded before the first is used."""
    inner = tl.arange(0, 64)
    start = (layer * HEADS + head) * NOPE * LATENT
    chunks = ()
    for k in tl.static_range(0, NOPE, 64):
        at = w_uk + start + (k + inner)[:, None] * LATENT + column[None, :]
        chunks = chunks + (tl.load(at, eviction_policy="evict_first"),)  # noqa: RUF005 (Triton knows no unpacking)
    total = tl.zeros([64, BC], tl.float32)
    for k in tl.static_range(0, NOPE, 64):
        a = tl.load(q + head * (NOPE + ROPE) + k + inner).to(tl.float32)
        total += chunks[k // 64].to(tl.float32) * a[:, None]
    tl.store(out + head * (LATENT + ROPE) + column, tl.sum(total, 0).to(tl.bfloat16))


@triton.jit
def _absorb_rows(
    q, w_uk, layer, head, column, out, row,
    ROWS: tl.constexpr, HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, LATENT: tl.constexpr,
    BC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A block of rows by matrix instructions; BK is NOPE padded to a power of two, so that all loads are in flight together."""
    inner = tl.arange(0, BK)
    live, deep = (row < ROWS)[:, None], inner < NOPE
    at_q = q + ((row * HEADS + head) * (NOPE + ROPE))[:, None]
    start = (layer * HEADS + head) * NOPE * LATENT
    a = tl.load(at_q + inner[None, :], mask=live & deep[None, :], other=0.0)
    b = tl.load(w_uk + start + inner[:, None] * LATENT + column[None, :], mask=deep[:, None], other=0.0)
    tl.debug_barrier()  # see ``loaded``
    at_out = out + ((row * HEADS + head) * (LATENT + ROPE))[:, None]
    tl.store(at_out + column[None, :], tl.dot(loaded(a), loaded(b)).to(tl.bfloat16), mask=live)


@triton.jit
def absorb_kernel(
    q, w_uk, layer, cos, sin, kv_a, kv_norm, slots, cache, out,
    ROWS: tl.constexpr, HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, LATENT: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, WRITES: tl.constexpr, ROTATES: tl.constexpr, CAPACITY: tl.constexpr,
    WIDTH: tl.constexpr, QUANT: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Grid: WRITES programs write a latent row each, ROTATES rotate; then row blocks, heads, latent tiles (fastest).

    q [rows, heads, nope + rope] -> out [rows, heads, latent + rope]. What a variant has no use for is a dummy.
    """
    program = tl.program_id(0)
    if WRITES > 0:  # noqa: SIM102 (known when it is compiled)
        if program < WRITES:
            write_row(kv_a, kv_norm, cache, layer, slots, cos, sin, program, EPS, CAPACITY, WIDTH, QUANT)
            return
    program -= WRITES
    if program < ROTATES:
        _rotate(q, cos, sin, out, program * _ROTATED, ROWS * HEADS, HEADS, NOPE, ROPE, LATENT)
        return
    program -= ROTATES
    which = layer_of(layer).to(tl.int64)
    TILES: tl.constexpr = LATENT // BC
    head, column = program // TILES % HEADS, program % TILES * BC + tl.arange(0, BC)
    if ROWS == 1:
        _absorb_row(q, w_uk, which, head, column, out, HEADS, NOPE, ROPE, LATENT, BC)
    else:
        row = program // (TILES * HEADS) * BM + tl.arange(0, BM)
        _absorb_rows(q, w_uk, which, head, column, out, row, ROWS, HEADS, NOPE, ROPE, LATENT, BC, BK)


def absorb(
    spec: Spec,
    q: jax.Array,
    w_uk: jax.Array,
    layer: int | jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    cache: Any = None,
    key: tuple[jax.Array, ...] = (),
) -> tuple[jax.Array, ...]:
    """q [rows, heads * (nope + rope)] -> absorbed query [rows, heads, kv_lora_rank + rope]; with a key (kv_a, kv_norm, slots) also
    the cache with its rows written."""
    kv_a, kv_norm, slots = key or (q, q, q)
    target = jax.new_ref(cache) if key else q
    rows, columns = tile(spec)
    tiles = spec.kv_lora_rank // columns * spec.heads * -(-spec.rows // rows)
    writes, rotates = spec.rows if key else 0, -(-spec.rows * spec.heads // _ROTATED.value)
    query = jax_triton.triton_call(
        q, w_uk, layer_argument(layer), cos, sin, kv_a, kv_norm, slots, target, kernel=absorb_kernel,
        out_type=jax.ShapeDtypeStruct((spec.rows, spec.heads, spec.kv_lora_rank + spec.rope), q.dtype),
        grid=(writes + rotates + tiles,), name="mla_absorb", num_warps=4, **triton_options(),
        ROWS=spec.rows, HEADS=spec.heads, NOPE=spec.nope, ROPE=spec.rope, LATENT=spec.kv_lora_rank, BM=rows, BC=columns,
        BK=triton.next_power_of_2(spec.nope), WRITES=writes, ROTATES=rotates, CAPACITY=spec.pages * 64, WIDTH=spec.width,
        QUANT=spec.cache_dtype == "uint8", EPS=spec.eps,
    )  # fmt: skip
    return (query, jax.freeze(target)) if key else (query,)


def tile(spec: Spec) -> tuple[int, int]:
    """(rows, latents) of a program; a shard of the heads needs smaller tiles to give every SM a part."""
    few = spec.heads * spec.kv_lora_rank // 64 < 132
    return 1 if spec.rows == 1 else 16 if spec.rows <= 16 else 64, 32 if few and spec.rows <= 16 else 64


def run(
    spec: Spec,
    q_a: jax.Array,
    norm: jax.Array,
    q_b: Weight,
    w_uk: jax.Array,
    layer: int | jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    cache: Any = None,
    key: tuple[jax.Array, ...] = (),
) -> tuple[jax.Array, ...]:
    normed = fp8_linear.norm_linears(q_a, norm, (q_b,), (layer,), eps=spec.eps, arithmetic=spec.arithmetic)
    _, latent, (q,) = normed
    if not key or spec.writes_here:
        return latent, *absorb(spec, q, w_uk, layer, cos, sin, cache, key)
    kv_a, kv_norm, slots = key
    cache = latent_write.write(kv_a, kv_norm, cache, layer, slots, cos, sin, eps=spec.eps)
    return latent, *absorb(spec, q, w_uk, layer, cos, sin), cache
