"""Hopper kernel, second part: scores with softmax (one warpgroup) and values (two warpgroups).

An FP8 latent is exact in e4m3 and in bfloat16, so nothing is dequantized into shared memory:
  * scores: raw e4m3 keys times the query as a sum of two e4m3 terms, a product a group of 128 latents, each scaled afterwards
    by its key's scale (a row of the accumulator, because keys are the rows: heads need no padding to 64);
  * values: transposed, latents times keys: the words of two keys are shuffled in registers into bfloat16 pairs and multiplied
    by the scales' two parts, which is the layout of the left operand.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from pallas_kernels.gluon_layer import layer_of
from pallas_kernels.sparse_mla.gluon_load import BYTES, FLAT, HALVES, query_half

# 16 keys x 32 words (one group): pairs of registers are neighbouring keys, as the left operand wants them.
_CHUNK = gl.constexpr(
    gl.DistributedLinearLayout(
        [[1, 0], [8, 0]], [[2, 0], [4, 0], [0, 1], [0, 2], [0, 4]], [[0, 8], [0, 16]], [], [16, 32]
    )
)
_CHUNK_KEYS = gl.constexpr(gl.SliceLayout(1, _CHUNK.value))
# Scales [64 keys, 4 groups]: a thread has two keys of one group; or one group of the accumulator's rows.
_PAIR = gl.constexpr(
    gl.DistributedLinearLayout([[1, 0]], [[2, 0], [4, 0], [8, 0], [16, 0], [32, 0]], [[0, 1], [0, 2]], [], [64, 4])
)
_COLUMN = gl.constexpr(
    gl.DistributedLinearLayout([[8, 0]], [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 1])
)
_FLAGS = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))
_TOTALS = gl.constexpr(gl.BlockedLayout([32, 1], [1, 32], [1, 4], [1, 0]))

# Words of two neighbouring keys ($4, $5) -> a bfloat16 pair for each of their four latents, times high ($6) + low ($7).
# prmt copies a byte and, above it, its sign: shifted left by 4, sign and magnitude stand where bfloat16 has them
# (value * 2^-120, subnormals included). high + low, two parts of the scale times 2^100, round once.
_VALUE_PAIRS = gl.constexpr("""{
 .reg .b32 t0, t1, t2, t3, u0, u1, u2, u3, z;
 mov.b32 z, 0x80008000;
 prmt.b32 t0, $4, $5, 0xC480;
 prmt.b32 t1, $4, $5, 0xD591;
 prmt.b32 t2, $4, $5, 0xE6A2;
 prmt.b32 t3, $4, $5, 0xF7B3;
 shl.b32 t0, t0, 4;
 shl.b32 t1, t1, 4;
 shl.b32 t2, t2, 4;
 shl.b32 t3, t3, 4;
 and.b32 t0, t0, 0x87f087f0;
 and.b32 t1, t1, 0x87f087f0;
 and.b32 t2, t2, 0x87f087f0;
 and.b32 t3, t3, 0x87f087f0;
 fma.rn.bf16x2 u0, t0, $7, z;
 fma.rn.bf16x2 u1, t1, $7, z;
 fma.rn.bf16x2 u2, t2, $7, z;
 fma.rn.bf16x2 u3, t3, $7, z;
 fma.rn.bf16x2 $0, t0, $6, u0;
 fma.rn.bf16x2 $1, t1, $6, u1;
 fma.rn.bf16x2 $2, t2, $6, u2;
 fma.rn.bf16x2 $3, t3, $6, u3;
}""")


@gluon.constexpr_function
def _mma(N, K):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, K])


@gluon.constexpr_function
def _out_layout(N):
    """[N heads, 128 latents]: what a thread has of the accumulators, four latents in a row."""
    heads = [[8 << i, 0] for i in range((N // 8).bit_length() - 1)]
    lanes = [[2, 0], [4, 0], [0, 4], [0, 8], [0, 16]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [1, 0], *heads], lanes, [[0, 32], [0, 64]], [], [N, 128])


@gluon.jit
def _partial_sum(weight, N: gl.constexpr):
    """[64 keys, N] -> [32, N]: sums only what one thread holds."""
    return gl.sum(weight.reshape([4, 2, 8, N]), 1).reshape([32, N])


@gluon.jit
def _start_group(keys, query, first, group: gl.constexpr, N: gl.constexpr):
    """Starts the product of one group of latents with both terms of the query: [64 keys, N]."""
    zero = gl.full([64, N], 0.0, gl.float32, _mma(N, 32))
    a = keys.slice(group * 128, 128, 1)
    one = query.index(first).slice(group * 128, 128, 1).permute((1, 0))
    two = query.index(first + 1).slice(group * 128, 128, 1).permute((1, 0))
    part = hopper.warpgroup_mma(a, one, zero, use_acc=False, is_async=True)
    return hopper.warpgroup_mma(a, two, part, is_async=True)


@gluon.jit
def _row_scale(scale, group: gl.constexpr, LAYOUT: gl.constexpr):
    return gl.convert_layout(gl.sum(scale.slice(group, 1, 1).load(_COLUMN), 1), gl.SliceLayout(1, LAYOUT))[:, None]


@gluon.jit
def _publish_scales(scale, highs, lows):
    """The two bfloat16 parts of a tile's scales, times 2^100."""
    s = scale.load(_PAIR) * 1.2676506002282294e30
    high = s.to(gl.bfloat16)
    low = (s - high.to(gl.float32)).to(gl.bfloat16)
    highs.store(high.permute((1, 0)).reshape([256]))
    lows.store(low.permute((1, 0)).reshape([256]))


