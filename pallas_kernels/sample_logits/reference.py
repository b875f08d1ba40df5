"""Reference of sample_logits in jnp: anywhere without a sort, on NVIDIA GPUs without a loop; elementwise passes and reductions.

Every cut keeps a prefix of the ranking, so a threshold is all there is to find: bit by bit, by counting or weighing the
tokens up to a candidate.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.lowering import default_arch
from pallas_kernels.sample_logits import constants as c
from pallas_kernels.sample_logits import noise
from pallas_kernels.sample_logits.spec import Spec

U32 = jnp.uint32
Mass = tuple[jax.Array, jax.Array]  # uint32 digits of a sum of weights: above DIGIT bits, and those bits
_LOW = (1 << c.DIGIT) - 1
_NAN = jnp.iinfo(jnp.int32).min
_MINUS_INF, _INF = -0x7F800001, 0x7F800000


def order_key(logits: jax.Array) -> jax.Array:
    """int32, larger is better: the order of float32 as numbers, both zeros alike, NaN behind everything."""
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    magnitude = bits & 0x7FFFFFFF
    ordered = jnp.where(bits < 0, -magnitude - 1, bits)
    return jnp.where(magnitude > _INF, _NAN, jnp.where(magnitude == 0, 0, ordered))


def distance(logits: jax.Array, order: jax.Array, temperature: jax.Array) -> jax.Array:
    """float32 [rows, vocab]: how far below the best a token is, in log2 units after division by the temperature; inf for NaN."""
    best = jnp.max(order, axis=1, keepdims=True)
    peak = jax.lax.bitcast_convert_type(jnp.where(best < 0, (-best - 1) | _NAN, best), jnp.float32)
    below = jnp.where(order == _NAN, jnp.inf, jnp.where(order == best, 0.0, peak - logits))
    scaled = below * (jnp.float32(c.LOG2_E) / temperature)[:, None]
    return jnp.where((below == 0) | (below == jnp.inf), below, scaled)


def normal(high: jax.Array, low: jax.Array) -> Mass:
    return high + (low >> U32(c.DIGIT)), low & U32(_LOW)


def mass(weights: jax.Array, kept: jax.Array) -> Mass:
    """Sum of the kept weights of each row."""
    kept_weights = jnp.where(kept, weights, U32(0))
    high = jnp.sum(kept_weights >> U32(c.DIGIT), axis=1, dtype=U32)
    return normal(high, jnp.sum(kept_weights & U32(_LOW), axis=1, dtype=U32))


def at_least(a: Mass, b: Mass) -> jax.Array:
    return (a[0] > b[0]) | ((a[0] == b[0]) & (a[1] >= b[1]))


def smallest(bits: int, rows: int, enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """int32 [rows]: the smallest number below 2^bits that is ``enough``, which is monotone and true of 2^bits - 1.

    On an NVIDIA GPU unrolled, because a loop would split the CUDA graph; elsewhere a loop, which compiles in a tenth of the time.
    """

    def halve(i: jax.Array | int, found: jax.Array) -> jax.Array:
        step = jnp.left_shift(jnp.int32(1), (bits - 1 - i))
        return jnp.where(enough(found + step - 1), found, found + step)

    found = jnp.zeros((rows,), jnp.int32)
    if default_arch() is None:
        # The carry varies over a mesh as what is asked about does, from the start.
        return jax.lax.fori_loop(0, bits, halve, jnp.where(enough(found), found, 0))
    for i in range(bits):
        found = halve(i, found)
    return found


def share(total: Mass, top_p: jax.Array) -> Mass:
    """ceil(total * floor(top_p * 2^24) / 2^24), at least 1."""
    part = (jnp.clip(top_p, 0.0, 1.0) * 2.0**24).astype(U32)
    product = total[1] * (part >> U32(12))
    carried = (product >> U32(2)) + (
        (((product & U32(3)) << U32(12)) + total[1] * (part & U32(0xFFF)) + U32(_LOW)) >> U32(c.DIGIT)
    )
    added = total[0] * part + (carried + U32(1023))
    high = noise.mulhi(total[0], part) + (added < carried + U32(1023)).astype(U32)
    wanted = (high << U32(8)) | (added >> U32(24)), (added >> U32(10)) & U32(_LOW)
    return wanted[0], jnp.where((wanted[0] | wanted[1]) == 0, U32(1), wanted[1])


def prefix(key: jax.Array, weights: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """bool [rows, vocab]: what top_k and, of its mass, top_p keep; key int32, smaller is better, equal ones by token."""
    rows, vocab = key.shape
    count = jnp.where((top_k <= 0) | (top_k > vocab), vocab, top_k)

    def counted(limit: jax.Array) -> jax.Array:
        return jnp.sum((key <= limit[:, None]).astype(jnp.int32), axis=1)

    limit = smallest(31, rows, lambda limit: counted(limit) >= count)
    better, ties = key < limit[:, None], key == limit[:, None]
    tied = (count - jnp.sum(better.astype(jnp.int32), axis=1)).astype(U32)
    tie = jnp.max(jnp.where(ties, weights, U32(0)), axis=1)
    high, low = mass(weights, better)
    # At most 2^18 - 1 ties of a digit below 2^14, and that digit again: below 2^32.
    total = normal(high + tied * (tie >> U32(c.DIGIT)), low + tied * (tie & U32(_LOW)))
    wanted = share(total, top_p)
    limit = smallest(31, rows, lambda limit: at_least(mass(weights, key <= limit[:, None]), wanted))[:, None]
    token = jnp.arange(vocab, dtype=jnp.int32)[None, :]

    def kept(last: jax.Array) -> jax.Array:
        return (key < limit) | ((key == limit) & (token <= last[:, None]))

    return kept(smallest(18, rows, lambda last: at_least(mass(weights, kept(last)), wanted)))


def first_of_largest(value: jax.Array) -> jax.Array:
    """int32 [rows]: the lowest index of each row's maximum."""
    index = jnp.arange(value.shape[1], dtype=jnp.int32)[None, :]
    return jnp.min(jnp.where(value == jnp.max(value, axis=1, keepdims=True), index, value.shape[1]), axis=1)


