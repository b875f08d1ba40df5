"""Sparse MLA of few heads for Hopper in Gluon: a program has one tile of keys and H heads, 8 or 16; all keys under way at once.

Triton's kernel pads eight heads to sixteen, loads a tile in four dependent rounds and keeps it in bfloat16. Here keys are the
rows of the first product and latents those of the second, so that heads are a product's columns, and nothing is dequantized:
  * rows are copied as they are into shared memory, all of a tile before the first is used;
  * e4m3 bytes become bfloat16 (times 2^-120) in the registers of a product's left operand, by moving bits; the query carries 2^100;
  * a key's scales multiply its scores (a product a group of 128 latents) and, for the second product, its weight, a group each.
"""

from __future__ import annotations

import math

import jax
import jax_triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from pallas_kernels import jax_gluon
from pallas_kernels.gluon_clusters import cluster_start, cluster_wait, own_memory
from pallas_kernels.gluon_layer import layer_of
from pallas_kernels.layer_index import layer_argument
from pallas_kernels.lowering import default_arch, triton_options
from pallas_kernels.sparse_mla.gluon_few_layouts import (
    FLAT,
    KEY_PAIRS,
    LEFT,
    MMA,
    QUERY_LINES,
    QUERY_ROPE_LINES,
    RIGHT,
    ROWS_OF_HALVES,
    ROWS_OF_WORDS,
    TIMES,
    VALUE_PAIRS,
    all_warps,
    key_words,
    latent_lines,
    out_words,
    query_words,
    rope_lines,
    rows_of_heads,
    scale_column,
    scale_lines,
    value_words,
    warps_with_keys,
)
from pallas_kernels.sparse_mla.gluon_few_merge import cluster_rank, send_log_sums, send_values, store_merged
from pallas_kernels.sparse_mla.plan import few_cluster, few_plan
from pallas_kernels.sparse_mla.spec import Spec
from pallas_kernels.sparse_mla.triton import LATENT_FACTOR, LOG2E, merge, outputs

jax_gluon.install()
# Of a latent row in the cache: 512 e4m3, 4 float32, 64 bfloat16.
_ROW_WORDS = gl.constexpr(164)
# 2^100 in the query and in the weights' scales, 2^-120 from the bytes: sums are times 2^-20.
_UP = gl.constexpr(2.0**100)
_DOWN = gl.constexpr(2.0**-20)


@gluon.jit
def _copy_query(q, query, query_rope, heads, H: gl.constexpr):
    """Starts copies of ``heads`` heads of the query, H at most: as loads, the compiler moves them behind the wait for the keys."""
    head = gl.arange(0, H, gl.SliceLayout(1, QUERY_LINES))
    at = (q + head * 576)[:, None] + gl.arange(0, 512, gl.SliceLayout(0, QUERY_LINES))[None, :]
    async_copy.async_copy_global_to_shared(query, at, mask=(head < heads)[:, None])
    head = gl.arange(0, H, gl.SliceLayout(1, QUERY_ROPE_LINES))
    at = (q + head * 576 + 512)[:, None] + gl.arange(0, 64, gl.SliceLayout(0, QUERY_ROPE_LINES))[None, :]
    async_copy.async_copy_global_to_shared(query_rope, at, mask=(head < heads)[:, None])


@gluon.jit
def _copy_part(target, row, valid, first: gl.constexpr, WORDS: gl.constexpr, LINES: gl.constexpr):
    """Starts copies of WORDS words of every row, from ``first`` on; what is not selected becomes zero and is not read."""
    line = gl.convert_layout(row, gl.SliceLayout(1, LINES))[:, None]
    mask = gl.convert_layout(valid, gl.SliceLayout(1, LINES))[:, None]
    columns = first + gl.arange(0, WORDS, gl.SliceLayout(0, LINES))
    async_copy.async_copy_global_to_shared(target, line + columns[None, :], mask=mask)


