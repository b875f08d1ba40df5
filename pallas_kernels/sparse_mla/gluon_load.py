"""Hopper kernel, first part: gathered rows into a ring of shared memory, and the query as e4m3 terms."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from pallas_kernels.gluon_layer import layer_of

# Of a latent row in the cache: 512 e4m3, 4 float32, 64 bfloat16.
ROW_WORDS = gl.constexpr(164)
WORDS = gl.constexpr(gl.NVMMASharedLayout(128, 32, 2))
BYTES = gl.constexpr(gl.NVMMASharedLayout(128, 8, 2))
HALVES = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
FLAT_ROW = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))

# Copies: eight lanes a row of 128 bytes. All three have the same rows in a thread.
_LINES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 32], [0, 64], [16, 0], [32, 0]],
        *([[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]], [[4, 0], [8, 0]], [], [64, 128]),
    )
)
_ROPE_LINES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [16, 0], [32, 0]],
        *([[0, 4], [0, 8], [0, 16], [1, 0], [2, 0]], [[4, 0], [8, 0]], [], [64, 32]),
    )
)
_SCALE_LINES = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [16, 0], [32, 0]],
        *([[0, 0], [0, 0], [0, 0], [1, 0], [2, 0]], [[4, 0], [8, 0]], [], [64, 4]),
    )
)
_SLOTS = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
_QUERY = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
_QUERY_ROPE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))


@gluon.jit
def _slots(slots, at, end, CAPACITY: gl.constexpr):
    """Slots of 64 positions from at; -1 past the end or out of the cache."""
    position = at + gl.arange(0, 64, gl.SliceLayout(1, _LINES))
    slot = gl.load(slots + position, mask=position < end, other=-1)
    return gl.where((slot >= 0) & (slot < CAPACITY), slot, -1)


@gluon.jit
def produce(
    words, layer, slots, at, end, latents, ropes, scales, picks, full, free,
    CAPACITY: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copies tiles of 64 rows and their slots into the ring; what is not selected becomes zero and is not read."""
    slot = _slots(slots, at, end, CAPACITY)
    start = layer_of(layer).to(gl.int64) * (CAPACITY * ROW_WORDS)
    columns = gl.arange(0, 128, gl.SliceLayout(0, _LINES))
    rope_columns = 132 + gl.arange(0, 32, gl.SliceLayout(0, _ROPE_LINES))
    scale_columns = 128 + gl.arange(0, 4, gl.SliceLayout(0, _SCALE_LINES))
    stage = 0
    phase = 1  # the phase before the first counts as complete
    for i in range(TILES):
        hopper.mbarrier.wait(free.index(stage), phase)
        row = words + (start + slot.to(gl.int64) * ROW_WORDS)
        valid = slot >= 0
        slot = _slots(slots, at + i * 64 + 64, end, CAPACITY)
        async_copy.async_copy_global_to_shared(
            latents.index(stage), row[:, None] + columns[None, :], mask=valid[:, None]
        )
        line = gl.convert_layout(row, gl.SliceLayout(1, _ROPE_LINES))[:, None] + rope_columns[None, :]
        mask = gl.convert_layout(valid, gl.SliceLayout(1, _ROPE_LINES))[:, None]
        async_copy.async_copy_global_to_shared(ropes.index(stage), line, mask=mask)
        line = gl.convert_layout(row, gl.SliceLayout(1, _SCALE_LINES))[:, None] + scale_columns[None, :]
        mask = gl.convert_layout(valid, gl.SliceLayout(1, _SCALE_LINES))[:, None]
        async_copy.async_copy_global_to_shared(scales.index(stage), line, mask=mask)
        position = at + i * 64 + gl.arange(0, 64, _SLOTS)
        async_copy.async_copy_global_to_shared(picks.index(stage), slots + position, mask=position < end)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1


@gluon.jit
def _two_terms(x, up, query, group: gl.constexpr, first, HALF: gl.constexpr):
    """x times up as a sum of two e4m3 terms: exact down to 2^-9 of the head's largest, to 2^-18 of that below."""
    x = x.to(gl.float32) * up[:, None]
    one = x.to(gl.float8e4nv)
    query.index(0).slice(group * 128, 128, 1).slice(first, HALF, 0).store(one)
    query.index(1).slice(group * 128, 128, 1).slice(first, HALF, 0).store((x - one.to(gl.float32)).to(gl.float8e4nv))


@gluon.jit
def query_half(
    q, first_head, first, query, query_rope, factors, HEADS: gl.constexpr, HALF: gl.constexpr, SCALE_LOG2: gl.constexpr
):
    """HALF heads of the block from ``first`` on, each times a power of two; ``factors`` undo it in the scores."""
    head = first_head + first + gl.arange(0, HALF, gl.SliceLayout(1, _QUERY))
    at_q = (q + head * 576)[:, None] + gl.arange(0, 128, gl.SliceLayout(0, _QUERY))[None, :]
    live = (head < HEADS)[:, None]
    x0 = gl.load(at_q, mask=live, other=0.0)
    x1 = gl.load(at_q + 128, mask=live, other=0.0)
    x2 = gl.load(at_q + 256, mask=live, other=0.0)
    x3 = gl.load(at_q + 384, mask=live, other=0.0)
    head = first_head + first + gl.arange(0, HALF, gl.SliceLayout(1, _QUERY_ROPE))
    at_q = (q + head * 576 + 512)[:, None] + gl.arange(0, 64, gl.SliceLayout(0, _QUERY_ROPE))[None, :]
    rope = gl.load(at_q, mask=(head < HEADS)[:, None], other=0.0).to(gl.float32)
    top = gl.convert_layout(gl.max(gl.abs(rope), 1), gl.SliceLayout(1, _QUERY))
    most = gl.maximum(gl.maximum(gl.abs(x0), gl.abs(x1)), gl.maximum(gl.abs(x2), gl.abs(x3)))
    top = gl.maximum(gl.max(most.to(gl.float32), 1), top)
    # The power of two that brings the head's largest into [128, 256); bounded, so that it and its inverse are normal.
    exponent = gl.maximum(top.to(gl.int32, bitcast=True) >> 23, 10)
    up = ((261 - exponent) << 23).to(gl.float32, bitcast=True)
    down = ((exponent - 7) << 23).to(gl.float32, bitcast=True)
    _two_terms(x0, up, query, 0, first, HALF)
    _two_terms(x1, up, query, 1, first, HALF)
    _two_terms(x2, up, query, 2, first, HALF)
    _two_terms(x3, up, query, 3, first, HALF)
    rope = rope * gl.convert_layout(up, gl.SliceLayout(1, _QUERY_ROPE))[:, None]
    query_rope.slice(first, HALF, 0).store(rope.to(gl.bfloat16))
    factors.slice(first, HALF, 0).store(down * SCALE_LOG2)
    hopper.fence_async_shared()
    gl.thread_barrier()