def drawn(
    logits: jax.Array,
    order: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    key: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """Tokens int32 [rows] of rows whose temperature is above 0."""
    away = distance(logits, order, temperature)
    ranking = jax.lax.bitcast_convert_type(away, jnp.int32)
    ranking = jnp.where(ranking < 0x00800000, 0, ranking)  # denormals, which some machines take for zeros
    near = away < c.SPAN
    q = jnp.where(near, away * 2.0**c.FRACTION, 0.0).astype(jnp.int32)
    weights = jnp.where(near, noise.weight(q), U32(0))
    keep = prefix(ranking, weights, top_k, top_p)
    least = jnp.ceil(jnp.clip(min_p, 0.0, 1.0) * 2.0**c.WEIGHT).astype(U32)
    keep &= weights >= jnp.maximum(least, U32(1))[:, None]
    token = jnp.arange(logits.shape[1], dtype=U32)[None, :]
    words = key[:, 0, None], key[:, 1, None]
    bits = noise.threefry(words, (positions.astype(U32)[:, None], token))
    return first_of_largest(jnp.where(keep, noise.gumbel(bits) - q, _NAN))


def run(
    spec: Spec,
    logits: jax.Array,
    temperature: jax.Array | None,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    key: jax.Array,
    positions: jax.Array,
    after: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    logits = logits.astype(jnp.float32)
    order = order_key(logits)
    best = jnp.max(order, axis=1)
    empty = best <= _MINUS_INF
    flags = jnp.where(jnp.any(order == _NAN, axis=1), c.HAS_NAN, 0) | jnp.where(best == _INF, c.HAS_INF, 0)
    flags = (flags | jnp.where(empty, c.EMPTY, 0)).astype(jnp.int32)
    tokens = jnp.where(empty, 0, first_of_largest(order))
    if temperature is None:
        return tokens, flags
    hot = (temperature > 0) & ~empty
    other = drawn(logits, order, jnp.where(hot, temperature, 1.0), top_k, top_p, min_p, key, positions)
    return jnp.where(hot, other, tokens), flags
