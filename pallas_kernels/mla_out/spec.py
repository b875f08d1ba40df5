"""Static sizes of the MLA output, the real shapes by name, and their inputs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import dequantize, random_blocks


@dataclass(frozen=True)
class Spec:
    """One call; dtypes are numpy names, ``fp8`` tells whether o_proj is BlockScaled. parts 0: the context comes merged."""

    rows: int
    heads: int
    v: int
    kv_lora_rank: int
    hidden: int
    layers: int
    dtype: str
    weight_dtype: str
    fp8: bool
    arithmetic: str
    parts: int = 0

    def flops(self) -> int:
        return 2 * self.rows * self.heads * self.v * (self.kv_lora_rank + self.hidden)

    def bytes(self) -> int:
        """One layer's W_UV and o_proj, the context read, the output written."""
        size = jnp.dtype(self.dtype).itemsize
        w_uv = self.heads * self.v * self.kv_lora_rank * jnp.dtype(self.weight_dtype).itemsize
        o_proj = self.hidden * self.heads * self.v * (1 if self.fp8 else size)
        one = self.kv_lora_rank * size if self.parts == 0 else self.parts * 4 * (self.kv_lora_rank + 1)
        return w_uv + o_proj + self.rows * (self.heads * one + self.hidden * size)


def _glm(heads: int, arithmetic: str, parts: int = 0) -> Spec:
    return Spec(1, heads, 256, 512, 6144, 1, "bfloat16", "bfloat16", True, arithmetic, parts)


CASES: dict[str, Spec] = {
    "h64_w8a8": _glm(64, "w8a8"),
    "h64_w8a16": _glm(64, "w8a16"),
    "h8_w8a8": _glm(8, "w8a8"),
    "h8_w8a16": _glm(8, "w8a16"),
    "h8_w8a16_parts": _glm(8, "w8a16", 4),
}
RIVALS: dict[str, dict[str, dict[int, float]]] = {}


def tolerance(spec: Spec, backend: str) -> float:
    """Two roundings to bfloat16; W8A8 quantizes values that may differ by one bfloat16 step."""
    return 1e-2 if spec.arithmetic == "w8a8" else 6e-3


@functools.partial(jax.jit, static_argnums=0)
def inputs(spec: Spec, key: jax.Array) -> tuple[Any, ...]:
    """(context, w_uv, o_proj, layer), normal, with scales that vary by block; of a context in parts their log-sums last."""
    kc, ku, ko = jax.random.split(key, 3)
    context: Any = jax.random.normal(kc, (spec.rows, spec.heads, spec.kv_lora_rank), jnp.float32).astype(spec.dtype)
    lse: tuple[jax.Array, ...] = ()
    if spec.parts:
        kc, kl = jax.random.split(kc)
        lead = (spec.rows, spec.parts, spec.heads)
        context = jax.random.normal(kc, (*lead, spec.kv_lora_rank), jnp.float32)
        lse = (jax.random.normal(kl, lead, jnp.float32),)
    width = spec.heads * spec.v

    def w_uv_layer(i: jax.Array) -> jax.Array:
        shape = (spec.heads, spec.v, spec.kv_lora_rank)
        return (0.04 * jax.random.normal(jax.random.fold_in(ku, i), shape, jnp.float32)).astype(spec.weight_dtype)

    o_proj: Any = random_blocks(ko, spec.layers, spec.hidden, width)
    if not spec.fp8:
        o_proj = dequantize(o_proj, jnp.dtype(spec.dtype))
    layers = jnp.arange(spec.layers, dtype=jnp.int32)
    return context, jax.lax.map(w_uv_layer, layers), o_proj, jnp.zeros((), jnp.int32), *lse


def advance(spec: Spec, args: tuple[Any, ...], out: jax.Array, i: int) -> tuple[Any, ...]:
    """The next layer of the stack; the bench itself keeps calls in order."""
    return *args[:3], jnp.asarray(i % spec.layers, jnp.int32), *args[4:]
