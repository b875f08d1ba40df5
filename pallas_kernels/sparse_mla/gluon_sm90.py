"""Sparse MLA decode for Hopper in Gluon: 64 heads against FP8 latents, tiles of 64 keys, two kinds of warps.

Four producer warps gather raw latents into registers (half a tile ahead), dequantize them into one of two shared buffers
and signal it full. Eight consumer warps (two warpgroups) multiply: scores (a warpgroup has all heads and half of the
keys), softmax, values (half of the columns each) from the same buffer, and signal it free. Shared memory: query 72 KiB,
latents 2 x 64 KiB, roped keys 2 x 8 KiB, softmax weights 8 KiB.
"""

from __future__ import annotations

import jax
import jax_triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from pallas_kernels.lowering import default_arch, triton_options
from pallas_kernels.sparse_mla import jax_gluon
from pallas_kernels.sparse_mla.plan import cut
from pallas_kernels.sparse_mla.spec import Spec
from pallas_kernels.sparse_mla.triton import constants, dequant_asm, merge, outputs

jax_gluon.install()
BLOCK_HEADS, BLOCK_KEYS = 64, 64
# With 88 the producers spill (178 us for 128 rows against 119); 120 leaves the consumers 192.
PRODUCER_REGISTERS = gl.constexpr(120)
DEQUANT_WORD = gl.constexpr(dequant_asm("mov.b32 h0, $3; mov.b32 h1, $3; mov.b32 l0, $4; mov.b32 l1, $4;"))
# float32 bits ($2) times 2^100 -> a pair of its bfloat16 ($0) and of what that misses ($1). 0x71800000 is 2^100.
SPLIT_SCALE = gl.constexpr("""{
 .reg .f32 s, h, l;
 .reg .b32 t;
 mul.f32 s, $2, 0f71800000;
 cvt.rn.bf16x2.f32 $0, s, s;
 and.b32 t, $0, 0xffff0000;
 mov.b32 h, t;
 sub.f32 l, s, h;
 cvt.rn.bf16x2.f32 $1, l, l;
}""")
# Rows and words of half a tile (32 keys) over the producer's threads. Four lanes of a row and four of the next one form a
# quarter warp, whose 16-byte stores then fall into different banks of the 128-byte swizzle.
_WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [16, 0]], [[0, 4], [0, 8], [1, 0], [0, 16], [2, 0]], [[4, 0], [8, 0]], [], [32, 32]
    )
)
_ROWS = gl.constexpr(gl.SliceLayout(1, _WORDS.value))
_SMEM_WORDS = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))
_SMEM = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
_QUERY = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0]))
_QUERY_ROPE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0]))
_SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16]))
_VALUES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16]))


@gluon.jit
def _slots(slots, at, end, CAPACITY: gl.constexpr):
    """Slots of 32 positions from at; -1 past the end or out of the cache."""
    position = at + gl.arange(0, 32, _ROWS)
    slot = gl.load(slots + position, mask=position < end, other=-1)
    return gl.where((slot >= 0) & (slot < CAPACITY), slot, -1)


@gluon.jit
def _half(row, valid, half: gl.constexpr):
    """Starts the loads of two groups of half a tile: int32 [32, 32] raw latents each, and the bits of their scales.

    What is not selected reads as zero without touching memory. Words, not bytes: values that wait across an iteration
    take one register an element.
    """
    at = row[:, None] + (half * 64 + gl.arange(0, 32, gl.SliceLayout(0, _WORDS)))[None, :]
    r0 = gl.load(at, mask=valid[:, None], other=0)
    r1 = gl.load(at + 32, mask=valid[:, None], other=0)
    s0 = gl.load(row + (128 + half * 2), mask=valid, other=0)
    s1 = gl.load(row + (129 + half * 2), mask=valid, other=0)
    return r0, r1, s0, s1


@gluon.jit
def _rope(row, valid):
    """Starts the load of the roped keys of half a tile, int32 [32, 32]."""
    at = row[:, None] + (132 + gl.arange(0, 32, gl.SliceLayout(0, _WORDS)))[None, :]
    return gl.load(at, mask=valid[:, None], other=0)


