"""Static sizes of a latent write, the real shapes by name, and their inputs."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels import paged


@dataclass(frozen=True)
class Spec:
    """One call; dtypes are numpy names."""

    rows: int
    kv_lora_rank: int
    rope: int
    layers: int
    pages: int
    dtype: str
    cache_dtype: str
    eps: float

    @property
    def width(self) -> int:
        return paged.latent_width(self.kv_lora_rank, self.rope, self.cache_dtype == "uint8")

    def flops(self) -> int:
        """Norm, rotation and scaling: a dozen operations an element, never the limit."""
        return 12 * self.rows * (self.kv_lora_rank + self.rope)

    def bytes(self) -> int:
        """The projection read, angles, slots, one norm weight, and the cache rows written."""
        read = (self.kv_lora_rank + self.rope) * jnp.dtype(self.dtype).itemsize + 4 * self.rope + 4
        return self.rows * (read + self.width * jnp.dtype(self.cache_dtype).itemsize) + 2 * self.kv_lora_rank


CASES: dict[str, Spec] = {
    "fp8": Spec(1, 512, 64, 1, 64, "bfloat16", "uint8", 1e-5),
    "bf16": Spec(1, 512, 64, 1, 64, "bfloat16", "bfloat16", 1e-5),
}
RIVALS: dict[str, dict[str, dict[int, float]]] = {}
# kv_a, norm, cache, layer, slots, cos, sin: the cache is updated in place.
STATE = (2,)


@functools.partial(jax.jit, static_argnums=0)
def inputs(spec: Spec, key: jax.Array) -> tuple[jax.Array, ...]:
    """(kv_a, norm, cache, layer, slots, cos, sin): distinct slots, a cache of zeros."""
    ka, kn, kp = jax.random.split(key, 3)
    kv_a = jax.random.normal(ka, (spec.rows, spec.kv_lora_rank + spec.rope), jnp.float32).astype(spec.dtype)
    norm = 1.0 + 0.1 * jax.random.normal(kn, (spec.layers, spec.kv_lora_rank), jnp.float32)
    cache = jnp.zeros((spec.layers, spec.pages, paged.PAGE, spec.width), spec.cache_dtype)
    stride = 37  # odd, so that rows fall on distinct slots of a power of two
    slots = (11 + stride * jnp.arange(spec.rows, dtype=jnp.int32)) % (spec.pages * paged.PAGE)
    angle = jax.random.uniform(kp, (spec.rows, spec.rope // 2), jnp.float32, 0.0, 6.0)
    return kv_a, norm.astype(spec.dtype), cache, jnp.zeros((), jnp.int32), slots, jnp.cos(angle), jnp.sin(angle)


def advance(spec: Spec, args: tuple[jax.Array, ...], out: jax.Array, i: int) -> tuple[jax.Array, ...]:
    """The next layer of the stack, over the updated cache."""
    kv_a, norm, _, _, *rest = args
    return kv_a, norm, out, jnp.asarray(i % spec.layers, jnp.int32), *rest


def comparable(spec: Spec, out: jax.Array) -> jax.Array:
    """The cache as float32 latents."""
    return paged.unpack_latent(out, spec.kv_lora_rank, spec.rope, jnp.float32)


def tolerance(spec: Spec, backend: str) -> float:
    """bfloat16 latents often fall on the middle of two e4m3 values, where a scale's last bit decides; one such step among 512
    latents is an error of 1e-2."""
    return 3e-2 if spec.cache_dtype == "uint8" else 2e-3
