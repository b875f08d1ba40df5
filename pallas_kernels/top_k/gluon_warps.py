"""Gluon pieces of a selection that one program makes: values of a warp's lanes, and a few words of shared memory.

A tensor has one element a thread. Everything goes through shared memory of the kernel's own, so that a program waits for itself
only where it must: Triton's reductions and scans wait twice each.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pallas_kernels.gluon_shared import get_four_counts, get_two_words, get_word, put_if, put_two_if

# Bytes: what one thread tells all; a counter, and a word that counts what is not looked for; then 32 values a list, or 32
# pairs; the histogram.
TOLD = gl.constexpr(0)
COUNTER = gl.constexpr(16)
TRASH = gl.constexpr(28)
RANGES = gl.constexpr(32)
TOTALS = gl.constexpr(288)
BETTER = gl.constexpr(416)
LISTED = gl.constexpr(544)
COUNTS = gl.constexpr(800)


@gluon.constexpr_function
def _declare(BINS):
    return f"{{ .shared .align 16 .b32 top_k_words[{BINS + 200}]; mov.u32 $0, top_k_words; }}"


_CLEAR = gl.constexpr("{ .reg .u32 z; mov.u32 z, 0; st.shared.v4.u32 [$1], {z, z, z, z}; mov.u32 $0, 0; }")
_INCREMENT = gl.constexpr("{ red.shared.add.u32 [$1], 1; mov.u32 $0, 0; }")
_PUT_THREE_IF = gl.constexpr(
    "{ .reg .pred p; setp.ne.u32 p, $5, 0; @p st.shared.v4.u32 [$1], {$2, $3, $4, $4}; mov.b32 $0, 0; }"
)
# 16 and 544: the counter and the list.
_APPEND = gl.constexpr(
    "{ .reg .pred p; .reg .u32 i; setp.ne.u32 p, $4, 0; @!p bra behind; atom.shared.add.u32 i, [$1+16], 1; "
    "mad.lo.u32 i, i, 8, $1; st.shared.v2.u32 [i+544], {$2, $3}; behind: mov.u32 $0, 0; }"
)
_SUM = gl.constexpr("redux.sync.add.u32 $0, $1, 0xffffffff;")
_LEAST = gl.constexpr("redux.sync.min.u32 $0, $1, 0xffffffff;")
_MOST = gl.constexpr("redux.sync.max.u32 $0, $1, 0xffffffff;")
_SCAN = gl.constexpr(
    "{ .reg .u32 t; .reg .pred p; mov.u32 $0, $1; "
    + " ".join(f"shfl.sync.up.b32 t|p, $0, {1 << i}, 0, 0xffffffff; @p add.u32 $0, $0, t;" for i in range(5))
    + " }"
)
_PLACE = gl.constexpr(
    "{ .reg .pred p; .reg .u32 m, l; setp.ne.u32 p, $2, 0; vote.sync.ballot.b32 m, p, 0xffffffff; popc.b32 $1, m; "
    "mov.u32 l, %lanemask_lt; and.b32 m, m, l; popc.b32 $0, m; }"
)
_COUNT = gl.constexpr(
    "{ .reg .pred p; .reg .u32 m; setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 m, p, 0xffffffff; popc.b32 $0, m; }"
)
# NaN is minus infinity; adding zero makes both zeros alike.
_NUMBER = gl.constexpr("{ .reg .f32 f; max.f32 f, $1, 0fFF800000; add.f32 $0, f, 0f00000000; }")
_LARGER = gl.constexpr("max.f32 $0, $1, $2;")
_SMALLER = gl.constexpr("min.f32 $0, $1, $2;")
_HIGHEST_BIT = gl.constexpr("bfind.u32 $0, $1;")
_DEAD = gl.constexpr(0xFFFFFFFF)


@gluon.constexpr_function
def _hex(n):
    """PTX's float of a whole number."""
    e = n.bit_length() - 1
    return f"0f{((127 + e) << 23) | ((n - (1 << e)) << (23 - e)):08X}"


@gluon.constexpr_function
def _scale(BINS):
    return f"{{ .reg .f32 f; sub.f32 f, $1, $2; rcp.approx.f32 f, f; mul.f32 $0, f, {_hex(BINS - 2)}; }}"


@gluon.constexpr_function
def _digit(BINS):
    return f"{{ .reg .f32 f; sub.f32 f, $2, $1; mul.f32 f, f, $3; min.f32 f, f, {_hex(BINS - 1)}; cvt.rzi.u32.f32 $0, f; }}"


@gluon.jit
def words(BINS: gl.constexpr):
    """Address of the kernel's shared memory; call it once in a kernel."""
    return gl.inline_asm_elementwise(_declare(BINS), "=r", [], dtype=gl.uint32, is_pure=False, pack=1)


