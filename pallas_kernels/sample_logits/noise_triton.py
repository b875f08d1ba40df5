"""Integer functions of the kernels: ``noise`` in Triton, the same to the bit."""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.sample_logits import constants as c

_PARITY = tl.constexpr(c.PARITY)
_ROTATIONS = tl.constexpr(c.ROTATIONS)
_EXP2, _LOG2, _RATIO = tl.constexpr(c.EXP2), tl.constexpr(c.LOG2), tl.constexpr(c.RATIO)


@triton.jit
def _constant(x, VALUE: tl.constexpr):
    return tl.full(x.shape, VALUE, tl.uint32)


@triton.jit
def polynomial(C: tl.constexpr, SIZE: tl.constexpr, r, ALTERNATING: tl.constexpr):
    """Value in the coefficients' format at r, Q0.32."""
    total = _constant(r, C[SIZE - 1])
    for i in tl.static_range(1, SIZE):
        term = tl.umulhi(total, r)
        total = _constant(r, C[SIZE - 1 - i]) - term if ALTERNATING else _constant(r, C[SIZE - 1 - i]) + term
    return total


@triton.jit
def _rotated(x, LEFT: tl.constexpr):
    return (x << LEFT) | (x >> (32 - LEFT))


@triton.jit
def threefry(k0, k1, position, token):
    """First word of Threefry-2x32-20; all uint32, token a block."""
    k2 = k0 ^ k1 ^ tl.full((), _PARITY, tl.uint32)
    a = token * 0 + (position + k0)
    b = token + k1
    for group in tl.static_range(5):
        for i in tl.static_range(4):
            a = a + b
            b = _rotated(b, _ROTATIONS[4 * (group % 2) + i]) ^ a
        if group % 3 == 0:
            a, b = a + k1, b + k2
        elif group % 3 == 1:
            a, b = a + k2, b + k0
        else:
            a, b = a + k0, b + k1
        b += group + 1
    return a


@triton.jit
def weight(q):
    """uint32, round(2^28 * 2^-y) for y = q / 2^25 in [0, 29); q int32."""
    q = q.to(tl.uint32)
    value = polynomial(_EXP2, 6, q << 7, True)
    shift = (q >> 25) + 3
    return (value + (_constant(q, 1) << (shift - 1))) >> shift


@triton.jit
def log2(n):
    """(whole part int32, fraction uint32 Q2.30) of log2 of a positive uint32."""
    # Without the bit below the first one, the conversion never rounds up to the next power of two.
    first = (n & ((n >> 1) ^ 0xFFFFFFFF)).to(tl.float32).to(tl.int32, bitcast=True)
    whole = (first >> 23) - 127
    r = (n << (31 - whole).to(tl.uint32)) << 1
    return whole, tl.umulhi(polynomial(_LOG2, 9, r, True), r)


@triton.jit
def gumbel(bits):
    """int32, G = -log2(-log2(1 - x)) with 25 fraction bits, x = (bits | 1) / 2^32."""
    x = bits | 1
    upper = x >= 0x80000000
    whole, fraction = log2(tl.where(upper, _constant(x, 0) - x, x))
    ratio = polynomial(_RATIO, 9, tl.where(upper, _constant(x, 0), x), False)
    below = (whole - 32) * 33554432 + ((fraction + ratio) >> 5).to(tl.int32)
    rate = ((32 - whole).to(tl.uint32) << 26) - (fraction >> 4)
    whole, fraction = log2(rate)
    above = (whole - 26) * 33554432 + (fraction >> 5).to(tl.int32)
    return -tl.where(upper, above, below)
