"""Gluon pieces that write a selection: positions, and their cache slots through the block table."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pallas_kernels.paged import PAGE
from pallas_kernels.top_k.gluon_bins import iota, scan

_PAGE = gl.constexpr(PAGE)


@gluon.jit
def pages_of(first, row, table, BLOCK: gl.constexpr, PAGES: gl.constexpr, WIDTH: gl.constexpr):
    """Page ids of positions first + 0 .. BLOCK - 1, -1 past the table; a thread's consecutive positions share one load.

    Ask for them early: the search then hides the way to memory. first is a multiple of BLOCK.
    """
    if PAGES == 0:
        return iota(BLOCK)
    threads: gl.constexpr = 32 * gl.num_warps()
    each: gl.constexpr = BLOCK // threads if threads < BLOCK else 1
    gl.static_assert(each <= _PAGE)
    layout: gl.constexpr = gl.BlockedLayout([1, each], [32, 1], [gl.num_warps(), 1], [1, 0])
    page = (first + gl.arange(0, BLOCK // each, gl.SliceLayout(1, layout)) * each) // _PAGE
    page = gl.load(table + (row // WIDTH) * PAGES + page, mask=page < PAGES, other=-1)
    shared = gl.full([BLOCK // each, each], 0, gl.int32, layout) + page[:, None]
    return gl.convert_layout(shared.reshape([BLOCK]), iota(BLOCK).type.layout, assert_trivial=True)


@gluon.jit
def slot_of(position, page):
    return gl.where(page < 0, -1, page * _PAGE + position % _PAGE)


@gluon.jit
def take(
    key, live, position, slot, better, tied, limit, ties, at, positions, slots, PAGES: gl.constexpr,
):  # fmt: skip
    """Writes the selected of one block, which is in order of position: keys below limit, and the first ties of those at it.

    better, tied: how many of each came before this block. at: where the row's outputs start.
    """
    less = live & (key < limit)
    tie = live & (key == limit)
    # Two counts in one scan: a block has at most 2^14 elements.
    both = less.to(gl.int32) + (tie.to(gl.int32) << 16)
    before = scan(both) - both
    tied += before >> 16
    taken = less | (tie & (tied < ties))
    at += better + (before & 0xFFFF) + gl.minimum(tied, ties)
    gl.store(positions + at, position, mask=taken)
    if PAGES > 0:
        gl.store(slots + at, slot, mask=taken)


@gluon.jit
def take_all(
    length, row, positions, slots, table,
    K: gl.constexpr, K_PADDED: gl.constexpr, PAGES: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """A row no longer than k: every position in order, then -1."""
    at = iota(K_PADDED)
    live = at < length
    gl.store(positions + row * K + at, gl.where(live, at, -1), mask=at < K)
    if PAGES > 0:
        inside = live & (at < PAGES * _PAGE)
        page = gl.load(table + (row // WIDTH) * PAGES + at // _PAGE, mask=inside, other=-1)
        gl.store(slots + row * K + at, slot_of(at, page), mask=at < K)
