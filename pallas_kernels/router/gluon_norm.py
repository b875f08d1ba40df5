"""Residual add and RMSNorm of a row by a program, and the row as two e4m3 terms; Gluon, SM80 to SM120 (terms from SM89)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pallas_kernels.router.gluon_words import word


@gluon.jit
def load_row(x, delta, row, HIDDEN: gl.constexpr, ADD: gl.constexpr, CHUNK: gl.constexpr):
    """Chunks of a row and of what is added to it."""
    lane = gl.arange(0, CHUNK, gl.BlockedLayout([8], [32], [gl.num_warps()], [0]))
    rows, deltas = (), ()
    for c in gl.static_range(HIDDEN // CHUNK):
        at = row * HIDDEN + c * CHUNK + lane
        rows = rows + (gl.load(x + at),)  # noqa: RUF005 (Triton knows no unpacking)
        deltas = deltas + (gl.load(delta + at) if ADD else 0,)  # noqa: RUF005
    return rows, deltas


@gluon.jit
def sum_row(
    rows, deltas, HIDDEN: gl.constexpr, EPS: gl.constexpr, ADD: gl.constexpr, NORM: gl.constexpr, CHUNK: gl.constexpr
):
    """Chunks of the row's sum, and its 1 / RMS."""
    sums = ()
    squares = gl.zeros([CHUNK], gl.float32, gl.BlockedLayout([8], [32], [gl.num_warps()], [0]))
    for c in gl.static_range(HIDDEN // CHUNK):
        y = rows[c]
        if ADD:
            y = (y.to(gl.float32) + deltas[c].to(gl.float32)).to(y.dtype)
        sums = sums + (y,)  # noqa: RUF005
        squares += y.to(gl.float32) * y.to(gl.float32)
    return sums, gl.rsqrt(gl.sum(squares, 0) / HIDDEN + EPS) if NORM else 0.0


@gluon.jit
def _store_terms(normed, row, first, values, scales):
    """A chunk of a row as two e4m3 terms by groups of 128, from group ``first`` on: values [groups, 16, 128], scales
    [groups, 8]."""
    groups = gl.reshape(normed.to(gl.float32), [normed.shape[0] // 128, 128])
    layout: gl.constexpr = groups.type.layout
    amax = gl.max(gl.maximum(groups, -groups), 1)
    # A power of two, so that the terms are exact; amax / scale is in (224, 448].
    bits = (gl.maximum(amax, 7.888609052210118e-31) * (1.0 / 448.0)).to(gl.int32, bitcast=True)
    bits = (bits + 0x7FFFFF) & 0x7F800000
    quotient = groups * (0x7F000000 - bits).to(gl.float32, bitcast=True)[:, None]
    high = quotient.to(gl.float8e4nv)
    low = ((quotient - high.to(gl.float32)) * 16.0).to(gl.float8e4nv)
    group = first + gl.arange(0, normed.shape[0] // 128, gl.SliceLayout(1, layout))
    at = values + (group * 2048 + row * 128)[:, None] + gl.arange(0, 128, gl.SliceLayout(0, layout))[None, :]
    gl.store(at, high)
    gl.store(at + 1024, low)
    gl.store(scales + group * 8 + row, bits.to(gl.float32, bitcast=True))


@gluon.jit
def norm_row(
    x, delta, norm, inverses, total, normed, values, scales, row, always,
    HIDDEN: gl.constexpr, EPS: gl.constexpr, ADD: gl.constexpr, NORM: gl.constexpr, CHUNK: gl.constexpr, SPLIT: gl.constexpr,
    TELL: gl.constexpr, PROGRAMS: gl.constexpr, BP: gl.constexpr, BM: gl.constexpr,
):  # fmt: skip
    """One row of total and normed [rows, HIDDEN], and its terms; with TELL its 1 / RMS into inverses [PROGRAMS, BM]."""
    lane = gl.arange(0, CHUNK, gl.BlockedLayout([8], [32], [gl.num_warps()], [0]))
    rows, deltas = load_row(x, delta, row, HIDDEN, ADD, CHUNK)
    factors = ()
    for c in gl.static_range(HIDDEN // CHUNK):
        factors = factors + (gl.load(norm + c * CHUNK + lane) if NORM else 0,)  # noqa: RUF005
    # ptxas would load norm behind the sum; it moves no load across a barrier.
    gl.thread_barrier()
    sums, inverse = sum_row(rows, deltas, HIDDEN, EPS, ADD, NORM, CHUNK)
    if TELL:
        # A word for each who waits: hundreds of warps that look at one would wait for each other.
        to = gl.arange(0, BP, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
        said = word(inverse) + to * 0
        gl.atomic_xchg(inverses + to * BM + row, said, mask=to < PROGRAMS, sem="relaxed", scope="gpu")
    # Always so. ptxas would put what waits for norm, which comes from far, in front of the words; but nothing in front of a branch.
    if always > 0:
        for c in gl.static_range(HIDDEN // CHUNK):
            at = row * HIDDEN + c * CHUNK + lane
            if ADD:
                gl.store(total + at, sums[c])
            if NORM:
                z = (sums[c].to(gl.float32) * inverse * factors[c].to(gl.float32)).to(sums[c].dtype)
                gl.store(normed + at, z)
                if SPLIT:
                    _store_terms(z, row, c * (CHUNK // 128), values, scales)
