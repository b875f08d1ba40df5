"""Selection of rows that one program holds in registers, in Gluon; portable from SM80 to SM120.

The scores are cut into bins of equal width between the best and the worst, so that the bin of the k-th has few of them whatever
their magnitude; where it has up to 32, they are listed and ranked by key and position, all pairs at once. Where it has
more, bins of keys follow, until the k-th key is known. A warp holds consecutive positions, a lane every 32nd: a ballot
counts, and what a warp stores is next to each other.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pallas_kernels.gluon_shared import get_two_words, get_word, put_if, put_two_if
from pallas_kernels.paged import PAGE
from pallas_kernels.top_k.gluon_outputs import slot_of, take_all
from pallas_kernels.top_k.gluon_warps import (
    BETTER,
    COUNTER,
    COUNTS,
    LISTED,
    TOLD,
    TRASH,
    append,
    before_warp,
    clear,
    digit_of,
    found_bin,
    highest_bit,
    increment,
    larger,
    number_of,
    place,
    range_of,
    smaller,
    turned,
    warp_count,
    warp_sum,
    words,
)  # fmt: skip

_PAGE = gl.constexpr(PAGE)
_DEAD = gl.constexpr(0xFFFFFFFF)


@gluon.jit
def _put(taken, at, position, page, positions, slots, PAGES: gl.constexpr):
    gl.store(positions + at, position, mask=taken)
    if PAGES > 0:
        gl.store(slots + at, slot_of(position, page), mask=taken)


@gluon.jit
def _take_listed(
    bins, numbers, digits, digit, want, inside, page, first, lane, warp, out, positions, slots,
    PAGES: gl.constexpr, EACH: gl.constexpr,
):  # fmt: skip
    """What is better than a bin of up to 32, and the best of it."""
    SPAN: gl.constexpr = 32 * EACH
    better = 0 * lane
    for j in gl.static_range(EACH):
        better += (digits[j] < digit).to(gl.int32)
        append(bins, numbers[j].to(gl.uint32, bitcast=True), first + 32 * j, digits[j] == digit)
    earlier = before_warp(bins + BETTER, warp_sum(better), lane, warp)
    mine, position = get_two_words(bins + LISTED + 8 * lane.to(gl.uint32))
    key = turned(mine)
    known = lane < inside
    for i in gl.static_range(32 // gl.num_warps()):
        index = warp + i * gl.num_warps()
        other, other_position = get_two_words(bins + LISTED + 8 * index.to(gl.uint32))
        other_key = turned(other)
        ahead = known & ((key < other_key) | ((key == other_key) & (position < other_position)))
        rank = warp_count(ahead)
        put_two_if(
            bins + TOLD + 0 * lane.to(gl.uint32), other, other_position,
            (lane == 0) & (index < inside) & (rank == want - 1),
        )  # fmt: skip
    gl.thread_barrier()
    limit, last = get_word(bins + TOLD), get_word(bins + TOLD + 4)
    limit_key = turned(limit)
    chosen = known & ((key < limit_key) | ((key == limit_key) & (position <= last)))
    to = out + earlier + warp_count(chosen & (position.to(gl.int32) < warp * SPAN))
    limit, last = limit.to(gl.float32, bitcast=True), last.to(gl.int32)
    for j in gl.static_range(EACH):
        taken = (numbers[j] > limit) | ((numbers[j] == limit) & (first + 32 * j <= last))
        before, number = place(taken)
        _put(taken, to + before, first + 32 * j, page[j], positions, slots, PAGES)
        to += number


@gluon.jit
def _take_counted(
    bins, numbers, digits, digit, want, page, first, thread, lane, warp, out, positions, slots,
    BINS: gl.constexpr, PAGES: gl.constexpr, EACH: gl.constexpr,
):  # fmt: skip
    """What is better than a bin of any size, and the best of it: finds the k-th key."""
    keys = ()
    for j in gl.static_range(EACH):
        keys += (turned(numbers[j]),)
    least = gl.where(digits[0] == digit, keys[0], _DEAD)
    most = gl.where(digits[0] == digit, keys[0] + 1, 0)
    for j in gl.static_range(1, EACH):
        least = gl.minimum(least, gl.where(digits[j] == digit, keys[j], _DEAD))
        # What is not live has the largest key, of which comes zero.
        most = gl.maximum(most, gl.where(digits[j] == digit, keys[j] + 1, 0))
    low, high = gl.min(least, 0), gl.max(most, 0) - 1
    while low < high:
        shift = gl.maximum(highest_bit(high - low) - highest_bit(low * 0 + BINS // 2), 0).to(gl.uint32)
        gl.thread_barrier()
        clear(bins, thread, BINS)
        gl.thread_barrier()
        for j in gl.static_range(EACH):
            inside = (keys[j] >= low) & (keys[j] <= high)
            increment(bins + gl.where(inside, COUNTS + 4 * ((keys[j] - low) >> shift), TRASH))
        digit, want, _inside = found_bin(bins, want, thread, lane, warp, BINS)
        low += digit << shift
        high = gl.minimum(high, low + ((low * 0 + 1) << shift) - 1)
    both = 0 * lane
    for j in gl.static_range(EACH):
        # Two counts in one word: a row has at most 2^14 elements here.
        both += (keys[j] < low).to(gl.int32) + ((keys[j] == low).to(gl.int32) << 16)
    both = before_warp(bins + BETTER, warp_sum(both), lane, warp)
    better, tied = both & 0xFFFF, both >> 16
    for j in gl.static_range(EACH):
        less, tie = keys[j] < low, keys[j] == low
        less_before, less_number = place(less)
        tie_before, tie_number = place(tie)
        rank = tied + tie_before
        taken = less | (tie & (rank < want))
        _put(
            taken, out + better + less_before + gl.minimum(rank, want), first + 32 * j, page[j], positions, slots, PAGES
        )
        better += less_number
        tied += tie_number


@gluon.jit
def short_row_kernel(
    scores, lengths, table, positions, slots,
    N: gl.constexpr, K: gl.constexpr, K_PADDED: gl.constexpr, PAGES: gl.constexpr, WIDTH: gl.constexpr,
    EACH: gl.constexpr, BINS: gl.constexpr,
):  # fmt: skip
    """Grid (rows,): rows of up to EACH scores a thread."""
    row = gl.program_id(0)
    length = gl.minimum(gl.load(lengths + row), N)
    thread = gl.arange(0, 32 * gl.num_warps(), gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    lane, warp = thread % 32, thread // 32
    first = warp * (32 * EACH) + lane
    # Not masked by length, which is still on its way; what lies behind it is never live.
    source = scores + row.to(gl.int64) * N + first
    score, page = (), ()
    for j in gl.static_range(EACH):
        score += (gl.load(source + 32 * j, mask=first + 32 * j < N, other=0.0),)
    for j in gl.static_range(EACH):
        at = (first + 32 * j) // _PAGE
        if PAGES > 0:
            page += (gl.load(table + (row // WIDTH) * PAGES + at, mask=at < PAGES, other=-1),)
        else:
            page += (at,)
    bins = words(BINS)
    clear(bins, thread, BINS)
    put_if(bins + COUNTER + 0 * thread.to(gl.uint32), 0 * thread, thread == 0)
    if length <= K:
        take_all(length, row, positions, slots, table, K, K_PADDED, PAGES, WIDTH)
    else:
        numbers, digits = (), ()
        most = gl.full([32 * gl.num_warps()], float("-inf"), gl.float32, thread.type.layout)
        least = gl.full([32 * gl.num_warps()], float("inf"), gl.float32, thread.type.layout)
        for j in gl.static_range(EACH):
            number = number_of(score[j], first + 32 * j < length)
            numbers += (number,)
            most, least = larger(most, number), smaller(least, number)
        most, scale = range_of(bins, most, least, lane, warp, BINS)
        for j in gl.static_range(EACH):
            digits += (digit_of(numbers[j], most, scale, BINS),)
            increment(bins + COUNTS + 4 * digits[j])
        digit, want, inside = found_bin(bins, K, thread, lane, warp, BINS)
        if inside <= 32:
            _take_listed(
                bins, numbers, digits, digit, want, inside, page, first, lane, warp, row * K, positions, slots, PAGES, EACH
            )  # fmt: skip
        else:
            _take_counted(
                bins, numbers, digits, digit, want, page, first, thread, lane, warp, row * K, positions, slots,
                BINS, PAGES, EACH,
            )  # fmt: skip