@gluon.jit
def _dequantize(raw, scale):
    """int32 [32, 32] of e4m3 and the bits of float32 [32] -> int32 [32, 64] of bfloat16, times LATENT_FACTOR."""
    high, low = gl.inline_asm_elementwise(
        SPLIT_SCALE, "=&r,=&r,f", [scale.to(gl.float32, bitcast=True)], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    first, second = gl.inline_asm_elementwise(
        DEQUANT_WORD, "=&r,=&r,r,r,r", [raw, high[:, None], low[:, None]],
        dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    return gl.join(first, second).reshape([32, 64])


@gluon.jit
def _publish(latents, half: gl.constexpr, raw):
    """Dequantizes two groups into shared memory, in one store (each costs a barrier)."""
    r0, r1, s0, s1 = raw
    both = gl.join(_dequantize(r0, s0), _dequantize(r1, s1)).permute((0, 2, 1)).reshape([32, 128])
    latents.slice(half * 128, 128, 1).store(both)


@gluon.jit
def _partial_sum(weight):
    """[64, 64] scores layout -> [64, 2, 8]: sums only what one thread holds."""
    return gl.sum(weight.reshape([64, 2, 4, 8]), 2)


@gluon.jit
def _produce(
    words, start, slots, at, end, latents, ropes, full, free,
    WIDTH: gl.constexpr, CAPACITY: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    slot = _slots(slots, at, end, CAPACITY)
    key = words + (start + slot.to(gl.int64) * (WIDTH // 4))
    first = _half(key, slot >= 0, 0)
    second = _half(key, slot >= 0, 1)
    rope = _rope(key, slot >= 0)
    slot = _slots(slots, at + 32, end, CAPACITY)
    for i in range(TILES):
        # The first use of each buffer waits for the phase before the first, which counts as complete.
        hopper.mbarrier.wait(free.index(i & 1), ((i >> 1) & 1) ^ 1)
        for half in gl.static_range(2):
            rows = latents.index(i & 1).slice(half * 32, 32, 0)
            key = words + (start + slot.to(gl.int64) * (WIDTH // 4))
            valid = slot >= 0
            # Registers are refilled as soon as they are empty: the loads have half a tile's time.
            _publish(rows, 0, first)
            first = _half(key, valid, 0)
            _publish(rows, 1, second)
            second = _half(key, valid, 1)
            ropes.index(i & 1).slice(half * 32, 32, 0).store(rope)
            rope = _rope(key, valid)
            slot = _slots(slots, at + i * 64 + half * 32 + 64, end, CAPACITY)
        hopper.fence_async_shared()
        gl.thread_barrier()
        hopper.mbarrier.arrive(full.index(i & 1), count=1)


@gluon.jit
def _load_query(q, first_head, query, query_rope, HEADS: gl.constexpr, ROPE_FACTOR: gl.constexpr):
    """q: at the row. All loads before the first store: a store ends with a barrier."""
    head = first_head + gl.arange(0, 64, gl.SliceLayout(1, _QUERY))
    at_q = (q + head * 576)[:, None]
    live = (head < HEADS)[:, None]
    latent = gl.load(at_q + gl.arange(0, 512, gl.SliceLayout(0, _QUERY))[None, :], mask=live, other=0.0)
    head = first_head + gl.arange(0, 64, gl.SliceLayout(1, _QUERY_ROPE))
    at_q = (q + head * 576 + 512)[:, None]
    live = (head < HEADS)[:, None]
    rope = gl.load(at_q + gl.arange(0, 64, gl.SliceLayout(0, _QUERY_ROPE))[None, :], mask=live, other=0.0)
    query.store(latent)
    query_rope.store((rope.to(gl.float32) * ROPE_FACTOR).to(gl.bfloat16))
    hopper.fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _consume(
    q, slots, at, end, first_head, context, lse, latents, ropes, full, free,
    HEADS: gl.constexpr, CAPACITY: gl.constexpr, SCALE_LOG2: gl.constexpr, ROPE_FACTOR: gl.constexpr,
    OUT_FACTOR: gl.constexpr, LSE_FACTOR: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """q, slots, context, lse: at the row (and split)."""
    query = gl.allocate_shared_memory(gl.bfloat16, [64, 512], _SMEM)
    query_rope = gl.allocate_shared_memory(gl.bfloat16, [64, 64], _SMEM)
    weights = gl.allocate_shared_memory(gl.bfloat16, [64, 64], _SMEM)
    _load_query(q, first_head, query, query_rope, HEADS, ROPE_FACTOR)
    keys = latents._reinterpret(gl.bfloat16, [2, 64, 512], _SMEM)
    rope_keys = ropes._reinterpret(gl.bfloat16, [2, 64, 64], _SMEM)
    rows: gl.constexpr = gl.SliceLayout(1, _SCORES)
    value_rows: gl.constexpr = gl.SliceLayout(1, _VALUES)
    column_slots: gl.constexpr = gl.SliceLayout(0, _SCORES)
    peak = gl.full([64], float("-inf"), gl.float32, rows)
    total = _partial_sum(gl.full([64, 64], 0.0, gl.float32, _SCORES))
    sum_rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, total.type.layout))
    acc = gl.full([64, 512], 0.0, gl.float32, _VALUES)
    for i in range(TILES):
        current = keys.index(i & 1)
        position = at + i * 64 + gl.arange(0, 64, column_slots)
        own = gl.load(slots + position, mask=position < end, other=-1)
        hopper.mbarrier.wait(full.index(i & 1), (i >> 1) & 1)
        score = gl.full([64, 64], 0.0, gl.float32, _SCORES)
        score = hopper.warpgroup_mma(query, current.permute((1, 0)), score, use_acc=False, is_async=True)
        score = hopper.warpgroup_mma(query_rope, rope_keys.index(i & 1).permute((1, 0)), score, is_async=True)
        selected = (own >= 0) & (own < CAPACITY)
        score = hopper.warpgroup_mma_wait(0, deps=[score])
        score = gl.where(selected[None, :], score * SCALE_LOG2, float("-inf"))
        new_peak = gl.maximum(peak, gl.max(score, 1))
        # A row with nothing selected so far keeps -inf: subtract 0 there, or -inf - -inf makes NaN.
        safe = gl.where(new_peak == float("-inf"), 0.0, new_peak)
        weight = gl.exp2(score - safe[:, None])
        alpha = gl.exp2(peak - safe)
        peak = new_peak
        weights.store(weight.to(gl.bfloat16))
        acc = acc * gl.convert_layout(alpha, value_rows)[:, None]
        hopper.fence_async_shared()
        gl.thread_barrier()
        acc = hopper.warpgroup_mma(weights, current, acc, is_async=True)
        total = total * gl.convert_layout(alpha, sum_rows).expand_dims(1).expand_dims(2) + _partial_sum(weight)
        acc = hopper.warpgroup_mma_wait(0, deps=[acc])
        gl.thread_barrier()
        hopper.mbarrier.arrive(free.index(i & 1), count=1)

    total = gl.convert_layout(gl.sum(gl.sum(total, 2), 1), rows)
    factor = gl.convert_layout(OUT_FACTOR / gl.where(total > 0, total, 1.0), value_rows)
    head = first_head + gl.arange(0, 64, value_rows)
    columns = gl.arange(0, 512, gl.SliceLayout(0, _VALUES))
    values = (acc * factor[:, None]).to(context.dtype.element_ty)
    gl.store(context + head[:, None] * 512 + columns[None, :], values, mask=(head < HEADS)[:, None])
    head = first_head + gl.arange(0, 64, rows)
    gl.store(lse + head, (peak + gl.log2(total)) * LSE_FACTOR, mask=head < HEADS)


@gluon.jit
def split_kernel(
    q, cache, layer, slots, context, lse,
    HEADS: gl.constexpr, K: gl.constexpr, WIDTH: gl.constexpr, CAPACITY: gl.constexpr, QUANT: gl.constexpr,
    SCALE_LOG2: gl.constexpr, ROPE_FACTOR: gl.constexpr, OUT_FACTOR: gl.constexpr,
    SPLITS: gl.constexpr, TILES: gl.constexpr,
):  # fmt: skip
    """Grid (head blocks, splits, rows). context, lse: the outputs for one split, else partials [rows, splits, heads, ...]."""
    gl.static_assert(QUANT)
    split, row = gl.program_id(1), gl.program_id(2).to(gl.int64)
    first_head = gl.program_id(0) * 64
    start = gl.load(layer).to(gl.int64) * (CAPACITY * (WIDTH // 4))
    words = cache.to(gl.pointer_type(gl.int32))
    end = gl.minimum(K, (split + 1) * TILES * 64)
    at = split * TILES * 64
    out = (row * SPLITS + split) * HEADS
    # Partials keep log2 sums; the single split writes natural logs.
    LSE_FACTOR: gl.constexpr = 0.6931471805599453 if SPLITS == 1 else 1.0
    # Filled as pairs of bfloat16, multiplied as bfloat16: the swizzle counts bytes.
    latents = gl.allocate_shared_memory(gl.int32, [2, 64, 256], _SMEM_WORDS)
    ropes = gl.allocate_shared_memory(gl.int32, [2, 64, 32], _SMEM_WORDS)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], hopper.mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], hopper.mbarrier.MBarrierLayout())
    for buffer in gl.static_range(2):
        hopper.mbarrier.init(full.index(buffer), count=1)
        hopper.mbarrier.init(free.index(buffer), count=1)
    slots += row * K
    gl.warp_specialize(
        [
            (_consume, (
                q + row * (HEADS * 576), slots, at, end, first_head, context + out * 512, lse + out, latents, ropes, full, free,
                HEADS, CAPACITY, SCALE_LOG2, ROPE_FACTOR, OUT_FACTOR, LSE_FACTOR, TILES,
            )),
            (_produce, (words, start, slots, at, end, latents, ropes, full, free, WIDTH, CAPACITY, TILES)),
        ],
        [4],
        [PRODUCER_REGISTERS],
    )  # fmt: skip


def run(spec: Spec, q: jax.Array, cache: jax.Array, layer: jax.Array, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
    arch = default_arch()
    blocks = -(-spec.heads // BLOCK_HEADS)
    splits, tiles = cut(
        spec, BLOCK_KEYS, spec.splits or max(1, (arch.num_sms if arch else 132) // (spec.rows * blocks))
    )
    part, part_lse = jax_triton.triton_call(
        q, cache, layer.reshape(1), slots, kernel=split_kernel, out_type=outputs(spec, splits),
        grid=(blocks, splits, spec.rows), name="sparse_mla_split_sm90", num_warps=8, **triton_options(),
        **constants(spec), SPLITS=splits, TILES=tiles,
    )  # fmt: skip
    return (part, part_lse) if splits == 1 else merge(spec, splits, part, part_lse)
