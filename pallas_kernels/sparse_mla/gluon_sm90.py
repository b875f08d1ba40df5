"""Sparse MLA decode for Hopper in Gluon: 64 heads against FP8 latents, one tile of 64 keys at a time.

Eight warps (two warpgroups). The raw bytes of the next tile wait in registers; while the tensor cores multiply the
weights with the current tile (wgmma, asynchronous), the next one is dequantized into the other shared buffer. Scores and
values read the same buffer. Shared memory: query 72 KiB, latents 2 x 64 KiB, roped keys 8 KiB, weights 8 KiB.
"""

from __future__ import annotations

import jax
import jax_triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from pallas_kernels.lowering import default_arch
from pallas_kernels.sparse_mla.plan import cut
from pallas_kernels.sparse_mla.spec import Spec
from pallas_kernels.sparse_mla.triton import constants, dequant_asm, lowering_options, merge, outputs

BLOCK_HEADS, BLOCK_KEYS = 64, 64
DEQUANT_WORD = gl.constexpr(dequant_asm("mov.b32 h0, $3; mov.b32 h1, $3; mov.b32 l0, $4; mov.b32 l1, $4;"))
# Rows of a 64-row tile over lanes and warps. Four lanes of a row and four of the next one form a quarter warp, whose
# 16-byte stores then fall into different banks of the 128-byte swizzle.
_WARPS = [[4, 0], [8, 0], [16, 0]]
_WORDS = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [32, 0]], [[0, 4], [0, 8], [1, 0], [0, 16], [2, 0]], _WARPS, [], [64, 32]
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
    """Slots of 64 positions from at; -1 past the end or out of the cache."""
    position = at + gl.arange(0, 64, _ROWS)
    slot = gl.load(slots + position, mask=position < end, other=-1)
    return gl.where((slot >= 0) & (slot < CAPACITY), slot, -1)


