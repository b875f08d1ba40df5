"""Reference of the router in jnp; runs anywhere."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.norm_quant import reference as norm_quant
from pallas_kernels.norm_quant.reference import add, add_norm
from pallas_kernels.products import einsum
from pallas_kernels.router.spec import MOST_ROWS, Spec


def run(
    spec: Spec,
    x: jax.Array,
    gate: jax.Array,
    bias: jax.Array,
    layer: int | jax.Array,
    after: Any = None,
    norm: jax.Array | None = None,
    delta: jax.Array | None = None,
    mailbox: jax.Array | None = None,
) -> tuple[Any, ...]:
    """(ids, weights) as ``router.route`` describes them, with a mailbox (total, normed, ids, weights, None, terms, mailbox) of
    ``add_norm_route``.

    Nothing reads ``after`` or ``mailbox`` here.
    """
    if mailbox is None:
        return route(x, gate, bias, layer, spec.k, spec.scale)
    if norm is None:
        total = normed = x if delta is None else add(x, delta)
    else:
        total, normed = add_norm(x, delta, norm[layer], spec.eps)
    wanted = spec.split and spec.norm and spec.rows <= MOST_ROWS and spec.hidden % 128 == 0
    terms = split(normed) if wanted else None
    return total, normed, *route(normed, gate, bias, layer, spec.k, spec.scale), None, terms, mailbox


def split(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(values [k / 128, 16, 128], scales [k / 128, 8]) of up to 8 rows x [rows, k], zeros for the rows that x lacks."""
    values, scales = norm_quant.split(x)
    blocks = values[:, :MOST_ROWS].reshape(2 * MOST_ROWS, -1, 128)
    return blocks.swapaxes(0, 1), scales[:, :MOST_ROWS]


def route(
    x: jax.Array, gate: jax.Array, bias: jax.Array, layer: int | jax.Array, k: int, scale: float
) -> tuple[jax.Array, jax.Array]:
    scores = jax.nn.sigmoid(einsum("rk,ek->re", x, gate[layer]))
    _, ids = jax.lax.top_k(scores + bias[layer].astype(jnp.float32)[None, :], k)
    # The bias decides who is chosen, never how much: the weights are the unbiased scores.
    chosen = jnp.take_along_axis(scores, ids, axis=-1)
    return ids.astype(jnp.int32), chosen / (jnp.sum(chosen, axis=-1, keepdims=True) + 1e-20) * scale
