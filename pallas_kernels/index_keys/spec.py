"""Static sizes of index_keys, the real shapes by name, and their inputs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import paged
from pallas_kernels.blocks import dequantize, random_blocks

WRITE, QUERY, BOTH = "write", "query", "both"


@dataclass(frozen=True)
class Spec:
    """One call. form: which of the two sides. wk, wq_b: "float8_e4m3fn" for blocks, a float's name, "" where not asked.

    dtype: of the rows and of weights_proj. cache_dtype: "uint8", "float32", or "" for none. quantized: of the queries.
    layers: size of the stacks; pages: of the cache.
    """

    form: str
    rows: int
    hidden: int
    q_lora_rank: int
    heads: int
    head_dim: int
    rope: int
    layers: int
    pages: int
    dtype: str
    wk: str
    wq_b: str
    proj: str
    cache_dtype: str
    quantized: bool
    arithmetic: str

    @property
    def outputs(self) -> int:
        """Numbers projected from a row of the hidden state."""
        return (self.head_dim if self.form != QUERY else 0) + (self.heads if self.form != WRITE else 0)

    @property
    def fold(self) -> float:
        return self.heads**-0.5 * self.head_dim**-0.5 if self.heads else 1.0

    def flops(self) -> int:
        query = self.heads * self.head_dim * self.q_lora_rank
        return 2 * self.rows * (self.outputs * self.hidden + query)

    def bytes(self) -> int:
        """Weights of one layer, the rows read, and what is written, each once."""
        total = self.rows * (self.hidden * jnp.dtype(self.dtype).itemsize + 4 * self.rope)
        if self.form != QUERY:
            total += _weight_bytes(self.wk, self.head_dim, self.hidden)
            total += self.rows * (self.head_dim + 4 + 4)
        if self.form != WRITE:
            total += _weight_bytes(self.wq_b, self.heads * self.head_dim, self.q_lora_rank)
            total += self.heads * self.hidden * jnp.dtype(self.proj).itemsize
            width = 1 if self.quantized else 4
            total += self.rows * (self.q_lora_rank * jnp.dtype(self.dtype).itemsize)
            total += self.rows * self.heads * (self.head_dim * width + 4)
        return total


def _weight_bytes(kind: str, n: int, k: int) -> int:
    scales = 4 * -(-n // 128) * -(-k // 128) if kind == "float8_e4m3fn" else 0
    return n * k * jnp.dtype(kind).itemsize + scales


def _glm(form: str, arithmetic: str = "w8a16") -> Spec:
    keys, queries = form != QUERY, form != WRITE
    fp8 = "float8_e4m3fn"
    return Spec(
        form, 1, 6144, 2048 if queries else 0, 32 if queries else 0, 128, 64, 1, 64 if keys else 0, "bfloat16",
        fp8 if keys else "", fp8 if queries else "", "bfloat16" if queries else "", "uint8" if keys else "", queries,
        arithmetic,
    )  # fmt: skip


CASES: dict[str, Spec] = {
    "both_w8a16": _glm(BOTH),
    "both_w8a8": _glm(BOTH, "w8a8"),
    "write": _glm(WRITE),
    "query_w8a16": _glm(QUERY),
    "query_w8a8": _glm(QUERY, "w8a8"),
}
# Decoding a batch, and a chunk of a prefill.
ROWS = (1, 8, 32, 64, 512)
RIVALS: dict[str, dict[str, dict[int, float]]] = {}
# The cache comes first in the arguments and is updated in place; None where a form has none.
STATE = (0,)


def tolerance(spec: Spec, backend: str) -> float:
    """A value near the middle of two e4m3 codes may round the other way after sums in another order: a step of up to 9 %. The
    14 bits that FP8 products of Hopper keep let some 0.5 % of a query's values do so, 6e-3 of the whole."""
    return 3e-2


def comparable(spec: Spec, out: Any) -> Any:
    """The cache as float32 keys; queries and weights as they are."""
    if spec.form == QUERY:
        return out
    cache = out if spec.form == WRITE else out[0]
    pages = jnp.arange(cache.shape[1], dtype=jnp.int32)
    keys = jnp.stack([paged.read_index_pages(cache, i, pages, spec.head_dim) for i in range(cache.shape[0])])
    return keys if spec.form == WRITE else (keys, *out[1:])


@functools.partial(jax.jit, static_argnums=0)
def inputs(spec: Spec, key: jax.Array) -> tuple[Any, ...]:
    """(cache, latent, x, wk, norm, bias, wq_b, weights_proj, layer, slots, cos, sin): normal rows, a cache of zeros."""
    kl, kx, kk, kn, kb, kq, kp, ka = jax.random.split(key, 8)
    x = jax.random.normal(kx, (spec.rows, spec.hidden), jnp.float32).astype(spec.dtype)
    angle = jax.random.uniform(ka, (spec.rows, spec.rope // 2), jnp.float32, 0.0, 6.0)
    rotation = (jnp.cos(angle), jnp.sin(angle))
    layer = jnp.zeros((), jnp.int32)
    cache, wk, norm, bias, slots = (None,) * 5
    if spec.form != QUERY:
        vector = (spec.layers, spec.head_dim)
        cache = jnp.zeros((spec.layers, spec.pages, paged.index_page_width(spec.head_dim)), spec.cache_dtype)
        wk = _weight(spec.wk, spec.layers, spec.head_dim, spec.hidden, kk)
        norm = (1.0 + 0.1 * jax.random.normal(kn, vector, jnp.float32)).astype(spec.dtype)
        bias = (0.3 * jax.random.normal(kb, vector, jnp.float32)).astype(spec.dtype)
        # Odd, so that rows fall on distinct slots of a power of two.
        slots = (11 + 37 * jnp.arange(spec.rows, dtype=jnp.int32)) % (spec.pages * paged.PAGE)
    latent, wq_b, proj = (None,) * 3
    if spec.form != WRITE:
        latent = jax.random.normal(kl, (spec.rows, spec.q_lora_rank), jnp.float32).astype(spec.dtype)
        wq_b = _weight(spec.wq_b, spec.layers, spec.heads * spec.head_dim, spec.q_lora_rank, kq)
        proj = _weight(spec.proj, spec.layers, spec.heads, spec.hidden, kp)
    return cache, latent, x, wk, norm, bias, wq_b, proj, layer, slots, *rotation


def _weight(kind: str, layers: int, n: int, k: int, key: jax.Array) -> Any:
    """A stack of random FP8 blocks, or what they stand for in a float."""
    blocks = random_blocks(key, layers, n, k)
    return blocks if kind == "float8_e4m3fn" else dequantize(blocks, jnp.dtype(kind))


def advance(spec: Spec, args: tuple[Any, ...], out: Any, i: int) -> tuple[Any, ...]:
    """The next layer of the stacks, over the updated cache."""
    cache = args[0] if spec.form == QUERY else out if spec.form == WRITE else out[0]
    layer = jnp.asarray(i % spec.layers, jnp.int32)
    return (cache, *args[1:8], layer, *args[9:])
