"""Static sizes of the router, the real shapes by name, and their inputs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Spec:
    """One call; dtypes are numpy names."""

    rows: int
    hidden: int
    experts: int
    k: int
    layers: int
    dtype: str
    gate_dtype: str
    scale: float

    def flops(self) -> int:
        return 2 * self.rows * self.hidden * self.experts

    def bytes(self) -> int:
        """One layer's gate and bias, the rows, ids and weights, each once."""
        gate = self.experts * (self.hidden * jnp.dtype(self.gate_dtype).itemsize + 4)
        return gate + self.rows * (self.hidden * jnp.dtype(self.dtype).itemsize + 8 * self.k)


CASES: dict[str, Spec] = {
    "glm": Spec(1, 6144, 256, 8, 1, "bfloat16", "bfloat16", 2.5),
    "glm_f32_gate": Spec(1, 6144, 256, 8, 1, "bfloat16", "float32", 2.5),
    "small": Spec(1, 512, 24, 6, 1, "bfloat16", "bfloat16", 2.5),
}
# ``inputs`` make logits that are exact on both sides: what differs is the sigmoid's and the sum's last bits.
TOLERANCE: dict[str, float] = {"triton": 2e-6}
# For compute-sanitizer.
SMALL: dict[str, dict[str, Any]] = {"small": {}}
RIVALS: dict[str, dict[str, dict[int, float]]] = {"glm": {"target, norm included": {1: 4.0}}}


@functools.partial(jax.jit, static_argnums=0)
def inputs(spec: Spec, key: jax.Array) -> tuple[Any, ...]:
    """(x, gate, bias, layer, None): logits of a standard deviation near 1, a bias as wide as the scores.

    x are eighths and gate 2048ths: every product and every sum of them is exact in float32, whatever the order and the unit. So two
    backends have the same logits, and no near tie for the last place goes two ways.
    """
    kx, kg, kb = jax.random.split(key, 3)
    x = jnp.round(8 * jax.random.normal(kx, (spec.rows, spec.hidden), jnp.float32)) / 8
    gate = jax.random.normal(kg, (spec.layers, spec.experts, spec.hidden), jnp.float32) * spec.hidden**-0.5
    gate = (jnp.round(2048 * gate) / 2048).astype(spec.gate_dtype)
    bias = 0.2 * jax.random.normal(kb, (spec.layers, spec.experts), jnp.float32)
    return x.astype(spec.dtype), gate, bias, jnp.zeros((), jnp.int32), None


def advance(spec: Spec, args: tuple[Any, ...], out: tuple[jax.Array, ...], i: int) -> tuple[Any, ...]:
    """The next layer of the stack; the weights before become an operand that is not read, so that calls stay in order."""
    x, gate, bias, _, _ = args
    return x, gate, bias, jnp.asarray(i % spec.layers, jnp.int32), out[1]


def comparable(spec: Spec, out: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Weights by expert, float32 [rows, experts]: two experts whose scores are equal but for rounding may change places."""
    ids, weights = out
    return jnp.zeros((spec.rows, spec.experts), jnp.float32).at[jnp.arange(spec.rows)[:, None], ids].add(weights)
