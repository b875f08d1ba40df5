"""Static sizes of a top_k call, the real shapes by name, and their inputs."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from pallas_kernels.paged import PAGE


@dataclass(frozen=True)
class Spec:
    """One call: rows of n scores, k kept. width: rows of one sequence; pages: of its block table, 0 where no slots are wanted."""

    rows: int
    n: int
    k: int
    width: int = 1
    pages: int = 0

    def flops(self) -> int:
        """Comparisons are not counted."""
        return 0

    def bytes(self) -> int:
        """Scores and lengths once, positions; with a table its entries and the slots."""
        return 4 * self.rows * (self.n + 1 + self.k * (3 if self.pages else 1))


def _glm(n: int) -> Spec:
    """A decode step: one row, every position scored, slots wanted."""
    return Spec(1, n, 2048, pages=n // PAGE)


CASES: dict[str, Spec] = {
    "2k": _glm(2048),
    "8k": _glm(8192),
    "32k": _glm(32768),
    "64k": _glm(65536),
    "128k": _glm(131072),
    "512k": _glm(524288),
    "1m": _glm(1048576),
}
ROWS = (1, 8, 32)
# Microseconds on one H200.
RIVALS: dict[str, dict[str, dict[int, float]]] = {
    "8k": {"target": {1: 8.0}},
    "64k": {"target": {1: 14.0}},
    "1m": {"target": {1: 45.0}},
}
# Positions are exact or wrong.
TOLERANCE = {"gluon": 0.0, "reference": 0.0}


def inputs(spec: Spec, key: jax.Array) -> tuple[jax.Array, ...]:
    """(scores, lengths) or (scores, lengths, table): normal scores, full rows, a sequence's pages in random order."""
    return _inputs(spec, key)


@functools.partial(jax.jit, static_argnums=0)
def _inputs(spec: Spec, key: jax.Array) -> tuple[jax.Array, ...]:
    ks, kt = jax.random.split(key)
    scores = jax.random.normal(ks, (spec.rows, spec.n), jnp.float32)
    lengths = jnp.full((spec.rows,), spec.n, jnp.int32)
    if not spec.pages:
        return scores, lengths
    sequences = spec.rows // spec.width
    ids = jax.random.permutation(kt, sequences * spec.pages).astype(jnp.int32)
    return scores, lengths, ids.reshape(sequences, spec.pages)
