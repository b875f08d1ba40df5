"""The choice of one row among up to 256 experts by counting who is larger; Gluon, SM80 to SM120.

128 threads have two neighbouring experts each. 16 threads rank the 32 that they have; the first 8 of each such group are ranked
among the others' by two threads each. What is read of lower experts stands in a second copy of the keys as the next larger
number, so that "larger than mine" is "not smaller", and of equal ones the lower expert wins.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pallas_kernels.gluon_shared import (
    get_four_numbers,
    get_number,
    get_number_and_word,
    put_if,
    put_two,
    put_two_if,
    warp_barrier,
)

_LARGER = gl.constexpr("set.gt.f32.f32 $0, $1, $2;")
_OTHER = gl.constexpr("shfl.sync.bfly.b32 $0, $1, 1, 31, 0xffffffff;")
_LARGEST = gl.constexpr(3.4028234663852886e38)
# Of shared memory, bytes: keys of 8 groups of 32, twice; keys of the 8 groups' first 8, twice; their scores and experts; the
# scores of the chosen.
_FIRST, _NAMES, _CHOSEN = gl.constexpr(2048), gl.constexpr(2048 + 512), gl.constexpr(2048 + 1024)
SHARED = gl.constexpr(2048 + 1024 + 32)


@gluon.jit
def _larger(a, b):
    """1 where a > b, 0 elsewhere."""
    return gl.inline_asm_elementwise(_LARGER, "=f,f,f", [a, b], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def _above(four, mine):
    return (_larger(four[0], mine) + _larger(four[1], mine)) + (_larger(four[2], mine) + _larger(four[3], mine))


@gluon.jit
def _next(key):
    """The next larger number; keys are never -0 and not above the largest."""
    bits = key.to(gl.int32, bitcast=True)
    return (bits + gl.where(bits < 0, -1, 1)).to(gl.float32, bitcast=True)


@gluon.jit
def key_of(number, known):
    """Numbers to compare: NaN as the largest, what is not known below all."""
    number = gl.where(number == number, gl.minimum(gl.maximum(number, -_LARGEST), _LARGEST), _LARGEST)
    return gl.where(known, number, float("-inf"))


@gluon.jit
def _above_in_own(four, mine, second, SELF: gl.constexpr):
    """Of the four of two neighbouring threads, of which mine is number SELF of the first's or of the second's."""
    above = gl.zeros_like(mine)
    for p in gl.static_range(4):
        lower = second * 2 + SELF > p
        above += gl.where((four[p] > mine) | ((four[p] == mine) & lower), 1.0, 0.0)
    return above


@gluon.jit
def choose_eight(keys, scores, thread, base, K: gl.constexpr):
    """keys, scores: two tensors each, of experts 2 thread and 2 thread + 1. base: of SHARED bytes of shared memory.

    Returns (place of a candidate, not below K where there is none, its expert, its score, the sum of the chosen scores).
    """
    own = base + (thread >> 4) * 256
    put_two(own + (thread & 15) * 8, keys[0], keys[1])
    put_two(own + 128 + (thread & 15) * 8, _next(keys[0]), _next(keys[1]))
    warp_barrier()
    near = own + ((thread & 15) >> 1) * 16
    fours = ()
    for d in gl.static_range(8):
        fours = fours + (get_four_numbers(near + d * 16),)  # noqa: RUF005 (Triton knows no unpacking)
    a = _above_in_own(fours[0], keys[0], thread & 1, 0)
    b = _above_in_own(fours[0], keys[1], thread & 1, 1)
    for d in gl.static_range(1, 8):
        a += _above(fours[d], keys[0])
        b += _above(fours[d], keys[1])
    for e in gl.static_range(2):
        rank = (a if e == 0 else b).to(gl.int32)
        found, at = rank < 8, base + _FIRST + (thread >> 4) * 32 + rank * 4
        put_if(at, keys[e], found)
        put_if(at + 256, _next(keys[e]), found)
        put_two_if(base + _NAMES + (thread >> 4) * 64 + rank * 8, scores[e], thread * 2 + e, found)
    gl.thread_barrier()
    candidate, half = thread >> 1, thread & 1
    at = base + _FIRST + candidate * 4
    mine = get_number(at)
    score, expert = get_number_and_word(base + _NAMES + candidate * 8)
    near = base + _FIRST + (candidate >> 3) * 32 + half * 128
    fours = ()
    for d in gl.static_range(8):
        fours = fours + (get_four_numbers(near + 32 + d * 16),)  # noqa: RUF005
    above = gl.zeros_like(mine)
    for d in gl.static_range(6):
        above += _above(fours[d], mine)
    # The eighth of the other groups is its own again.
    last = _above(fours[6], mine) + _above(fours[7], mine)
    above += gl.where(half == 0, last, 0.0)
    above += gl.inline_asm_elementwise(_OTHER, "=f,f", [above], dtype=gl.float32, is_pure=False, pack=1)
    place = above.to(gl.int32) + (candidate & 7)
    found = (place < 8) & (half == 0)
    chosen = base + _CHOSEN
    put_if(chosen + place * 4, gl.where(place < K, score, 0.0), found)
    gl.thread_barrier()
    s, t = get_four_numbers(chosen + thread * 0), get_four_numbers(chosen + 16 + thread * 0)
    total = ((s[0] + s[1]) + (s[2] + s[3])) + ((t[0] + t[1]) + (t[2] + t[3]))
    return gl.where(found, place, 8), expert, score, total
