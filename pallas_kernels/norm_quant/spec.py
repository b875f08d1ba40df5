"""Static sizes of a norm or quantization, the real shapes by name, and their inputs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.parts import Parts


@dataclass(frozen=True)
class Spec:
    """One call. ``add``: a residual is added first; ``norm``: RMSNorm; ``quantize``: e4m3 by groups of 128 at the end; ``split``:
    beside the norm itself its two e4m3 terms, as ``fp8_linear`` reads many rows for W8A16 on Hopper; ``parts``: of how many choices
    a row the residual is still to be summed, 0 where it is no ``Parts``."""

    rows: int
    width: int
    layers: int
    dtype: str
    weight_dtype: str
    add: bool
    norm: bool
    quantize: bool
    eps: float
    split: bool = False
    parts: int = 0

    def flops(self) -> int:
        """A few operations an element, never the limit."""
        return (8 + 2 * self.parts) * self.rows * self.width

    def bytes(self) -> int:
        """Each row in (twice with a residual, once with each of its parts), each result out, the norm's weight once."""
        size = jnp.dtype(self.dtype).itemsize
        out = (size if self.add else 0) + (1 if self.quantize else size)
        weight = self.width * jnp.dtype(self.weight_dtype).itemsize if self.norm else 0
        scales = 4 * -(-self.width // 128) * self.rows if self.quantize or self.split else 0
        added = (4 * (self.parts + 1) if self.parts else size) * self.add
        moved = self.rows * self.width * (size + added + out + 2 * self.split)
        return moved + scales + weight + 8 * self.rows * self.parts


def _glm(width: int, add: bool, norm: bool, quantize: bool, split: bool = False, parts: int = 0) -> Spec:
    return Spec(1, width, 1, "bfloat16", "bfloat16", add, norm, quantize, 1e-5, split, parts)


def padded(rows: int) -> int:
    """Rows of the terms and of their scales."""
    return -(-rows // 32) * 32


CASES: dict[str, Spec] = {
    "norm_6144": _glm(6144, False, True, False),
    "norm_2048": _glm(2048, False, True, False),
    "quantize_16384": _glm(16384, False, False, True),
    "norm_quantize_6144": _glm(6144, False, True, True),
    "add_norm_6144": _glm(6144, True, True, False),
    "add_norm_quantize_6144": _glm(6144, True, True, True),
    "add_norm_split_6144": _glm(6144, True, True, False, True),
    "add_parts_norm_6144": _glm(6144, True, True, False, parts=8),
}
# For compute-sanitizer.
SMALL: dict[str, dict[str, Any]] = {
    "add_norm_6144": {},
    **{case: {"width": 2048} for case in ("add_norm_split_6144", "add_norm_quantize_6144", "quantize_16384")},
    "add_parts_norm_6144": {"width": 2048, "parts": 4},
}
RIVALS: dict[str, dict[str, dict[int, float]]] = {}


def tolerance(spec: Spec, backend: str) -> float:
    """The last bit of a sum may move a bfloat16 result by one step (2^-8 of it), and a middle to the other e4m3 value. Under jit
    XLA may also keep the reference's sum unrounded (excess precision), which is half a bfloat16 step on every number."""
    if spec.quantize:
        return 2e-2
    return 5e-3 if spec.add else 2e-3


@functools.partial(jax.jit, static_argnums=0)
def inputs(spec: Spec, key: jax.Array) -> tuple[Any, ...]:
    """(x, residual or None, weight or None, layer), normal."""
    kx, kr, kw = jax.random.split(key, 3)
    x = jax.random.normal(kx, (spec.rows, spec.width), jnp.float32).astype(spec.dtype)
    residual: jax.Array | Parts | None = None
    if spec.parts:
        residual = _parts(spec, kr)
    elif spec.add:
        residual = jax.random.normal(kr, x.shape, jnp.float32).astype(spec.dtype)
    weight = 1.0 + 0.1 * jax.random.normal(kw, (spec.layers, spec.width), jnp.float32)
    return x, residual, weight.astype(spec.weight_dtype) if spec.norm else None, jnp.zeros((), jnp.int32)


def _parts(spec: Spec, key: jax.Array) -> Parts:
    """Normal parts and weights that make their sum about 1; the last choice of every row is no expert's, and its part NaN."""
    kp, kw = jax.random.split(key)
    ids = jnp.tile(jnp.arange(spec.parts, dtype=jnp.int32), (spec.rows, 1))
    placed = ids < spec.parts - 1
    parts = jax.random.normal(kp, (spec.rows, spec.parts, spec.width), jnp.float32)
    parts = jnp.where(placed[..., None], parts, jnp.nan).reshape(-1, spec.width)
    shared = jax.random.normal(jax.random.fold_in(kp, 1), (spec.rows, spec.width), jnp.float32) / 2
    weights = jax.random.uniform(kw, ids.shape, jnp.float32, 0.1, 0.6)
    return Parts(jnp.concatenate([parts, shared]), ids, weights, spec.parts - 1)


def comparable(spec: Spec, out: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Quantized values times their scales, so that a step of a scale and one of its values do not count twice."""
    if spec.split:
        total, normed, values, scales = out
        scale = jnp.repeat(scales[:, : spec.rows].T, 128, axis=-1)
        high, low = values[:, : spec.rows].astype(jnp.float32)
        return total, normed, (high + low / 16) * scale
    if not spec.quantize:
        return out
    *rest, values, scale = out
    return *rest, values.astype(jnp.float32) * jnp.repeat(scale, 128, axis=-1)[..., : spec.width]


def advance(spec: Spec, args: tuple[Any, ...], out: tuple[jax.Array, ...], i: int) -> tuple[Any, ...]:
    """The next layer's weight; the bench itself keeps calls in order."""
    return *args[:3], jnp.asarray(i % spec.layers, jnp.int32)
