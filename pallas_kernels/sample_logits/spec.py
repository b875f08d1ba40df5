"""Static sizes of a sample_logits call, the real shapes by name, and their inputs."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Spec:
    """One call; dtype is the logits' numpy name, greedy is a program that knows no temperature."""

    rows: int
    vocab: int
    dtype: str = "float32"
    greedy: bool = False

    def flops(self) -> int:
        """Integer operations and comparisons are not counted."""
        return 0

    def bytes(self) -> int:
        """The logits once, a row's parameters, token and flags."""
        return self.rows * (self.vocab * jnp.dtype(self.dtype).itemsize + 4 * (1 if self.greedy else 7) + 8)


CASES: dict[str, Spec] = {
    "greedy": Spec(1, 154880, greedy=True),
    "all_filters": Spec(1, 154880),
    "bf16": Spec(1, 154880, "bfloat16"),
}
ROWS = (1, 8, 64)
RIVALS: dict[str, dict[str, dict[int, float]]] = {
    "greedy": {"target": {1: 8.0}},
    "all_filters": {"target": {1: 25.0}},
}
# Tokens are exact or wrong.
TOLERANCE = {"triton": 0.0, "reference": 0.0}


@functools.partial(jax.jit, static_argnums=0)
def inputs(spec: Spec, key: jax.Array) -> tuple[Any, ...]:
    """(logits, temperature, top_k, top_p, min_p, key, positions, None): normal logits; parameters differ by row."""
    kl, kk = jax.random.split(key)
    rows = jnp.arange(spec.rows, dtype=jnp.int32)
    logits = 4.0 * jax.random.normal(kl, (spec.rows, spec.vocab), jnp.float32)
    # Powers of two: 1 / temperature is exact however a compiler divides.
    temperature = jnp.where(rows % 4 == 3, 0.0, jnp.exp2(-(rows % 3).astype(jnp.float32)))
    top_p = jnp.where(rows % 3 == 1, 1.0, 0.95).astype(jnp.float32)
    top_k = jnp.where(rows % 5 == 4, 0, 50 + 400 * (rows % 7)).astype(jnp.int32)
    min_p = jnp.where(rows % 2 == 0, 0.02, 0.0).astype(jnp.float32)
    words = jax.random.bits(kk, (spec.rows, 2), jnp.uint32)
    return (
        *(logits.astype(spec.dtype), None if spec.greedy else temperature, top_k, top_p, min_p, words, rows * 977 + 5),
        None,
    )


def advance(spec: Spec, args: tuple[Any, ...], out: tuple[jax.Array, jax.Array], i: int) -> tuple[Any, ...]:
    """The next position's draw; the flags become an operand that is not read, so that calls stay in order."""
    *rest, positions, _ = args
    return *rest, positions + 1, out[1]
