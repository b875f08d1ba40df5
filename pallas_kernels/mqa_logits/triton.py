"""MQA logits in Triton: portable from SM80 to SM120.

A program scores an equal share of the pages that a group of up to eight queries of one sequence sees: [64 keys, 128] times
[128, queries * heads], relu, weights, and a sum over the heads. From SM89 on both operands stay e4m3; before, e4m3 bits are
shifted into float16 (times 2^-8, subnormals included, so nothing is rounded) and multiplied there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax_triton
import triton.language as tl
from triton import jit

from pallas_kernels.lowering import default_arch, triton_options
from pallas_kernels.mqa_logits.plan import PortablePlan, make_portable_plan
from pallas_kernels.mqa_logits.spec import Spec

_PAGE_BYTES = tl.constexpr(64 * 132)


# Four e4m3 bytes -> four float16 times 2^-8: a byte moves to the upper half of its 16 bits, its magnitude one bit down.
_HALF = tl.constexpr("""{
 .reg .b32 t0, t1, m0, m1;
 prmt.b32 t0, $2, 0, 0x1404;
 prmt.b32 t1, $2, 0, 0x3424;
 shr.u32 m0, t0, 1;
 shr.u32 m1, t1, 1;
 and.b32 m0, m0, 0x3f803f80;
 and.b32 m1, m1, 0x3f803f80;
 and.b32 t0, t0, 0x80008000;
 and.b32 t1, t1, 0x80008000;
 or.b32 $0, m0, t0;
 or.b32 $1, m1, t1;
}""")


@jit
def _half(bits):
    """e4m3 bits -> float16 times 2^-8; the two NaN codes become 480 * 2^-8."""
    return tl.inline_asm_elementwise(_HALF, "=&r,=&r,r", [bits], dtype=tl.float16, is_pure=True, pack=4)


@jit
def logits_kernel(
    q, weights, cache, layer, table, lengths, starts, out,
    WIDTH: tl.constexpr, TABLE: tl.constexpr, PAGES: tl.constexpr, STARTS: tl.constexpr, HEADS: tl.constexpr,
    QUERIES: tl.constexpr, LANES: tl.constexpr, NATIVE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (splits, groups of QUERIES, sequences)."""
    COLUMNS: tl.constexpr = QUERIES * HEADS
    SPAN: tl.constexpr = TABLE * 64
    EACH: tl.constexpr = 8 // LANES
    split, splits, sequence = tl.program_id(0), tl.num_programs(0), tl.program_id(2)
    row = sequence * WIDTH + tl.program_id(1) * QUERIES
    count = tl.minimum(QUERIES, WIDTH - tl.program_id(1) * QUERIES)
    # Eight neighbouring columns belong to LANES queries: in the accumulators of a warp a lane then holds few queries.
    column = tl.arange(0, COLUMNS)
    tile, inside = column // (LANES * HEADS), column % (LANES * HEADS)
    query = tl.minimum(tile * LANES + (inside % 8) // EACH, count - 1)
    head = (inside // 8) * EACH + inside % EACH
    at = (row + query) * HEADS + head
    feature = tl.arange(0, 128)
    bits = tl.load(q + at.to(tl.int64)[None, :] * 128 + feature[:, None])
    if NATIVE:
        queries = bits.to(tl.float8e4nv, bitcast=True)
    else:
        queries = tl.where((bits & 0x7F) == 0x7F, float("nan"), _half(bits) * 256.0).to(tl.float16)
    weight = tl.load(weights + at)
    own = tl.arange(0, QUERIES)
    length = tl.minimum(tl.load(lengths + row + own, mask=own < count, other=0), SPAN)
    begin = tl.maximum(tl.load(starts + row + own, mask=own < count, other=SPAN), 0) if STARTS else length * 0
    first = tl.min(begin, 0) // 64
    pages = tl.maximum((tl.max(length, 0) + 63) // 64 - first, 0).to(tl.int64)
    low = first + (pages * split // splits).to(tl.int32)
    high = first + (pages * (split + 1) // splits).to(tl.int32)
    base = tl.load(layer).to(tl.int64) * (PAGES * _PAGE_BYTES)
    table += sequence.to(tl.int64) * TABLE
    key = tl.arange(0, 64)
    out += (row + own).to(tl.int64)[None, :] * SPAN
    for page in tl.range(low, high, num_stages=STAGES):
        page_id = tl.minimum(tl.maximum(tl.load(table + page), 0), PAGES - 1)
        start = cache + base + page_id.to(tl.int64) * _PAGE_BYTES
        raw = tl.load(start + key[:, None] * 128 + feature[None, :])
        scale = tl.load((start + 64 * 128).to(tl.pointer_type(tl.float32)) + key)
        if NATIVE:
            dots = tl.dot(raw.to(tl.float8e4nv, bitcast=True), queries)
        else:
            dots = tl.dot(_half(raw), queries)
            scale = scale * 256.0
        heads = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL) * weight[None, :]
        heads = heads.reshape(64, QUERIES // LANES, LANES * HEADS // 8, LANES, EACH)
        score = tl.sum(tl.sum(heads, 2), 3).reshape(64, QUERIES) * scale[:, None]
        position = page * 64 + key
        live = (position[:, None] >= begin[None, :]) & (position[:, None] < length[None, :])
        tl.store(out + position[:, None], score, mask=live)


def run(
    spec: Spec, q: jax.Array, weights: jax.Array, cache: jax.Array, layer: jax.Array, table: jax.Array, lengths: jax.Array,
    starts: jax.Array | None, plan: PortablePlan | None = None,
) -> jax.Array:  # fmt: skip
    arch = default_arch()
    plan = plan or make_portable_plan(spec, arch)
    return jax_triton.triton_call(
        jax.lax.bitcast_convert_type(q, jnp.uint8), weights, cache, layer.reshape(1), table, lengths,
        lengths if starts is None else starts,
        kernel=logits_kernel, out_type=jax.ShapeDtypeStruct((spec.rows, spec.width, spec.span), jnp.float32),
        grid=(plan.splits, -(-spec.width // plan.queries), spec.rows), name="mqa_logits", num_warps=plan.warps,
        num_stages=plan.stages, **triton_options(),
        WIDTH=spec.width, TABLE=spec.table, PAGES=spec.pages, STARTS=starts is not None, HEADS=spec.heads,
        QUERIES=plan.queries, LANES=plan.lanes, NATIVE=arch is None or arch.sm >= 89, STAGES=plan.stages,
    )  # fmt: skip
