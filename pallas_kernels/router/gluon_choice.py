"""The choice of one row among up to 256 experts, and the experts' row lists of up to 8 rows; Gluon, SM80 to SM120.

Every warp of a program holds the keys of all experts, 8 a lane. The lists are made by a program for each row, which tell each other
a bit for every expert.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pallas_kernels.router.gluon_words import GONE, operands, wait_for_each
from pallas_kernels.router.spec import WARPS

_POPC = gl.constexpr("popc.b32 $0, $1;")
# Of [8 rows, 32] words a thread has 8 / WARPS.
_HEAR = gl.constexpr(wait_for_each(8 // WARPS))
_HEAR_OPERANDS = gl.constexpr(operands(8 // WARPS, 8 // WARPS))


@gluon.jit
def _popc(x):
    return gl.inline_asm_elementwise(_POPC, "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def eight(x):
    """8 tensors [1, 32] of one [1, 256]."""
    x = gl.reshape(x, [1, 32, 2, 2, 2])
    a, b = gl.split(x)  # by the lowest bit
    a0, a1 = gl.split(a)
    b0, b1 = gl.split(b)
    e0, e4 = gl.split(a0)
    e2, e6 = gl.split(a1)
    e1, e5 = gl.split(b0)
    e3, e7 = gl.split(b1)
    return e0, e1, e2, e3, e4, e5, e6, e7


@gluon.jit
def _order(a, b):
    return gl.maximum(a, b), gl.minimum(a, b)


@gluon.jit
def _sorted(a, b, c, d, e, f, g, h):
    """The largest of each lane first (Batcher's network)."""
    a, b = _order(a, b)
    c, d = _order(c, d)
    e, f = _order(e, f)
    g, h = _order(g, h)
    a, c = _order(a, c)
    b, d = _order(b, d)
    e, g = _order(e, g)
    f, h = _order(f, h)
    b, c = _order(b, c)
    f, g = _order(f, g)
    a, e = _order(a, e)
    b, f = _order(b, f)
    c, g = _order(c, g)
    d, h = _order(d, h)
    c, e = _order(c, e)
    d, f = _order(d, f)
    b, c = _order(b, c)
    d, e = _order(d, e)
    f, g = _order(f, g)
    return a, b, c, d, e, f, g, h


@gluon.jit
def _quick_places(keys, rounds, K: gl.constexpr):
    """Of 8 tensors [1, lanes] of keys: the place of each among the K largest, 15 for the others; and 1 where that may be wrong.

    The lower three bits of a key make room for its number in the lane, so two keys that differ in them alone are too close. Each
    lane's keys are sorted first: a round is the largest of the lanes' heads. One round more tells what the last place was won from.
    """
    named = ()
    for j in gl.static_range(8):
        named = named + ((keys[j] & -8) | (7 - j),)  # noqa: RUF005 (Triton knows no unpacking)
    a, b, c, d, e, f, g, h = _sorted(named[0], named[1], named[2], named[3], named[4], named[5], named[6], named[7])
    packed, taken = gl.zeros_like(a), gl.zeros_like(a)
    layout: gl.constexpr = a.type.layout
    last = gl.zeros([1, 1], gl.int32, layout)
    close = last
    for i in range(rounds + 1):
        best = gl.max(a, 1)[:, None]
        found = a == best
        packed |= gl.where(found, (i + 1) << ((7 - (best & 7)) * 4), 0)
        taken += found.to(gl.int32)
        close |= (((best ^ last) & -8) == 0).to(gl.int32)
        last = best
        a, b, c, d = gl.where(found, b, a), gl.where(found, c, b), gl.where(found, d, c), gl.where(found, e, d)
        e, f, g, h = gl.where(found, f, e), gl.where(found, g, f), gl.where(found, h, g), gl.where(found, GONE, h)
    places = ()
    for j in gl.static_range(8):
        places = places + (((packed >> (4 * j)) - 1) & 15,)  # noqa: RUF005
    # Of equal heads both were taken.
    return places, gl.max(gl.max(close, 1), 0) | (gl.max(gl.sum(taken, 1), 0) != K + 1).to(gl.int32)


@gluon.jit
def _largest(k):
    return gl.maximum(
        gl.maximum(gl.maximum(k[0], k[1]), gl.maximum(k[2], k[3])),
        gl.maximum(gl.maximum(k[4], k[5]), gl.maximum(k[6], k[7])),
    )


@gluon.jit
def _exact_places(keys, lane, rounds, K: gl.constexpr):
    """Of 8 tensors [1, lanes] of keys: the place of each among the K largest, K for the others; of equal ones the lower expert."""
    places = ()
    for j in gl.static_range(8):
        places = places + (gl.zeros_like(keys[j]) + K,)  # noqa: RUF005
    for i in range(rounds):
        best = gl.max(_largest(keys), 1)[:, None]
        lowest = gl.zeros_like(keys[0]) + 256
        for j in gl.static_range(8):
            lowest = gl.minimum(lowest, gl.where(keys[j] == best, lane * 8 + j, 256))
        one = gl.min(lowest, 1)[:, None]
        left, named = (), ()
        for j in gl.static_range(8):
            mine = lane * 8 + j == one
            left = left + (gl.where(mine, GONE, keys[j]),)  # noqa: RUF005
            named = named + (gl.where(mine, i, places[j]),)  # noqa: RUF005
        keys, places = left, named
    return places


@gluon.jit
def places_of(keys, lane, rounds, K: gl.constexpr):
    """Of 8 tensors [1, lanes] of keys: the place of each among the K largest, not below K for the others; of equal ones the lower
    expert first. rounds: K, but no constant, so that loops stay loops."""
    if K <= 13:
        places, doubtful = _quick_places(keys, rounds, K)
        if doubtful != 0:
            places = _exact_places(keys, lane, rounds, K)
    else:
        places = _exact_places(keys, lane, rounds, K)
    return places


@gluon.jit
def store_choice(places, scores, lane, ids, weights, K: gl.constexpr, SCALE: gl.constexpr):
    """ids and weights [K] of a row whose scores are 8 tensors [1, lanes]."""
    share = gl.zeros_like(scores[0])
    for j in gl.static_range(8):
        share += gl.where(places[j] < K, scores[j], 0.0)
    factor = (SCALE / (gl.sum(share, 1) + 1e-20))[:, None]
    for j in gl.static_range(8):
        gl.store(ids + places[j], lane * 8 + j + gl.zeros_like(places[j]), mask=places[j] < K)
        gl.store(weights + places[j], scores[j] * factor, mask=places[j] < K)


@gluon.jit
def tell(places, told, number, ROWS: gl.constexpr, K: gl.constexpr):
    """A row's chosen experts, a bit each and 256 in the word of a lane, to all rows: told [ROWS readers, ROWS, 32]."""
    to_all: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [gl.num_warps(), 1], [1, 0])
    bits = gl.zeros_like(places[0]) + 256
    for j in gl.static_range(8):
        bits += (places[j] < K).to(gl.int32) << j
    reader = gl.arange(0, 8, gl.SliceLayout(1, to_all))[:, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, to_all))[None, :]
    said = gl.convert_layout(gl.max(bits, 0), gl.SliceLayout(0, to_all))[None, :] + reader * 0
    gl.atomic_xchg(told + ((reader * ROWS + number) * 32 + lane), said, mask=reader < ROWS, sem="relaxed", scope="gpu")