@gluon.jit
def clear(at, thread, BINS: gl.constexpr):
    """Zeroes the histogram, four bins a thread and store."""
    for i in gl.static_range(BINS // (128 * gl.num_warps())):
        target = at + COUNTS + 16 * (thread + i * 32 * gl.num_warps()).to(gl.uint32)
        gl.inline_asm_elementwise(_CLEAR, "=r,r", [target], dtype=gl.uint32, is_pure=False, pack=1)


@gluon.jit
def increment(at):
    gl.inline_asm_elementwise(_INCREMENT, "=r,r", [at], dtype=gl.uint32, is_pure=False, pack=1)


@gluon.jit
def put_three_if(at, a, b, c, where):
    gl.inline_asm_elementwise(
        _PUT_THREE_IF, "=r,r,r,r,r,r", [at, a, b, c, where.to(gl.int32)], dtype=gl.uint32, is_pure=False, pack=1
    )


@gluon.jit
def append(at, key, position, where):
    """To the list of at most 32, in any order."""
    gl.inline_asm_elementwise(
        _APPEND, "=r,r,r,r,r", [at, key, position, where.to(gl.int32)], dtype=gl.uint32, is_pure=False, pack=1
    )


@gluon.jit
def warp_sum(x):
    return gl.inline_asm_elementwise(_SUM, "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def warp_scan(x):
    """Inclusive."""
    return gl.inline_asm_elementwise(_SCAN, "=&r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def place(where):
    """(how many lanes before this one, how many of the warp)."""
    return gl.inline_asm_elementwise(
        _PLACE, "=&r,=&r,r", [where.to(gl.int32)], dtype=(gl.int32, gl.int32), is_pure=False, pack=1
    )


@gluon.jit
def warp_count(where):
    return gl.inline_asm_elementwise(_COUNT, "=r,r", [where.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def before_warp(at, total, lane, warp):
    """The totals of the warps before; at: where the warps' totals go."""
    put_if(at + 4 * warp.to(gl.uint32), total, lane == 0)
    gl.thread_barrier()
    return warp_sum(gl.where(lane < warp, get_word(at + 4 * lane.to(gl.uint32)).to(gl.int32), 0))


@gluon.jit
def turned(bits):
    """uint32 bits of numbers to keys, smaller is better, and back."""
    bits = bits.to(gl.int32, bitcast=True)
    return (bits ^ (((bits >> 31) ^ -1) & 0x7FFFFFFF)).to(gl.uint32, bitcast=True)


@gluon.jit
def number_of(score, live):
    """What is compared; a NaN that no other score has where it is not live."""
    number = gl.inline_asm_elementwise(_NUMBER, "=f,f", [score], dtype=gl.float32, is_pure=True, pack=1)
    return gl.where(live, number.to(gl.uint32, bitcast=True), _DEAD).to(gl.float32, bitcast=True)


@gluon.jit
def larger(a, b):
    return gl.inline_asm_elementwise(_LARGER, "=f,f,f", [a, b], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def smaller(a, b):
    return gl.inline_asm_elementwise(_SMALLER, "=f,f,f", [a, b], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def range_of(at, most, least, lane, warp, BINS: gl.constexpr):
    """(largest of the program's numbers, bins a unit)."""
    best = gl.inline_asm_elementwise(_LEAST, "=r,r", [turned(most)], dtype=gl.uint32, is_pure=False, pack=1)
    worst = gl.inline_asm_elementwise(_MOST, "=r,r", [turned(least)], dtype=gl.uint32, is_pure=False, pack=1)
    put_two_if(at + RANGES + 8 * warp.to(gl.uint32), best, worst, lane == 0)
    gl.thread_barrier()
    best, worst = get_two_words(at + RANGES + 8 * (lane % gl.num_warps()).to(gl.uint32))
    best = gl.inline_asm_elementwise(_LEAST, "=r,r", [best], dtype=gl.uint32, is_pure=False, pack=1)
    worst = gl.inline_asm_elementwise(_MOST, "=r,r", [worst], dtype=gl.uint32, is_pure=False, pack=1)
    most, least = turned(best).to(gl.float32, bitcast=True), turned(worst).to(gl.float32, bitcast=True)
    scale = gl.inline_asm_elementwise(_scale(BINS), "=f,f,f", [most, least], dtype=gl.float32, is_pure=True, pack=1)
    return most, scale


@gluon.jit
def digit_of(number, most, scale, BINS: gl.constexpr):
    """Bin of a number, never smaller for a smaller number; what is not live is in the last bin."""
    return gl.inline_asm_elementwise(
        _digit(BINS), "=r,f,f,f", [number, most, scale], dtype=gl.uint32, is_pure=True, pack=1
    )


@gluon.jit
def highest_bit(x):
    return gl.inline_asm_elementwise(_HIGHEST_BIT, "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def found_bin(at, want, thread, lane, warp, BINS: gl.constexpr):
    """(bin, wanted inside it, elements inside it): where the want-th of the counted elements is."""
    EACH: gl.constexpr = BINS // (128 * gl.num_warps())
    gl.thread_barrier()
    inside = ()
    total = 0 * thread
    for i in gl.static_range(EACH):
        four = get_four_counts(at + COUNTS + 16 * (thread * EACH + i).to(gl.uint32))
        inside += (four[0], four[1], four[2], four[3])
        total += four[0] + four[1] + four[2] + four[3]
    to = warp_scan(total)
    # The last lane's is the warp's.
    put_if(at + TOTALS + 4 * warp.to(gl.uint32), to, lane == 31)
    gl.thread_barrier()
    earlier = gl.where(lane < warp, get_word(at + TOTALS + 4 * lane.to(gl.uint32)).to(gl.int32), 0)
    before = warp_sum(earlier) + to - total
    for i in gl.static_range(4 * EACH):
        found = (before < want) & (before + inside[i] >= want)
        put_three_if(at + TOLD + 0 * thread.to(gl.uint32), thread * (4 * EACH) + i, want - before, inside[i], found)
        before += inside[i]
    gl.thread_barrier()
    told = at + TOLD
    return get_word(told), get_word(told + 4).to(gl.int32), get_word(told + 8).to(gl.int32)