@gluon.jit
def _half(row, valid, half: gl.constexpr):
    """Starts the loads of two groups of a tile: int32 [64, 32] raw latents each, and the bits of their scales.

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
    """Starts the load of the roped keys of a tile, int32 [64, 32]."""
    at = row[:, None] + (132 + gl.arange(0, 32, gl.SliceLayout(0, _WORDS)))[None, :]
    return gl.load(at, mask=valid[:, None], other=0)


@gluon.jit
def _pair(x):
    """bfloat16 -> int32 that holds it in both halves."""
    bits = x.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return bits | (bits << 16)


@gluon.jit
def _dequantize(raw, scale):
    """int32 [64, 32] of e4m3 and the bits of float32 [64] -> int32 [64, 64] of bfloat16, times LATENT_FACTOR."""
    scale = scale.to(gl.float32, bitcast=True) * 1267650600228229401496703205376.0  # 2^100
    high = scale.to(gl.bfloat16)
    low = (scale - high.to(gl.float32)).to(gl.bfloat16)
    first, second = gl.inline_asm_elementwise(
        DEQUANT_WORD, "=&r,=&r,r,r,r", [raw, _pair(high)[:, None], _pair(low)[:, None]],
        dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    return gl.join(first, second).reshape([64, 64])


@gluon.jit
def _publish(latents, half: gl.constexpr, raw):
    """Dequantizes two groups into shared memory, in one store (each costs a barrier)."""
    r0, r1, s0, s1 = raw
    both = gl.join(_dequantize(r0, s0), _dequantize(r1, s1)).permute((0, 2, 1)).reshape([64, 128])
    latents.slice(half * 128, 128, 1).store(both)


@gluon.jit
def _partial_sum(weight):
    """[64, 64] scores layout -> [64, 2, 8]: sums only what one thread holds."""
    return gl.sum(weight.reshape([64, 2, 4, 8]), 2)


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
    slots += row * K
    slot = _slots(slots, at, end, CAPACITY)
    key = words + (start + slot.to(gl.int64) * (WIDTH // 4))
    first = _half(key, slot >= 0, 0)
    second = _half(key, slot >= 0, 1)
    rope = _rope(key, slot >= 0)
    slot = _slots(slots, at + 64, end, CAPACITY)

    query = gl.allocate_shared_memory(gl.bfloat16, [64, 512], _SMEM)
    query_rope = gl.allocate_shared_memory(gl.bfloat16, [64, 64], _SMEM)
    # Filled as pairs of bfloat16, multiplied as bfloat16: the swizzle counts bytes.
    latents = gl.allocate_shared_memory(gl.int32, [2, 64, 256], _SMEM_WORDS)
    latent_keys = latents._reinterpret(gl.bfloat16, [2, 64, 512], _SMEM)
    ropes = gl.allocate_shared_memory(gl.int32, [64, 32], _SMEM_WORDS)
    rope_keys = ropes._reinterpret(gl.bfloat16, [64, 64], _SMEM)
    weights = gl.allocate_shared_memory(gl.bfloat16, [64, 64], _SMEM)
    # All loads before the first store: a store ends with a barrier, and each load behind one would wait for memory again.
    head = first_head + gl.arange(0, 64, gl.SliceLayout(1, _QUERY))
    at_q = (q + (row * HEADS + head) * 576)[:, None]
    live = (head < HEADS)[:, None]
    q_latent = gl.load(at_q + gl.arange(0, 512, gl.SliceLayout(0, _QUERY))[None, :], mask=live, other=0.0)
    head = first_head + gl.arange(0, 64, gl.SliceLayout(1, _QUERY_ROPE))
    at_q = (q + (row * HEADS + head) * 576 + 512)[:, None]
    live = (head < HEADS)[:, None]
    q_rope = gl.load(at_q + gl.arange(0, 64, gl.SliceLayout(0, _QUERY_ROPE))[None, :], mask=live, other=0.0)
    query.store(q_latent)
    query_rope.store((q_rope.to(gl.float32) * ROPE_FACTOR).to(gl.bfloat16))

    rows: gl.constexpr = gl.SliceLayout(1, _SCORES)
    value_rows: gl.constexpr = gl.SliceLayout(1, _VALUES)
    peak = gl.full([64], float("-inf"), gl.float32, rows)
    total = _partial_sum(gl.full([64, 64], 0.0, gl.float32, _SCORES))
    sum_rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, total.type.layout))
    acc = hopper.warpgroup_mma_init(gl.full([64, 512], 0.0, gl.float32, _VALUES))
    column_slots: gl.constexpr = gl.SliceLayout(0, _SCORES)
    _publish(latents.index(0), 0, first)
    _publish(latents.index(0), 1, second)
    ropes.store(rope)
    key = words + (start + slot.to(gl.int64) * (WIDTH // 4))
    valid = slot >= 0
    first = _half(key, valid, 0)
    slot = _slots(slots, at + 128, end, CAPACITY)
    for i in range(TILES):
        current = latent_keys.index(i & 1)
        following = latents.index((i + 1) & 1)
        # Before the barrier: behind it every warp may overwrite what the last value product read. (Waiting later, with
        # the score products in flight, makes ptxas serialize all of them: C7514.)
        acc = hopper.warpgroup_mma_wait(0, deps=[acc])
        # The fence also waits for this thread's global loads, so loads start right behind a fence, not before one.
        hopper.fence_async_shared()
        gl.thread_barrier()
        score = gl.full([64, 64], 0.0, gl.float32, _SCORES)
        score = hopper.warpgroup_mma(query, current.permute((1, 0)), score, use_acc=False, is_async=True)
        score = hopper.warpgroup_mma(query_rope, rope_keys.permute((1, 0)), score, is_async=True)
        position = at + i * 64 + gl.arange(0, 64, column_slots)
        own = gl.load(slots + position, mask=position < end, other=-1)
        selected = (own >= 0) & (own < CAPACITY)
        second = _half(key, valid, 1)
        rope = _rope(key, valid)
        _publish(following, 0, first)
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
        key = words + (start + slot.to(gl.int64) * (WIDTH // 4))
        valid = slot >= 0
        first = _half(key, valid, 0)
        slot = _slots(slots, at + (i + 3) * 64, end, CAPACITY)
        _publish(following, 1, second)
        ropes.store(rope)
    acc = hopper.warpgroup_mma_wait(0, deps=[acc])

    total = gl.convert_layout(gl.sum(gl.sum(total, 2), 1), rows)
    factor = gl.convert_layout(OUT_FACTOR / gl.where(total > 0, total, 1.0), value_rows)
    out_head = first_head + gl.arange(0, 64, value_rows)
    at_head = (row * SPLITS + split) * HEADS + out_head
    columns = gl.arange(0, 512, gl.SliceLayout(0, _VALUES))
    values = (acc * factor[:, None]).to(context.dtype.element_ty)
    gl.store(context + at_head[:, None] * 512 + columns[None, :], values, mask=(out_head < HEADS)[:, None])
    log_sum = peak + gl.log2(total)
    if SPLITS == 1:
        log_sum = log_sum * 0.6931471805599453
    lse_head = first_head + gl.arange(0, 64, rows)
    gl.store(lse + (row * SPLITS + split) * HEADS + lse_head, log_sum, mask=lse_head < HEADS)


def run(spec: Spec, q: jax.Array, cache: jax.Array, layer: jax.Array, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
    arch = default_arch()
    blocks = -(-spec.heads // BLOCK_HEADS)
    splits, tiles = cut(
        spec, BLOCK_KEYS, spec.splits or max(1, (arch.num_sms if arch else 132) // (spec.rows * blocks))
    )
    part, part_lse = jax_triton.triton_call(
        q, cache, layer.reshape(1), slots, kernel=split_kernel, out_type=outputs(spec, splits),
        grid=(blocks, splits, spec.rows), name="sparse_mla_split_sm90", num_warps=8, **lowering_options(),
        **constants(spec), SPLITS=splits, TILES=tiles,
    )  # fmt: skip
    return (part, part_lse) if splits == 1 else merge(spec, splits, part, part_lse)