@gluon.jit
def hear(told, number, ROWS: gl.constexpr):
    """What all rows told row ``number``: bytes of rows 0 to 3 and of rows 4 to 7 [1, 32] of the lanes, in a layout of [8, 32]."""
    from_all: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [gl.num_warps(), 1], [1, 0])
    tall: gl.constexpr = gl.BlockedLayout([8, 1], [1, 32], [1, gl.num_warps()], [1, 0])
    to: gl.constexpr = gl.SliceLayout(0, from_all)
    row = gl.arange(0, 8, gl.SliceLayout(1, from_all))[:, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, from_all))[None, :]
    words = gl.inline_asm_elementwise(
        _HEAR, _HEAR_OPERANDS, [told + ((number * ROWS + row) * 32 + lane), (row + lane * 0 < ROWS).to(gl.int32)],
        dtype=gl.int32, is_pure=False, pack=8 // gl.num_warps(),
    )  # fmt: skip
    words = gl.convert_layout(words, tall) & 255
    row = gl.arange(0, 8, gl.SliceLayout(1, tall))[:, None]
    low = gl.sum(gl.where(row < 4, words << (row * 8), 0), 0)
    high = gl.sum(gl.where(row < 4, 0, words << ((row & 3) * 8)), 0)
    return gl.convert_layout(low, to)[None, :], gl.convert_layout(high, to)[None, :]


