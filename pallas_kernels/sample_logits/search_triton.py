"""Pieces of the kernels: a row's tokens as keys and weights, and the search for a threshold by histograms of digits."""

from __future__ import annotations

import triton
import triton.language as tl

from pallas_kernels.sample_logits import bins_triton as bins
from pallas_kernels.sample_logits import constants as c
from pallas_kernels.sample_logits import noise_triton as noise

NAN = tl.constexpr(-(2**31))
NOTHING = tl.constexpr(-(2**63))
EMPTY_BELOW = tl.constexpr(-0x7F800001)  # order key of minus infinity
_LOG2_E = tl.constexpr(c.LOG2_E)
_SPAN = tl.constexpr(float(c.SPAN))
# Words of a histogram: counts, lower and upper digits of weights.
HISTOGRAM = tl.constexpr(3 * 2048)


@triton.jit
def order_key(x):
    """int32, larger is better: the order of float32 as numbers, both zeros alike, NaN behind everything."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    key = tl.where(bits < 0, -magnitude - 1, bits)
    return tl.where(magnitude > 0x7F800000, NAN, tl.where(magnitude == 0, 0, key))


@triton.jit
def best_of_row(best, row, SLICES: tl.constexpr, PADDED: tl.constexpr):
    """The largest order key of a row."""
    part = tl.arange(0, PADDED)
    return tl.max(tl.load(best + row * SLICES + part, mask=part < SLICES, other=NAN), 0)


@triton.jit
def keys(logits, row, part, best, temperature, VOCAB: tl.constexpr, BLOCK: tl.constexpr):
    """(token, live, key, q, weight) of a slice: key int32, smaller is better; q log2 units below the best, 25 fraction bits."""
    token = part * BLOCK + tl.arange(0, BLOCK)
    live = token < VOCAB
    x = tl.load(logits + row * VOCAB + token, mask=live, other=float("nan")).to(tl.float32)
    order = order_key(x)
    peak = tl.where(best < 0, (-best - 1) | NAN, best).to(tl.float32, bitcast=True)
    infinity = float("inf")
    below = tl.where(order == NAN, infinity, tl.where(order == best, 0.0, peak - x))
    scale = tl.math.div_rn(tl.full((), _LOG2_E, tl.float32), temperature)
    away = tl.where((below == 0.0) | (below == infinity), below, below * scale)
    key = away.to(tl.int32, bitcast=True)
    key = tl.where(key < 0x00800000, 0, key)
    near = away < _SPAN
    q = (tl.where(near, away, 0.0) * 33554432.0).to(tl.int32)
    return token, live, key, q, tl.where(near, noise.weight(q), 0)


@triton.jit
def count_digits(histogram, key, weight, live, SHIFT: tl.constexpr, BITS: tl.constexpr, prefix):
    """Adds one digit of the live keys with that prefix to a row's histogram of counts and weights."""
    table = bins.declare()
    bins.clear(table)
    if SHIFT + BITS < 31:
        live = live & ((key >> (SHIFT + BITS)) == prefix)
    digit = (key >> SHIFT) & ((1 << BITS) - 1)
    bins.add(table, 0, digit, (key * 0 + 1).to(tl.uint32), live)
    bins.add(table, 1, digit, weight & 0x3FFF, live)
    bins.add(table, 2, digit, weight >> 14, live)
    at = tl.arange(0, bins.BINS)
    for plane in tl.static_range(3):
        total = bins.read(table, plane)
        tl.atomic_add(histogram + plane * bins.BINS + at, total, mask=total != 0, sem="relaxed")


@triton.jit
def digit_of(histogram, want, BY_WEIGHT: tl.constexpr):
    """(digit, wanted inside it, weight before it): where the sum of counts or of weights reaches want, int64."""
    at = tl.arange(0, bins.BINS)
    low = tl.load(histogram + bins.BINS + at).to(tl.int64)
    weight = low + tl.load(histogram + 2 * bins.BINS + at).to(tl.int64) * 16384
    amount = weight
    if not BY_WEIGHT:
        amount = tl.load(histogram + at).to(tl.int64)
    total = tl.cumsum(amount, 0)
    digit = tl.sum((total < want).to(tl.int32), 0)
    before = tl.max(tl.where(total < want, total, 0), 0)
    return digit, want - before, tl.sum(tl.where(at < digit, weight, 0), 0)


@triton.jit
def share(total, top_p):
    """ceil(total * floor(top_p * 2^24) / 2^24), at least 1; total int64 below 2^46."""
    part = (tl.minimum(tl.maximum(top_p, 0.0), 1.0) * 16777216.0).to(tl.int64)
    carried = ((total & 0x3FFF) * part + 0x3FFF) >> 14
    return tl.maximum(((total >> 14) * part + carried + 1023) >> 10, 1)


@triton.jit
def weight_of_key(key):
    """int64 weight of a key, a scalar that has one."""
    away = key.to(tl.float32, bitcast=True)
    q = (tl.where(away < _SPAN, away, 0.0) * 33554432.0).to(tl.int32)
    one = noise.weight(tl.full((1,), 0, tl.int32) + q).to(tl.int64)
    return tl.where(away < _SPAN, tl.sum(one, 0), 0)


@triton.jit
def put(state, prefix, wanted, weight):
    """Saves where a search is, for the next launch: five int32."""
    tl.store(state, prefix)
    tl.store(state + 1, (wanted >> 32).to(tl.int32))
    tl.store(state + 2, wanted.to(tl.int32))
    tl.store(state + 3, (weight >> 32).to(tl.int32))
    tl.store(state + 4, weight.to(tl.int32))


@triton.jit
def get(state):
    """(prefix, wanted, weight) that ``put`` saved."""
    wanted = (tl.load(state + 1).to(tl.int64) << 32) | (tl.load(state + 2).to(tl.int64) & 0xFFFFFFFF)
    weight = (tl.load(state + 3).to(tl.int64) << 32) | (tl.load(state + 4).to(tl.int64) & 0xFFFFFFFF)
    return tl.load(state), wanted, weight


@triton.jit
def score(q, token, kept, k0, k1, position):
    """int64 [block], larger is better: the noisy score above, the lower token first; -2^63 where not kept."""
    noisy = noise.gumbel(noise.threefry(k0, k1, position, token.to(tl.uint32))) - q
    return tl.where(kept, (noisy.to(tl.int64) << 32) + (0x7FFFFFFF - token), NOTHING)