@gluon.jit
def _scores(keys, rope_keys, scale, query, query_rope, highs, lows, writable, turn, first, N: gl.constexpr):
    """float32 [64 keys, N] of one tile, before the heads' factors."""
    S: gl.constexpr = _mma(N, 32)
    x = gl.full([64, N], 0.0, gl.float32, _mma(N, 16))
    x = hopper.warpgroup_mma(rope_keys, query_rope.permute((1, 0)), x, use_acc=False, is_async=True)
    part = _start_group(keys, query, first, 0, N)
    if N <= 32:
        # All products in flight; of 64 heads one at a time: with two this warpgroup needs 160 registers.
        part1 = _start_group(keys, query, first, 1, N)
        part2 = _start_group(keys, query, first, 2, N)
        part3 = _start_group(keys, query, first, 3, N)
        hopper.mbarrier.wait(writable, turn)
        _publish_scales(scale, highs, lows)
        s0 = _row_scale(scale, 0, S)
        s1 = _row_scale(scale, 1, S)
        s2 = _row_scale(scale, 2, S)
        s3 = _row_scale(scale, 3, S)
        x, part, part1, part2, part3 = hopper.warpgroup_mma_wait(0, deps=[x, part, part1, part2, part3])
        x = gl.convert_layout(x, S) + part * s0
        x += part1 * s1
        x += part2 * s2
        x += part3 * s3
        return x
    hopper.mbarrier.wait(writable, turn)
    _publish_scales(scale, highs, lows)
    x, part = hopper.warpgroup_mma_wait(0, deps=[x, part])
    x = gl.convert_layout(x, S) + part * _row_scale(scale, 0, S)
    for group in gl.static_range(1, 4):
        part = _start_group(keys, query, first, group, N)
        factor = _row_scale(scale, group, S)
        part = hopper.warpgroup_mma_wait(0, deps=[part])
        x += part * factor
    return x