@gluon.jit
def bits_ahead(places, number):
    """Of each of a row's pairs, what may stand in front of it among all: bits as ``hear`` gives them [8 pairs, 32]."""
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [gl.num_warps(), 1], [1, 0])
    pair = gl.arange(0, 8, gl.SliceLayout(1, layout))[:, None]
    lane = gl.arange(0, 32, gl.SliceLayout(0, layout))[None, :]
    own = lane * 0 + pair * 0
    for j in gl.static_range(8):
        place = gl.convert_layout(gl.max(places[j], 0), gl.SliceLayout(0, layout))[None, :]
        own = gl.where(place == pair, lane * 8 + (j + 1), own)
    ahead = gl.max(own, 1)[:, None] - 1 - lane * 8
    whole = ((1 << gl.minimum(gl.maximum(ahead, 0), 8)) - 1) * 0x01010101
    # Of the expert itself, rows above.
    same = gl.where((ahead >= 0) & (ahead < 8), (1 << (ahead & 7)) * 0x01010101, 0)
    above_low = (1 << (gl.minimum(number, 3) * 8)) - 1 if number < 4 else -1
    above_high = 0 if number < 4 else (1 << ((number - 4) * 8)) - 1
    return whole | (same & above_low), whole | (same & above_high)


@gluon.jit
def list_rows(
    ahead_low, ahead_high, low, high, number, table, order, ROWS: gl.constexpr, EXPERTS: gl.constexpr, K: gl.constexpr,
):  # fmt: skip
    """What ``experts``' plan makes of all choices, where an item is all rows of an expert.

    Here the places of row ``number``'s pairs among those sorted by expert, and the pairs and items up to and with every ROWS-th
    expert of a lane.
    """
    layout: gl.constexpr = ahead_low.type.layout
    pair = gl.arange(0, 8, gl.SliceLayout(1, layout))
    lane = gl.arange(0, 32, gl.SliceLayout(0, layout))[None, :]
    before = gl.sum(_popc(low & ahead_low) + _popc(high & ahead_high), 1)
    gl.store(order + before, number * K + pair, mask=pair < K)
    some = low | high
    some |= some >> 16
    some |= (some >> 8) & 0x00FFFFFF
    some &= 255
    total = _popc(low) + _popc(high) + _popc(some) * 65536 + pair[:, None] * 0
    start = gl.associative_scan(total, 1, _add) - total
    for j in range(number, 8, ROWS):
        upto = (2 << j) - 1 + lane * 0
        pairs = (start & 65535) + _popc(low & (upto * 0x01010101)) + _popc(high & (upto * 0x01010101))
        items = (start >> 16) + _popc(some & upto)
        here = (pair[:, None] < 2) & (lane * 8 + j < EXPERTS)
        at = pair[:, None] * EXPERTS + lane * 8 + j
        gl.store(table + at, gl.where(pair[:, None] == 0, pairs, items), mask=here)