@gluon.jit
def _copy(
    words,
    start,
    slots,
    at,
    tile,
    ropes,
    scales,
    K: gl.constexpr,
    CAPACITY: gl.constexpr,
    N: gl.constexpr,
    EARLY: gl.constexpr,
):
    """Starts all copies of the tile of N keys from position ``at`` on; EARLY: in four groups, of 128 latents each."""
    position = at + gl.arange(0, N, gl.SliceLayout(1, latent_lines(N)))
    slot = gl.load(slots + position, mask=position < K, other=-1)
    valid = (slot >= 0) & (slot < CAPACITY)
    row = words + (start + slot.to(gl.int64) * _ROW_WORDS)
    _copy_part(scales, row, valid, 128, 4, scale_lines(N))
    if EARLY:
        _copy_part(ropes, row, valid, 132, 32, rope_lines(N))
        for group in gl.static_range(4):
            _copy_part(tile.slice(group * 32, 32, 1), row, valid, group * 32, 32, rope_lines(N))
            async_copy.commit_group()
    else:
        _copy_part(tile, row, valid, 0, 128, latent_lines(N))
        _copy_part(ropes, row, valid, 132, 32, rope_lines(N))
        async_copy.commit_group()


@gluon.jit
def _await(group: gl.constexpr, EARLY: gl.constexpr):
    """Until a group of latents, and all before it, are there."""
    if EARLY or group == 0:
        async_copy.wait_group(3 - group if EARLY else 0)
        gl.thread_barrier()


@gluon.jit
def _query_group(query, group: gl.constexpr, H: gl.constexpr):
    """One group of the query [128 latents, H heads] as the right operand, times 2^100; latents in the order of _key_group."""
    x = query.slice(group * 128, 128, 1).load(query_words(H))
    x = gl.inline_asm_elementwise(TIMES, "=r,r", [x], dtype=gl.bfloat16, is_pure=True, pack=2)
    x = x.reshape([H, 8, 4, 2, 2]).permute((0, 1, 3, 2, 4)).reshape([H, 128])  # head, step, lane, half, parity
    return gl.convert_layout(x.permute((1, 0)), RIGHT)


@gluon.jit
def _key_group(words, group: gl.constexpr, N: gl.constexpr):
    """bfloat16 [N keys, 128 latents] as the left operand, times 2^-120; words: int32 [N, 128] of the tile.

    Latent 16 * step + 4 * lane + 2 * half + parity is column 16 * step + 8 * half + 2 * lane + parity: no value changes its thread.
    """
    x = words.slice(group * 32, 32, 1).load(key_words(N))
    v0, v1, v2, v3 = gl.inline_asm_elementwise(
        KEY_PAIRS, "=&r,=&r,=&r,=&r,r,r", [x],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=2,
    )  # fmt: skip
    # The pair's place, which was the lower bit of the step, is the parity now; that bit and the half are the asm's outputs.
    v = gl.join(gl.join(v0, v1), gl.join(v2, v3))
    v = v.reshape([N, 4, 2, 4, 2, 2])  # key, step / 2, parity, lane, half, step % 2
    return gl.convert_layout(v.permute((0, 1, 5, 4, 3, 2)).reshape([N, 128]), LEFT)


@gluon.jit
def _value_group(words, group: gl.constexpr, N: gl.constexpr):
    """bfloat16 [128 latents, N keys] as the left operand, times 2^-120; words: int32 [N, 128] of the tile."""
    x = words.slice(group * 32, 32, 1).load(value_words(N))
    v0, v1, v2, v3 = gl.inline_asm_elementwise(
        VALUE_PAIRS, "=&r,=&r,=&r,=&r,r,r", [x],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=2,
    )  # fmt: skip
    # Latent 4 * word + 2 * tile + b becomes row 64 * tile + 16 * warp + 8 * b + word % 8.
    v = gl.join(gl.join(v0, v1), gl.join(v2, v3)).reshape([N, 4, 8, 2, 2])  # key, warp, word, b, tile
    return gl.convert_layout(v.permute((4, 1, 3, 2, 0)).reshape([128, N]), LEFT)


@gluon.jit
def _store(
    values, weights, factor, context, heads, base, me, group: gl.constexpr, H: gl.constexpr, CLUSTER: gl.constexpr
):
    """The second product of one group [128 rows of _value_group, H heads], times the heads' factors, into context [heads, 512]
    or to the blocks of the cluster."""
    acc = mma_v2(values, weights.load(RIGHT), gl.full([128, H], 0.0, gl.float32, MMA))
    x = (acc * factor[None, :]).reshape([2, 4, 2, 8, H]).permute((4, 1, 3, 0, 2)).reshape([H, 128])
    x = gl.convert_layout(x, out_words(H))
    if CLUSTER > 1:
        send_values(x, base, me, group, H, CLUSTER)
    else:
        head = gl.arange(0, H, gl.SliceLayout(1, out_words(H)))
        column = group * 128 + gl.arange(0, 128, gl.SliceLayout(0, out_words(H)))
        x = x.to(context.dtype.element_ty)
        gl.store(context + (head * 512)[:, None] + column[None, :], x, mask=(head < heads)[:, None])


