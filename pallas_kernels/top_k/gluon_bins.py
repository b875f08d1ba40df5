"""Gluon pieces of a radix selection: keys, and a histogram of 11 bits in shared memory.

The histogram is a static shared array that inline PTX declares, with red.shared to count (one ATOMS.POPC.INC a warp and
element, so that equal digits do not serialize): Triton's own histogram counts by ballots, 64 instructions an element for
2048 bins. Each thread holds consecutive elements of a block: with Triton's own choice, one element a thread at a time, a
scan adds up 256 partial sums a thread instead of 16 (8192 scores: 10.9 us against 8.0).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pallas_kernels.top_k.plan import BINS as _PLAN_BINS

BINS = gl.constexpr(_PLAN_BINS)
# Keys of the worst score, minus infinity, and of zero.
_WORST_KEY = gl.constexpr(0xFF000001)
_ZERO_KEY = gl.constexpr(0x7F800000)
# The histogram and, behind it, three words by which one thread tells all others what it found, and one for trash.
_DECLARE = gl.constexpr(f"{{ .shared .align 16 .b32 top_k_bins[{_PLAN_BINS + 4}]; mov.u32 $0, top_k_bins; }}")
_CLEAR = gl.constexpr("{ st.shared.u32 [$1], 0; mov.u32 $0, 0; }")
_LOAD = gl.constexpr("ld.shared.u32 $0, [$1];")
_INCREMENT = gl.constexpr("{ red.shared.add.u32 [$1], 1; mov.u32 $0, 0; }")
# The word that counts what is not live: a predicate would become a branch around every ATOMS.
_TRASH = gl.constexpr(_PLAN_BINS + 3)
_TELL = gl.constexpr(
    f"{{ .reg .pred p; setp.ne.u32 p, $5, 0; @p st.shared.v2.u32 [$1+{4 * _PLAN_BINS}], {{$2, $3}}; "
    f"@p st.shared.u32 [$1+{4 * _PLAN_BINS + 8}], $4; mov.u32 $0, 0; }}"
)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def scan(x):
    """Inclusive prefix sums."""
    return gl.associative_scan(x, 0, _add)


@gluon.jit
def iota(SIZE: gl.constexpr):
    """0 .. SIZE - 1, consecutive elements in a thread; where SIZE >= threads, no element is in two threads."""
    each: gl.constexpr = SIZE // (32 * gl.num_warps()) if 32 * gl.num_warps() < SIZE else 1
    return gl.arange(0, SIZE, gl.BlockedLayout([each], [32], [gl.num_warps()], [0]))


@gluon.jit
def key_of(score):
    """uint32, smaller is better: 0 is infinity, NaN counts as minus infinity, both zeros are alike."""
    bits = score.to(gl.int32, bitcast=True)
    key = gl.where(bits < 0, bits, bits ^ 0x7FFFFFFF).to(gl.uint32, bitcast=True)
    # NaN without a sign is above infinity and wraps; NaN with one is behind minus infinity anyway.
    key = gl.minimum(key - 0x007FFFFF, _WORST_KEY)
    return gl.where(key == _ZERO_KEY + 1, _ZERO_KEY, key)


@gluon.jit
def shared_bins():
    """Address of the histogram; call it once in a kernel."""
    return gl.inline_asm_elementwise(_DECLARE, "=r", [], dtype=gl.uint32, is_pure=False, pack=1)


@gluon.jit
def clear(bins):
    """Zeroes the histogram; consecutive bins in consecutive threads."""
    at = gl.arange(0, BINS, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])).to(gl.uint32)
    gl.inline_asm_elementwise(_CLEAR, "=r,r", [bins + 4 * at], dtype=gl.uint32, is_pure=False, pack=1)
    gl.thread_barrier()


@gluon.jit
def count(bins, digit, live):
    """Adds one to each live element's bin; an element that two threads hold would count twice."""
    address = bins + 4 * gl.where(live, digit, _TRASH)
    gl.inline_asm_elementwise(_INCREMENT, "=r,r", [address], dtype=gl.uint32, is_pure=False, pack=1)


@gluon.jit
def _read(address):
    return gl.inline_asm_elementwise(_LOAD, "=r,r", [address], dtype=gl.uint32, is_pure=False, pack=1).to(gl.int32)


@gluon.jit
def counted(bins):
    """int32 [BINS] of all threads' counts."""
    gl.thread_barrier()
    return _read(bins + 4 * iota(BINS).to(gl.uint32))


@gluon.jit
def bin_of(bins, want):
    """(bin, wanted inside it, elements inside it): where the want-th of the counted elements is; want >= 1."""
    at = iota(BINS)
    inside = counted(bins)
    total = scan(inside)
    found = (total >= want) & (total - inside < want)
    gl.inline_asm_elementwise(
        _TELL, "=r,r,r,r,r,r", [bins + 0 * at.to(gl.uint32), at, want - (total - inside), inside, found.to(gl.int32)],
        dtype=gl.uint32, is_pure=False, pack=1,
    )  # fmt: skip
    gl.thread_barrier()
    said = bins + 4 * BINS
    return _read(said), _read(said + 4), _read(said + 8)


@gluon.jit
def limit_of(bins, key, live, prefix, want):
    """(limit, ties): the k-th key and how many of its equals are taken, given its top 11 bits; key is one block."""
    clear(bins)
    count(bins, (key >> 10) & 0x7FF, live & ((key >> 21) == prefix))
    digit, want, inside = bin_of(bins, want)
    prefix = (prefix << 11) | digit.to(gl.uint32)
    limit = (prefix + 1) << 10
    ties = 0
    # Where a bin is taken as a whole, all its keys are below the next one's first.
    if inside != want:
        clear(bins)
        count(bins, key & 0x3FF, live & ((key >> 10) == prefix))
        digit, want, inside = bin_of(bins, want)
        limit = (prefix << 10) | digit.to(gl.uint32)
        ties = want
    return limit, ties