@gluon.jit
def _warps_above(y, limit, N: gl.constexpr):
    """int32 [4]: whether a warp has any of y [64 keys, N] above the limit."""
    y = y.reshape([4, 2, 8, N // 8, 4, 2]).permute((0, 2, 4, 1, 3, 5)).reshape([4, 32, N // 2])  # warp, lane, own
    over = gl.max(y, 2) > limit
    # Of integers in all lanes of a warp: one redux instruction, where the maximum of floats takes five shuffles.
    return gl.max(over.to(gl.int32), 1)


@gluon.jit
def score(
    at, end, layer, first_head, lse, latents, ropes, scales, picks, query, query_rope, factors, weights, highs, lows,
    alphas, final, bases, totals, flags, full, free, p_full, p_free, q_full, done,
    HEADS: gl.constexpr, N: gl.constexpr, CAPACITY: gl.constexpr, OUT_FACTOR: gl.constexpr, LSE_FACTOR: gl.constexpr,
    TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores and softmax weights of every tile; log-sums at the end. The references outlive a tile in shared memory."""
    S: gl.constexpr = _mma(N, 32)
    rows: gl.constexpr = gl.SliceLayout(1, S)
    heads: gl.constexpr = gl.SliceLayout(0, S)
    keys = latents._reinterpret(gl.float8e4nv, [STAGES, 64, 512], BYTES)
    rope_keys = ropes._reinterpret(gl.bfloat16, [STAGES, 64, 64], HALVES)
    key_scales = scales._reinterpret(gl.float32, [STAGES, 64, 4], FLAT)
    bases.store(gl.full([N], 0.0, gl.float32, heads))
    sums = _partial_sum(gl.full([64, N], 0.0, gl.float32, S), N)
    SUMS: gl.constexpr = sums.type.layout
    unknown = layer_of(layer)
    started = False
    stage = 0
    phase = 0
    hopper.mbarrier.wait(q_full, 0)
    for i in range(TILES):
        hopper.mbarrier.wait(full.index(stage), phase)
        # The copies wrote through the generic proxy, the products read through the other one.
        hopper.fence_async_shared()
        # Slots come through shared memory: a load from global memory under way holds up a fence.
        slot = picks.index(stage).load(rows)
        valid = (slot >= 0) & (slot < CAPACITY) & (at + i * 64 + gl.arange(0, 64, rows) < end)
        # 0, but not to the compiler: else it keeps 36 descriptors across the loop, and spills them.
        zero = (unknown + i) >> 30
        x = _scores(
            keys.index(stage), rope_keys.index(stage), key_scales.index(stage), query, query_rope,
            highs.index(i & 1), lows.index(i & 1), p_free.index(i & 1), ((i >> 1) & 1) ^ 1, zero, N,
        )  # fmt: skip
        base = bases.load(heads)
        y = gl.where(valid[:, None], x * factors.load(heads)[None, :] - base[None, :], float("-inf"))
        # The first tile's peaks stay the reference until a score passes them by 2^60: until then no sum is rescaled.
        flags.store(_warps_above(y, gl.where(started, 60.0, float("-inf")), N))
        gl.thread_barrier()
        hopper.mbarrier.arrive(free.index(stage), count=1)
        alpha = gl.full([N], 1.0, gl.float32, heads)
        if gl.max(flags.load(_FLAGS), 0) > 0:
            top = gl.max(y, 0)
            risen = base + gl.where(started, gl.maximum(top, 0.0), top)
            y -= (risen - base)[None, :]
            alpha = gl.where(started, gl.exp2(base - risen), 0.0)
            bases.store(risen)
            sums *= gl.convert_layout(alpha, gl.SliceLayout(0, SUMS))[None, :]
            started = True
        weight = gl.exp2(y)
        weights.index(i & 1).store(weight.to(gl.bfloat16))
        alphas.index(i & 1).store(alpha)
        hopper.fence_async_shared()
        gl.thread_barrier()
        hopper.mbarrier.arrive(p_full.index(i & 1), count=1)
        sums += _partial_sum(weight, N)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1

    totals.store(sums)
    total = gl.convert_layout(gl.sum(totals.load(_TOTALS), 0), heads)
    final.store(OUT_FACTOR / gl.where(total > 0, total, 1.0))
    gl.thread_barrier()
    hopper.mbarrier.arrive(done, count=1)
    head = first_head + gl.arange(0, N, heads)
    gl.store(lse + head, (bases.load(heads) + gl.log2(total)) * LSE_FACTOR, mask=head < HEADS)


@gluon.jit
def _values(words, highs, lows, group: gl.constexpr, part: gl.constexpr, DOT: gl.constexpr):
    """bfloat16 [128 latents, 16 keys] as the left operand, times 2^-20; words: int32 [64, 128] of the tile."""
    x = words.slice(group * 32, 32, 1).slice(part * 16, 16, 0).load(_CHUNK)
    high = highs.slice(group * 64 + part * 16, 16, 0).load(_CHUNK_KEYS)
    low = lows.slice(group * 64 + part * 16, 16, 0).load(_CHUNK_KEYS)
    v0, v1, v2, v3 = gl.inline_asm_elementwise(
        _VALUE_PAIRS, "=&r,=&r,=&r,=&r,r,r,r,r", [x, high[:, None], low[:, None]],
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16), is_pure=True, pack=2,
    )  # fmt: skip
    # Latent 4 * word + 2 * tile + b becomes row 64 * tile + 16 * warp + 8 * b + word % 8: no value changes its thread.
    v = gl.join(gl.join(v0, v1), gl.join(v2, v3)).reshape([16, 4, 8, 2, 2])  # key, warp, word, b, tile
    return gl.convert_layout(v.permute((4, 1, 3, 2, 0)).reshape([128, 16]), DOT)


@gluon.jit
def _store(acc, factor, context, first_head, group: gl.constexpr, HEADS: gl.constexpr, N: gl.constexpr):
    OUT: gl.constexpr = _out_layout(N)
    x = (acc * factor[None, :]).reshape([2, 4, 2, 8, N]).permute((4, 1, 3, 0, 2)).reshape([N, 128])
    x = gl.convert_layout(x, OUT).to(context.dtype.element_ty)
    head = first_head + gl.arange(0, N, gl.SliceLayout(1, OUT))
    column = group * 128 + gl.arange(0, 128, gl.SliceLayout(0, OUT))
    gl.store(context + head[:, None] * 512 + column[None, :], x, mask=(head < HEADS)[:, None])


@gluon.jit
def multiply(
    q, first_head, context, latents, query, query_rope, factors, weights, highs, lows, alphas, final,
    full, free, p_full, p_free, q_full, done,
    PART: gl.constexpr, HEADS: gl.constexpr, N: gl.constexpr, SCALE_LOG2: gl.constexpr,
    TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Half of the query at the start, then groups 2 * PART and 2 * PART + 1 of the context, latents as rows."""
    query_half(q, first_head, PART * (N // 2), query, query_rope, factors, HEADS, N // 2, SCALE_LOG2)
    hopper.mbarrier.arrive(q_full, count=1)
    V: gl.constexpr = _mma(N, 16)
    DOT: gl.constexpr = gl.DotOperandLayout(0, V, 2)
    heads: gl.constexpr = gl.SliceLayout(0, V)
    acc0 = gl.full([128, N], 0.0, gl.float32, V)
    acc1 = gl.full([128, N], 0.0, gl.float32, V)
    stage = 0
    phase = 0
    for i in range(TILES):
        hopper.mbarrier.wait(full.index(stage), phase)
        hopper.mbarrier.wait(p_full.index(i & 1), (i >> 1) & 1)
        alpha = alphas.index(i & 1).load(heads)
        if gl.min(alpha, 0) < 1.0:
            acc0 = acc0 * alpha[None, :]
            acc1 = acc1 * alpha[None, :]
        words, high, low = latents.index(stage), highs.index(i & 1), lows.index(i & 1)
        weight = weights.index(i & 1)
        # Two products in flight while the next operand is made; more would not fit the registers.
        a0 = _values(words, high, low, PART * 2, 0, DOT)
        acc0 = hopper.warpgroup_mma(a0, weight.slice(0, 16, 0), acc0, is_async=True)
        a1 = _values(words, high, low, PART * 2 + 1, 0, DOT)
        acc1 = hopper.warpgroup_mma(a1, weight.slice(0, 16, 0), acc1, is_async=True)
        for part in gl.static_range(1, 4):
            b0 = _values(words, high, low, PART * 2, part, DOT)
            acc0, a0 = hopper.warpgroup_mma_wait(1, deps=[acc0, a0])
            acc0 = hopper.warpgroup_mma(b0, weight.slice(part * 16, 16, 0), acc0, is_async=True)
            b1 = _values(words, high, low, PART * 2 + 1, part, DOT)
            if part == 3:
                gl.thread_barrier()
                hopper.mbarrier.arrive(free.index(stage), count=1)
            acc1, a1 = hopper.warpgroup_mma_wait(1, deps=[acc1, a1])
            acc1 = hopper.warpgroup_mma(b1, weight.slice(part * 16, 16, 0), acc1, is_async=True)
            a0, a1 = b0, b1
        acc0, acc1 = hopper.warpgroup_mma_wait(0, deps=[acc0, acc1])
        gl.thread_barrier()
        hopper.mbarrier.arrive(p_free.index(i & 1), count=1)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    hopper.mbarrier.wait(done, 0)
    factor = final.load(heads)
    _store(acc0, factor, context, first_head, PART * 2, HEADS, N)
    _store(acc1, factor, context, first_head, PART * 2 + 1, HEADS, N)
