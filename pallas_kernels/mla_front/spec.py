"""Static sizes of the MLA front, the real shapes by name, and their inputs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import paged
from pallas_kernels.blocks import dequantize, random_blocks
from pallas_kernels.latent_write.spec import Spec as WriteSpec
from pallas_kernels.latent_write.spec import inputs as write_inputs


@dataclass(frozen=True)
class Spec:
    """One call; dtypes are numpy names, ``fp8`` tells whether q_b is BlockScaled; cache_dtype "" where no latent is written."""

    rows: int
    heads: int
    nope: int
    rope: int
    kv_lora_rank: int
    q_lora_rank: int
    layers: int
    dtype: str
    weight_dtype: str
    fp8: bool
    eps: float
    arithmetic: str
    cache_dtype: str = ""
    pages: int = 0

    @property
    def width(self) -> int:
        """Elements of a row of the latent cache."""
        return paged.latent_width(self.kv_lora_rank, self.rope, self.cache_dtype == "uint8")

    @property
    def writes_here(self) -> bool:
        """Whether the Triton kernel that absorbs writes the latents too."""
        return (self.kv_lora_rank, self.rope) == (512, 64) and self.cache_dtype in ("uint8", "bfloat16")

    def flops(self) -> int:
        absorb = self.heads * self.nope * self.kv_lora_rank
        return 2 * self.rows * (self.heads * (self.nope + self.rope) * self.q_lora_rank + absorb)

    def bytes(self) -> int:
        """One layer's q_b and W_UK, the latents read, the latents and queries written."""
        size = jnp.dtype(self.dtype).itemsize
        q_b = self.heads * (self.nope + self.rope) * self.q_lora_rank * (1 if self.fp8 else size)
        w_uk = self.heads * self.nope * self.kv_lora_rank * jnp.dtype(self.weight_dtype).itemsize
        rows = self.rows * size * (2 * self.q_lora_rank + self.heads * (self.kv_lora_rank + self.rope))
        return q_b + w_uk + rows + (self._write.bytes() if self.cache_dtype else 0)

    @property
    def _write(self) -> WriteSpec:
        sizes = (self.rows, self.kv_lora_rank, self.rope, self.layers, self.pages)
        return WriteSpec(*sizes, self.dtype, self.cache_dtype, self.eps)


def _glm(heads: int, arithmetic: str, cache_dtype: str = "", pages: int = 0) -> Spec:
    sizes = (1, heads, 192, 64, 512, 2048, 1)
    return Spec(*sizes, "bfloat16", "bfloat16", True, 1e-5, arithmetic, cache_dtype, pages)


CASES: dict[str, Spec] = {
    "h64_w8a8": _glm(64, "w8a8"),
    "h64_w8a16": _glm(64, "w8a16"),
    "h8_w8a8": _glm(8, "w8a8"),
    "h8_w8a16": _glm(8, "w8a16"),
    "h64_w8a16_write_fp8": _glm(64, "w8a16", "uint8", 64),
    "h64_w8a16_write_bf16": _glm(64, "w8a16", "bfloat16", 64),
    "h8_w8a16_write_fp8": _glm(8, "w8a16", "uint8", 64),
}
RIVALS: dict[str, dict[str, dict[int, float]]] = {}
# The cache is updated in place.
STATE = (7,)


def tolerance(spec: Spec, backend: str) -> float:
    """Both sides round four times to bfloat16; W8A8 quantizes a latent that may differ by one bfloat16 step. In a written row one
    e4m3 value among 512 may fall to the other side of a middle (see latent_write)."""
    if spec.cache_dtype == "uint8":
        return 3e-2
    return 1e-2 if spec.arithmetic == "w8a8" else 6e-3


@functools.partial(jax.jit, static_argnums=0)
def inputs(spec: Spec, key: jax.Array) -> tuple[Any, ...]:
    """(q_a, norm, q_b, w_uk, layer, cos, sin, cache, (kv_a, kv_norm, slots)), normal, with scales that vary by block; where no
    latent is written the last two are a dummy and ()."""
    ka, kn, kb, ku, kp, kw = jax.random.split(key, 6)
    q_a = jax.random.normal(ka, (spec.rows, spec.q_lora_rank), jnp.float32).astype(spec.dtype)
    norm = (1.0 + 0.1 * jax.random.normal(kn, (spec.layers, spec.q_lora_rank), jnp.float32)).astype(spec.dtype)
    q_b: Any = random_blocks(kb, spec.layers, spec.heads * (spec.nope + spec.rope), spec.q_lora_rank)
    if not spec.fp8:
        q_b = dequantize(q_b, jnp.dtype(spec.dtype))

    def w_uk_layer(i: jax.Array) -> jax.Array:
        shape = (spec.heads, spec.nope, spec.kv_lora_rank)
        return (0.07 * jax.random.normal(jax.random.fold_in(ku, i), shape, jnp.float32)).astype(spec.weight_dtype)

    w_uk = jax.lax.map(w_uk_layer, jnp.arange(spec.layers, dtype=jnp.int32))
    angle = jax.random.uniform(kp, (spec.rows, spec.rope // 2), jnp.float32, 0.0, 6.0)
    args = (q_a, norm, q_b, w_uk, jnp.zeros((), jnp.int32), jnp.cos(angle), jnp.sin(angle))
    if not spec.cache_dtype:
        return *args, jnp.zeros((1,), jnp.uint8), ()
    kv_a, kv_norm, cache, _, slots, *_ = write_inputs(spec._write, kw)
    return *args, cache, (kv_a, kv_norm, slots)


def advance(spec: Spec, args: tuple[Any, ...], out: tuple[jax.Array, ...], i: int) -> tuple[Any, ...]:
    """The next layer of the stack, from the latent that the call before gave out, over the cache it wrote."""
    _, norm, q_b, w_uk, _, cos, sin, cache, key = args
    cache = out[2] if spec.cache_dtype else cache
    return out[0], norm, q_b, w_uk, jnp.asarray(i % spec.layers, jnp.int32), cos, sin, cache, key


def comparable(spec: Spec, out: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The cache as float32 latents."""
    if not spec.cache_dtype:
        return out
    return *out[:2], paged.unpack_latent(out[2], spec.kv_lora_rank, spec.rope, jnp.float32)
