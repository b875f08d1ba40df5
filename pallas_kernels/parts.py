"""What the experts of some rows gave, before it is summed: the launch that needs the sum can take it itself."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from pallas_kernels.products import rounded


@functools.partial(jax.tree_util.register_dataclass, data_fields=("parts", "ids", "weights"), meta_fields=("experts",))
@dataclasses.dataclass(frozen=True)
class Parts:
    """A sum [rows, hidden] that nobody has taken yet.

    parts: float32 [rows * k + rows, hidden], of each choice of each row, then of the shared expert for each row; of a choice that
      is no expert's it may hold anything. ids int32, weights float32 [rows, k]; experts: ids below it, from 0 on, are experts'.
    """

    parts: jax.Array
    ids: jax.Array
    weights: jax.Array
    experts: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of the sum."""
        return self.ids.shape[0], self.parts.shape[1]

    def summed(self, dtype: jnp.dtype | type) -> jax.Array:
        """[rows, hidden]: each choice's part times its weight, in order of the choices, plus the shared expert's; rounded once."""
        pairs = self.ids.size
        total = combined(self.parts[:pairs], self.parts[pairs:], self.ids, self.weights, self.experts)
        return rounded(total, dtype)


def combined(parts: jax.Array, shared: jax.Array, ids: jax.Array, weights: jax.Array, experts: int) -> jax.Array:
    """``Parts.summed`` in float32; parts [rows * k, hidden] of the choices, shared [rows, hidden]."""
    k = ids.shape[1]
    parts = parts.reshape(*ids.shape, -1)
    placed = (ids >= 0) & (ids < experts)
    terms = [jnp.where(placed[:, j, None], weights[:, j, None] * parts[:, j], 0.0) for j in range(k)]
    return functools.reduce(jnp.add, terms) + shared


def whole(delta: jax.Array | Parts, dtype: jnp.dtype | type) -> jax.Array:
    """delta as an array; what is one already stays it."""
    return delta.summed(dtype) if isinstance(delta, Parts) else delta
