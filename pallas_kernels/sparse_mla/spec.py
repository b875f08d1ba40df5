"""Static sizes of a sparse MLA call, the real shapes by name, and their inputs."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels import paged

_ROW_BYTES = {"uint8": 1, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True)
class Spec:
    """One call. q_dtype and cache_dtype are numpy names; splits 0 leaves the number of key splits to the plan; apart: the caller
    takes the splits' parts."""

    rows: int
    heads: int
    k: int
    kv_lora_rank: int
    rope: int
    layers: int
    pages: int
    q_dtype: str
    cache_dtype: str
    scale: float
    splits: int = 0
    apart: bool = False

    @property
    def quantized(self) -> bool:
        return self.cache_dtype == "uint8"

    @property
    def width(self) -> int:
        """Elements (bytes where quantized) of one cached latent."""
        return paged.latent_width(self.kv_lora_rank, self.rope, self.quantized)

    @property
    def capacity(self) -> int:
        """Slots of one layer."""
        return self.pages * paged.PAGE

    def flops(self) -> int:
        """Two products: scores over kv_lora_rank + rope, values over kv_lora_rank."""
        return 2 * self.rows * self.heads * self.k * (2 * self.kv_lora_rank + self.rope)

    def bytes(self) -> int:
        """Every selected latent once a row, the slots, the query and both outputs."""
        latents = self.rows * self.k * self.width * _ROW_BYTES[self.cache_dtype]
        size = _ROW_BYTES[self.q_dtype]
        query = self.rows * self.heads * (2 * self.kv_lora_rank + self.rope) * size
        return latents + query + 4 * self.rows * (self.k + self.heads)


def _glm(heads: int, k: int, cache_dtype: str) -> Spec:
    """4096 pages: 128 rows of 2048 slots each are distinct, as sequences of a batch are; a chain's layers pass the L2."""
    return Spec(1, heads, k, 512, 64, 1, 4096, "bfloat16", cache_dtype, 256**-0.5)


CASES: dict[str, Spec] = {
    "h64_k2048_fp8": _glm(64, 2048, "uint8"),
    "h32_k2048_fp8": _glm(32, 2048, "uint8"),
    "h16_k2048_fp8": _glm(16, 2048, "uint8"),
    "h8_k2048_fp8": _glm(8, 2048, "uint8"),
    "h64_k512_fp8": _glm(64, 512, "uint8"),
    "h64_k128_fp8": _glm(64, 128, "uint8"),
    "h8_k512_fp8": _glm(8, 512, "uint8"),
    "h64_k2048_bf16": _glm(64, 2048, "bfloat16"),
    "h8_k2048_bf16": _glm(8, 2048, "bfloat16"),
}
# Microseconds on one H200. FlashMLA: SM90 sparse decode, split and combine, in a CUDA graph (shared facts).
RIVALS: dict[str, dict[str, dict[int, float]]] = {
    "h64_k2048_fp8": {
        "FlashMLA": {1: 15.4, 8: 18.7, 16: 27.9, 32: 47.4, 64: 75.8, 128: 114.9},
        "target": {1: 14.0, 8: 17.0, 64: 72.0, 128: 110.0},
    },
    "h64_k512_fp8": {"FlashMLA": {1: 11.1}},
    "h8_k2048_fp8": {"target": {1: 8.0}},
}


def tolerance(spec: Spec, backend: str) -> float:
    """Largest relative L2 error: latents, weights and context are rounded to bfloat16 (2^-9 each); measured up to 2.6e-3."""
    return 1e-5 if backend == "reference" else 6e-3


def inputs(spec: Spec, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(q, cache, layer, slots): normal latents and queries, every row a random set of distinct slots.

    Rows have pages of their own, as sequences do, where the cache has k slots for each; else they draw from all pages.
    """
    return _inputs(spec, key)


@functools.partial(jax.jit, static_argnums=0)
def _inputs(spec: Spec, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    kq, kc, kr, ks = jax.random.split(key, 4)
    q = jax.random.normal(kq, (spec.rows, spec.heads, spec.kv_lora_rank + spec.rope), jnp.float32)

    def one_layer(i: jax.Array) -> jax.Array:
        c = jax.random.normal(jax.random.fold_in(kc, i), (spec.capacity, spec.kv_lora_rank), jnp.float32)
        rope = jax.random.normal(jax.random.fold_in(kr, i), (spec.capacity, spec.rope), jnp.float32)
        return paged.pack_latent(c, rope, jnp.dtype(spec.cache_dtype)).reshape(spec.pages, paged.PAGE, spec.width)

    cache = jax.lax.map(one_layer, jnp.arange(spec.layers, dtype=jnp.int32))
    # Distinct slots without a sort: a random start and a random odd stride modulo the range rounded up to 2^n.
    starts, strides = jax.random.split(ks)
    own = spec.capacity // spec.rows
    shared = own < spec.k
    span = spec.capacity if shared else own
    size = 1 << max(span - 1, 1).bit_length()
    start = jax.random.randint(starts, (spec.rows, 1), 0, size, jnp.int32)
    stride = 2 * jax.random.randint(strides, (spec.rows, 1), size // 8, size // 2, jnp.int32) + 1
    walk = (start + stride * jnp.arange(spec.k, dtype=jnp.int32)[None, :]) & (size - 1)
    first = 0 if shared else own * jnp.arange(spec.rows, dtype=jnp.int32)[:, None]
    slots = jnp.where(walk < span, first + walk, -1)
    return q.astype(spec.q_dtype), cache, jnp.zeros((), jnp.int32), slots


def advance(spec: Spec, args: tuple[jax.Array, ...], out: tuple[jax.Array, jax.Array], i: int) -> tuple[jax.Array, ...]:
    """The next layer of the stack; the same query and slots."""
    q, cache, _, slots = args
    return q, cache, jnp.asarray(i % spec.layers, jnp.int32), slots
