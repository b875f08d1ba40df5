"""Conversion to e4m3 in Triton by integer operations: SM80 has no instruction for it, and it is never what a kernel waits for."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_e4m3_bits(x):
    """float32 within +-448 -> e4m3fn bits in int32, round to nearest even."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    # Normal: keep 3 mantissa bits and rebias the exponent from 127 to 7.
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2^-6 the step is 2^-9: adding 1.5 * 2^23 rounds |x| * 2^9 to an integer, half to even.
    scaled = magnitude.to(tl.float32, bitcast=True) * 512.0 + 12582912.0
    small = scaled.to(tl.int32, bitcast=True) - 0x4B400000
    return sign | tl.where(magnitude < 0x3C800000, small, normal)


@triton.jit
def quantize_rows(x):
    """float32 [groups, width] -> (e4m3 bits in int32 [groups, width], scale float32 [groups]).

    The scale is amax * (1/448), as XLA computes amax / 448: the two agree on which way a middle rounds.
    """
    scale = tl.maximum(tl.max(tl.abs(x), 1), 1e-10) * (1.0 / 448.0)
    divisor = tl.broadcast_to(scale[:, None], x.shape)
    return to_e4m3_bits(tl.minimum(tl.maximum(tl.math.div_rn(x, divisor), -448.0), 448.0)), scale


@triton.jit
def from_e4m3(raw):
    """Weights as float32, exactly. uint8 holds e4m3 bits (never NaN) where the GPU cannot convert them: their sign, exponent and
    mantissa move to float32's places, and times 2^120 corrects the bias, subnormals included."""
    if raw.dtype == tl.uint8:
        bits = raw.to(tl.int32)
        wide = (((bits & 0x80) << 24) | ((bits & 0x7F) << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36
    else:
        wide = raw.to(tl.float32)
    return wide