@gluon.jit
def _row_scale(scales, group: gl.constexpr, N: gl.constexpr):
    """float32 [N]: a group's scale of every key, where the products' rows are."""
    x = gl.sum(scales.slice(group, 1, 1).load(scale_column(N)), 1)
    return gl.convert_layout(x, gl.SliceLayout(1, MMA))


@gluon.jit
def few_kernel(
    q, cache, layer, slots, context, lse,
    HEADS: gl.constexpr, K: gl.constexpr, CAPACITY: gl.constexpr, SCALE_LOG2: gl.constexpr, OUT_FACTOR: gl.constexpr,
    SPLITS: gl.constexpr, N: gl.constexpr, H: gl.constexpr, LSE_FACTOR: gl.constexpr, CLUSTER: gl.constexpr,
    EARLY: gl.constexpr,
):  # fmt: skip
    """Grid (splits, rows, groups of H heads): N keys a program.

    context, lse: the outputs for one split, else partials [rows, splits / CLUSTER, heads, ...] of so many splits together; lse:
    log2 sums times LSE_FACTOR. EARLY: products of scores start while later latents are under way.
    """
    rows: gl.constexpr = gl.SliceLayout(1, MMA)
    heads: gl.constexpr = gl.SliceLayout(0, MMA)
    split, row = gl.program_id(0), gl.program_id(1).to(gl.int64)
    first_head = gl.program_id(2) * H
    heads_left = HEADS - first_head
    base, me = 0, 0
    if CLUSTER > 1:
        base = own_memory(H * 2052, H * 2052)
        cluster_start(CLUSTER)
        me = cluster_rank()
    tile = gl.allocate_shared_memory(gl.int32, [N, 128], ROWS_OF_WORDS)
    ropes = gl.allocate_shared_memory(gl.int32, [N, 32], ROWS_OF_WORDS)
    scale_words = gl.allocate_shared_memory(gl.int32, [N, 4], FLAT)
    query = gl.allocate_shared_memory(gl.bfloat16, [H, 512], ROWS_OF_HALVES)
    query_rope = gl.allocate_shared_memory(gl.bfloat16, [H, 64], ROWS_OF_HALVES)
    # An array each: of parts of one array the compiler would think that every store waits for the one before.
    p0 = gl.allocate_shared_memory(gl.bfloat16, [N, H], rows_of_heads(H))
    p1 = gl.allocate_shared_memory(gl.bfloat16, [N, H], rows_of_heads(H))
    p2 = gl.allocate_shared_memory(gl.bfloat16, [N, H], rows_of_heads(H))
    p3 = gl.allocate_shared_memory(gl.bfloat16, [N, H], rows_of_heads(H))
    G: gl.constexpr = warps_with_keys(N)
    peaks = gl.allocate_shared_memory(gl.float32, [G, H], FLAT)
    totals = gl.allocate_shared_memory(gl.float32, [G, H], FLAT)
    slots += row * K
    q += (row * HEADS + first_head) * 576
    at = split * N
    start = layer_of(layer).to(gl.int64) * (CAPACITY * _ROW_WORDS)
    position = at + gl.arange(0, N, rows)
    slot = gl.load(slots + position, mask=position < K, other=-1)
    valid = (slot >= 0) & (slot < CAPACITY)
    _copy_query(q, query, query_rope, heads_left, H)
    _copy(cache.to(gl.pointer_type(gl.int32)), start, slots, at, tile, ropes, scale_words, K, CAPACITY, N, EARLY)
    scales = scale_words._reinterpret(gl.float32, [N, 4], FLAT)
    zero = gl.full([N, H], 0.0, gl.float32, MMA)
    _await(0, EARLY)
    s0 = _row_scale(scales, 0, N)
    s1 = _row_scale(scales, 1, N)
    s2 = _row_scale(scales, 2, N)
    s3 = _row_scale(scales, 3, N)
    rope_keys = ropes._reinterpret(gl.bfloat16, [N, 64], ROWS_OF_HALVES).load(LEFT)
    x = mma_v2(rope_keys, query_rope.permute((1, 0)).load(RIGHT), zero) * _DOWN
    x += mma_v2(_key_group(tile, 0, N), _query_group(query, 0, H), zero) * s0[:, None]
    _await(1, EARLY)
    x += mma_v2(_key_group(tile, 1, N), _query_group(query, 1, H), zero) * s1[:, None]
    _await(2, EARLY)
    x += mma_v2(_key_group(tile, 2, N), _query_group(query, 2, H), zero) * s2[:, None]
    _await(3, EARLY)
    x += mma_v2(_key_group(tile, 3, N), _query_group(query, 3, H), zero) * s3[:, None]
    x = gl.where(valid[:, None], x * SCALE_LOG2, float("-inf"))
    # Half of the second product's keys are made while the warps wait for the peaks: 8 rows 11.7 us, 12.0 with none, 11.9 with all.
    v0 = _value_group(tile, 0, N)
    v1 = _value_group(tile, 1, N)
    peaks.store(gl.max(gl.max(x.reshape([N // (16 * G), G, 16, H]), 2), 0))
    gl.thread_barrier()
    peak = gl.convert_layout(gl.max(peaks.load(all_warps(G, H)), 0), heads)
    # Where nothing is selected the peak is -inf: subtract 0 there, or -inf - -inf makes NaN.
    weight = gl.exp2(x - gl.where(peak == float("-inf"), 0.0, peak)[None, :])
    up = weight * _UP
    p0.store((up * s0[:, None]).to(gl.bfloat16))
    p1.store((up * s1[:, None]).to(gl.bfloat16))
    p2.store((up * s2[:, None]).to(gl.bfloat16))
    p3.store((up * s3[:, None]).to(gl.bfloat16))
    totals.store(gl.sum(gl.sum(weight.reshape([N // (16 * G), G, 16, H]), 2), 0))
    gl.thread_barrier()
    total = gl.convert_layout(gl.sum(totals.load(all_warps(G, H)), 0), heads)
    factor = OUT_FACTOR / gl.where(total > 0, total, 1.0)
    log_sum = peak + gl.log2(total)
    out = (row * (SPLITS // CLUSTER) + split // CLUSTER) * HEADS + first_head
    context += out * 512
    lse += out
    if CLUSTER > 1:
        cluster_wait()
        send_log_sums(log_sum, base, me, heads, H, CLUSTER)
    _store(v0, p0, factor, context, heads_left, base, me, 0, H, CLUSTER)
    _store(v1, p1, factor, context, heads_left, base, me, 1, H, CLUSTER)
    _store(_value_group(tile, 2, N), p2, factor, context, heads_left, base, me, 2, H, CLUSTER)
    _store(_value_group(tile, 3, N), p3, factor, context, heads_left, base, me, 3, H, CLUSTER)
    if CLUSTER > 1:
        store_merged(context, lse, heads_left, base, me, LSE_FACTOR, H, CLUSTER)
    else:
        head = gl.arange(0, H, heads)
        gl.store(lse + head, log_sum * LSE_FACTOR, mask=head < heads_left)


def run(
    spec: Spec, q: jax.Array, cache: jax.Array, layer: int | jax.Array, slots: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(context, lse), or of up to 8 rows, where the caller takes them, parts with natural logs of their sums."""
    plan = few_plan(spec, default_arch())
    cluster = few_cluster(spec)
    splits = -(-plan.splits // cluster) * cluster
    parts = splits // cluster
    merged = parts > 1 and not (spec.apart and spec.rows <= 8)
    part, part_lse = jax_triton.triton_call(
        q, cache, layer_argument(layer), slots, kernel=few_kernel, out_type=outputs(spec, parts),
        grid=(splits, spec.rows, -(-spec.heads // plan.block_heads)), name="sparse_mla_split_few", num_warps=plan.warps,
        **triton_options(),
        HEADS=spec.heads, K=spec.k, CAPACITY=spec.capacity, SCALE_LOG2=spec.scale * LOG2E / LATENT_FACTOR,
        OUT_FACTOR=1 / LATENT_FACTOR, SPLITS=splits, N=plan.block_keys, H=plan.block_heads,
        LSE_FACTOR=1.0 if merged else math.log(2), CLUSTER=cluster, EARLY=plan.block_keys == 64 and spec.rows <= 8,
    )  # fmt: skip
    return merge(spec, parts, part, part_lse) if merged else (part, part_lse)
