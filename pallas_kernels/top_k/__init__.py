"""Selection of the k best positions of a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, overload

import jax
import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.arch import Arch
from pallas_kernels.registry import Backend, Module, Refusal, always, needs_sm80
from pallas_kernels.top_k.spec import Spec

# What the GPU kernels count in 16 bits of a register and address in 32.
_MOST_K, _MOST_N, _MOST_ROWS = 2048, 1 << 20, 1024


@overload
def top_k(scores: jax.Array, lengths: jax.Array, k: int, *, backend: str | None = None) -> jax.Array: ...
@overload
def top_k(
    scores: jax.Array, lengths: jax.Array, k: int, *, table: jax.Array, backend: str | None = None
) -> tuple[jax.Array, jax.Array]: ...
def top_k(
    scores: jax.Array, lengths: jax.Array, k: int, *, table: jax.Array | None = None, backend: str | None = None
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Positions of the k largest scores of each row, in ascending order; with a block table also their cache slots.

    Computes: the k largest of scores[r, :lengths[r]]. Scores compare as numbers (-0.0 equals 0.0, denormals differ from
      zero), NaN counts as minus infinity, equal scores go to the lower position.
    Inputs: scores float32 [rows, n]; lengths int32 [rows] in 0..n (what lies past a length is not looked at);
      k: static; table int32 [sequences, pages] of page ids: row r belongs to sequence r // (rows // sequences).
    Outputs: positions int32 [rows, k]: min(k, length) of them ascending, then -1. With a table also slots int32 [rows, k]:
      table[sequence, position // 64] * 64 + position % 64, and -1 where the position is -1 or past the table, or
      the page id is negative.
    Rounding points: none; the result is exact and the same in every call.
    Refuses: rows that are no multiple of the table's sequences, a table without any. The GPU backend takes k up to 2048, n up to
      2^20, 1024 rows.
    In place: nothing. Graph-safe: yes, one launch up to n = 8192, two beyond; lengths are read on the device.
    Bound: 4 * n bytes a row.
    Source: spec section 5.4, traps 15 and 16.
    """
    rows, n = scores.shape
    if scores.dtype != jnp.float32 or lengths.dtype != jnp.int32 or lengths.shape != (rows,) or k < 1:
        raise ValueError(
            f"scores {scores.dtype}{scores.shape} must be float32 [rows, n], lengths {lengths.dtype}{lengths.shape} int32 "
            f"[rows], {k=} at least 1"
        )
    if table is None:
        return registry.call("top_k", BACKENDS, Spec(rows, n, k), (scores, lengths), forced=backend)
    if table.dtype != jnp.int32 or table.ndim != 2 or min(table.shape) < 1 or rows % table.shape[0]:
        raise ValueError(
            f"table {table.dtype}{table.shape} must be int32 [sequences, pages], neither 0, {rows=} a multiple of sequences"
        )
    spec = Spec(rows, n, k, rows // table.shape[0], table.shape[1])
    return registry.call("top_k", BACKENDS, spec, (scores, lengths, table), forced=backend)


def _gluon_supports(spec: Spec, arch: Arch | None) -> Refusal | None:
    if refusal := needs_sm80(arch):
        return refusal
    if not (1 <= spec.k <= _MOST_K and 1 <= spec.n <= _MOST_N and 1 <= spec.rows <= _MOST_ROWS):
        return Refusal(
            f"k {spec.k}, n {spec.n} and rows {spec.rows} must be in 1..{_MOST_K}, 1..{_MOST_N} and 1..{_MOST_ROWS}"
        )
    return None


def _load_reference() -> Callable[..., Any]:
    from pallas_kernels.top_k import reference

    def run(spec: Spec, *args: jax.Array) -> Any:
        return reference.run(spec.k, *args)

    return run


BACKENDS = (
    Backend("gluon", _gluon_supports, Module("pallas_kernels.top_k.gluon")),
    Backend("reference", always, _load_reference),
)
