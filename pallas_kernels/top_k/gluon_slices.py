"""Gluon pieces for rows that several programs share: histograms of slices, their row's bin, waiting for each other."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pallas_kernels.top_k.gluon_bins import BINS, clear, count, counted, iota, key_of, scan
from pallas_kernels.top_k.plan import GROUP, GROUPS

_GROUP = gl.constexpr(GROUP)
_GROUPS = gl.constexpr(GROUPS)
# About 0.7 us each: a row's programs are all resident (make_plan), so only a broken GPU waits for seconds.
_MOST_POLLS = gl.constexpr(1 << 22)
_TRAP = gl.constexpr("{ .reg .pred p; setp.lt.s32 p, $1, $2; @p trap; mov.u32 $0, 0; }")


@gluon.jit
def count_slice(
    bins, source, score, first, length, prefix, sums, group_sums, slot,
    SHIFT: gl.constexpr, BITS: gl.constexpr, N: gl.constexpr, BLOCKS: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Prefix sums of the histogram of one digit over a slice, all and every 32nd; score: its first block."""
    at = first + iota(BLOCK)
    clear(bins)
    for block in range(BLOCKS):
        key = key_of(score)
        live = at < length
        if SHIFT + BITS < 32:
            live = live & ((key >> (SHIFT + BITS)) == prefix)
        count(bins, (key >> SHIFT) & ((1 << BITS) - 1), live)
        if BLOCKS > 1:
            at += BLOCK
            score = gl.load(source + at, mask=(at < N) & (block + 1 < BLOCKS), other=0.0)
    digit = iota(BINS)
    total = scan(counted(bins))
    gl.store(sums + slot * BINS + digit, total)
    gl.store(group_sums + slot * _GROUPS + digit // _GROUP, total, mask=digit % _GROUP == _GROUP - 1)


@gluon.jit
def bin_of_row(
    sums, group_sums, want, length, part, row,
    SLICES: gl.constexpr, PADDED: gl.constexpr, SPAN: gl.constexpr, BETTER_BEFORE: gl.constexpr,
):  # fmt: skip
    """(bin, its scores or better, that of the slices before, better scores, that of the slices before), of one row.

    The last of them, which costs a reduction more, is zero unless BETTER_BEFORE.
    """
    wide: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [gl.num_warps(), 1], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [gl.num_warps(), 1], [1, 0])
    slices = gl.arange(0, PADDED, gl.SliceLayout(1, wide))[:, None]
    groups = gl.arange(0, _GROUPS, gl.SliceLayout(0, wide))[None, :]
    at = (row * SLICES + slices) * _GROUPS + groups
    sum_of = gl.load(group_sums + at, mask=(slices < SLICES) & (groups >= 0), other=0, cache_modifier=".cg")
    # Slices past the length wrote nothing.
    sum_of = gl.where(slices < gl.cdiv(length, SPAN), sum_of, 0)
    totals = gl.sum(sum_of, 0)
    group = gl.sum((totals < want).to(gl.int32), 0)
    better = gl.max(gl.where(totals < want, totals, 0), 0)
    better_before = 0
    if BETTER_BEFORE:
        earlier = gl.sum(gl.where(slices < part, sum_of, 0), 0)
        better_before = gl.max(gl.where(totals < want, earlier, 0), 0)

    slices = gl.arange(0, PADDED, gl.SliceLayout(1, narrow))[:, None]
    within = gl.arange(0, _GROUP, gl.SliceLayout(0, narrow))
    at = (row * SLICES + slices) * BINS + group * _GROUP + within[None, :]
    used = (slices < gl.cdiv(length, SPAN)) & (within[None, :] >= 0)
    sum_of = gl.load(sums + at, mask=used, other=0, cache_modifier=".cg")
    totals = gl.sum(sum_of, 0)
    earlier = gl.sum(gl.where(slices < part, sum_of, 0), 0)
    inner = gl.sum((totals < want).to(gl.int32), 0)
    to = gl.sum(gl.where(within == inner, totals, 0), 0)
    before = gl.sum(gl.where(within == inner, earlier, 0), 0)
    # The bin before is in this group or ends the one before.
    better = gl.maximum(better, gl.max(gl.where(totals < want, totals, 0), 0))
    if BETTER_BEFORE:
        better_before = gl.maximum(better_before, gl.max(gl.where(totals < want, earlier, 0), 0))
    return group * _GROUP + inner, to, before, better, better_before


@gluon.jit
def meet(done, parts):
    """Waits until all programs of a row are here; their stores before are seen after. Stops the program where one never comes."""
    gl.thread_barrier()
    arrived = gl.atomic_add(done, 1, sem="acq_rel", scope="gpu") + 1
    polls = 0
    while (arrived < parts) & (polls < _MOST_POLLS):
        arrived = gl.atomic_add(done, 0, sem="acquire", scope="gpu")
        polls += 1
    gl.inline_asm_elementwise(_TRAP, "=r,r,r", [arrived, parts], dtype=gl.int32, is_pure=False, pack=1)
    gl.thread_barrier()
