"""Static sizes of the MLA front, the real shapes by name, and their inputs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import BlockScaled, to_e4m3


@dataclass(frozen=True)
class Spec:
    """One call; dtypes are numpy names, ``fp8`` tells whether q_b is BlockScaled."""

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

    def flops(self) -> int:
        absorb = self.heads * self.nope * self.kv_lora_rank
        return 2 * self.rows * (self.heads * (self.nope + self.rope) * self.q_lora_rank + absorb)

    def bytes(self) -> int:
        """One layer's q_b and W_UK, the latents read, the latents and queries written."""
        size = jnp.dtype(self.dtype).itemsize
        q_b = self.heads * (self.nope + self.rope) * self.q_lora_rank * (1 if self.fp8 else size)
        w_uk = self.heads * self.nope * self.kv_lora_rank * jnp.dtype(self.weight_dtype).itemsize
        rows = self.rows * size * (2 * self.q_lora_rank + self.heads * (self.kv_lora_rank + self.rope))
        return q_b + w_uk + rows


def _glm(heads: int, arithmetic: str) -> Spec:
    return Spec(1, heads, 192, 64, 512, 2048, 1, "bfloat16", "bfloat16", True, 1e-5, arithmetic)


CASES: dict[str, Spec] = {
    "h64_w8a8": _glm(64, "w8a8"),
    "h64_w8a16": _glm(64, "w8a16"),
    "h8_w8a8": _glm(8, "w8a8"),
    "h8_w8a16": _glm(8, "w8a16"),
}
RIVALS: dict[str, dict[str, dict[int, float]]] = {}


def tolerance(spec: Spec, backend: str) -> float:
    """Both sides round four times to bfloat16; W8A8 quantizes a latent that may differ by one bfloat16 step."""
    return 1e-2 if spec.arithmetic == "w8a8" else 6e-3


@functools.partial(jax.jit, static_argnums=0)
def inputs(spec: Spec, key: jax.Array) -> tuple[Any, ...]:
    """(q_a, norm, q_b, w_uk, layer, cos, sin), normal, with scales that vary by block."""
    ka, kn, kb, ks, ku, kp = jax.random.split(key, 6)
    q_a = jax.random.normal(ka, (spec.rows, spec.q_lora_rank), jnp.float32).astype(spec.dtype)
    norm = (1.0 + 0.1 * jax.random.normal(kn, (spec.layers, spec.q_lora_rank), jnp.float32)).astype(spec.dtype)
    n = spec.heads * (spec.nope + spec.rope)

    def q_b_layer(i: jax.Array) -> jax.Array:
        return to_e4m3(100.0 * jax.random.normal(jax.random.fold_in(kb, i), (n, spec.q_lora_rank), jnp.float32))

    def w_uk_layer(i: jax.Array) -> jax.Array:
        shape = (spec.heads, spec.nope, spec.kv_lora_rank)
        return (0.07 * jax.random.normal(jax.random.fold_in(ku, i), shape, jnp.float32)).astype(spec.weight_dtype)

    layers = jnp.arange(spec.layers, dtype=jnp.int32)
    blocks = (spec.layers, -(-n // 128), -(-spec.q_lora_rank // 128))
    scale = 2e-4 * jax.random.uniform(ks, blocks, jnp.float32, 0.3, 3.0)
    q_b: Any = BlockScaled(jax.lax.map(q_b_layer, layers), scale)
    if not spec.fp8:
        q_b = (0.02 * jax.lax.map(q_b_layer, layers).astype(jnp.float32) / 100.0).astype(spec.dtype)
    angle = jax.random.uniform(kp, (spec.rows, spec.rope // 2), jnp.float32, 0.0, 6.0)
    w_uk = jax.lax.map(w_uk_layer, layers)
    return q_a, norm, q_b, w_uk, jnp.zeros((), jnp.int32), jnp.cos(angle), jnp.sin(angle)


def advance(spec: Spec, args: tuple[Any, ...], out: tuple[jax.Array, jax.Array], i: int) -> tuple[Any, ...]:
    """The next layer of the stack, from the latent that the call before gave out."""
    _, norm, q_b, w_uk, _, cos, sin = args
    return out[0], norm, q_b, w_uk, jnp.asarray(i % spec.layers, jnp.int32), cos, sin
