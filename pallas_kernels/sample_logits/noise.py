"""Integer functions of the reference in jnp: random bits, 2^-y, log2, Gumbel noise. ``noise_triton`` has the same for kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.sample_logits import constants as c

U32 = jnp.uint32


def mulhi(a: jax.Array, b: jax.Array) -> jax.Array:
    """Upper 32 bits of the product of two uint32."""
    a1, a0, b1, b0 = a >> U32(16), a & U32(0xFFFF), b >> U32(16), b & U32(0xFFFF)
    middle = a1 * b0 + ((a0 * b0) >> U32(16))
    low = a0 * b1 + (middle & U32(0xFFFF))
    return a1 * b1 + (middle >> U32(16)) + (low >> U32(16))


def polynomial(coefficients: tuple[int, ...], r: jax.Array, alternating: bool) -> jax.Array:
    """Value in the coefficients' format at r, Q0.32."""
    total = jnp.full_like(r, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        term = mulhi(total, r)
        total = U32(coefficient) - term if alternating else U32(coefficient) + term
    return total


def threefry(key: tuple[jax.Array, jax.Array], counter: tuple[jax.Array, jax.Array]) -> jax.Array:
    """First word of Threefry-2x32-20 of two uint32 words under a key of two."""
    words = (*key, key[0] ^ key[1] ^ U32(c.PARITY))
    a, b = counter[0] + words[0], counter[1] + words[1]
    for group in range(5):
        for rotation in c.ROTATIONS[4 * (group % 2) : 4 * (group % 2) + 4]:
            a = a + b
            b = ((b << U32(rotation)) | (b >> U32(32 - rotation))) ^ a
        a, b = a + words[(group + 1) % 3], b + words[(group + 2) % 3] + U32(group + 1)
    return a


def weight(q: jax.Array) -> jax.Array:
    """uint32, round(2^28 * 2^-y) for y = q / 2^25 in [0, 29)."""
    q = q.astype(U32)
    value = polynomial(c.EXP2, q << U32(32 - c.FRACTION), alternating=True)
    shift = U32(31 - c.WEIGHT) + (q >> U32(c.FRACTION))
    return (value + (U32(1) << (shift - U32(1)))) >> shift


def log2(n: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(whole part int32, fraction uint32 Q2.30) of log2 of a positive uint32."""
    zeros = jax.lax.clz(n)
    r = (n << zeros) << U32(1)
    return jnp.int32(31) - zeros.astype(jnp.int32), mulhi(polynomial(c.LOG2, r, alternating=True), r)


def gumbel(bits: jax.Array) -> jax.Array:
    """int32, G = -log2(-log2(1 - x)) with 25 fraction bits, x = (bits | 1) / 2^32.

    Small -log2(1 - x), which decide, keep their relative precision: below 1/2 it is x times a smooth function.
    """
    down = U32(30 - c.FRACTION)
    x = bits | U32(1)
    upper = x >= U32(1 << 31)
    n = jnp.where(upper, U32(0) - x, x)
    whole, fraction = log2(n)
    ratio = polynomial(c.RATIO, jnp.where(upper, U32(0), x), alternating=False)
    below = ((whole - 32) << c.FRACTION) + ((fraction + ratio) >> down).astype(jnp.int32)
    # -log2(1 - x) in [1, 32] with 26 fraction bits.
    rate = ((jnp.int32(32) - whole).astype(U32) << U32(26)) - (fraction >> U32(4))
    whole, fraction = log2(rate)
    above = ((whole - 26) << c.FRACTION) + (fraction >> down).astype(jnp.int32)
    return -jnp.where(upper, above, below)
