"""Linear layers with float or FP8 block-scaled weights, single or stacked."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.blocks import Weight
from pallas_kernels.fp8_linear import reference

ARITHMETICS = ("w8a16", "w8a8")
Index = tuple[int | jax.Array, ...]


def linear(
    x: jax.Array, w: Weight, index: Index = (), *, arithmetic: str = "w8a16", dtype: jnp.dtype | type | None = None
) -> jax.Array:
    """One projection.

    Computes: y = x @ dequant(w[index]).T.
    Inputs: x [..., k] float32 or bfloat16; w [stack..., n, k] float32, bfloat16 or BlockScaled; index: one static or traced
      scalar for each stack axis (the stack is not sliced into a copy). arithmetic: "w8a16" dequantizes the weight, "w8a8" also
      quantizes x to e4m3 by groups of 128; it only matters for BlockScaled weights.
    Outputs: [..., n] in ``dtype`` (x's unless given).
    Rounding points: products accumulate in float32 (never TF32), FP8 weights are not rounded after scaling, one rounding at the
      end; "w8a8" adds the quantization of x.
    Refuses: ValueError for an unknown arithmetic, an index that does not match the stack, or a k that differs.
    Bound: bytes of w[index] once, for up to some hundred rows.
    Source: spec section 4.
    """
    _check(x, w, index, 2, arithmetic)
    return reference.linear(x, w, index, arithmetic, x.dtype if dtype is None else dtype)


def swiglu(x: jax.Array, gate_up: Weight, index: Index = (), *, arithmetic: str = "w8a16") -> jax.Array:
    """Gate and up projections of one input and their SwiGLU product.

    Computes: silu(x @ gate.T) * (x @ up.T), gate = gate_up[index][0], up = gate_up[index][1].
    Inputs: x [..., k]; gate_up [stack..., 2, n, k]; index and arithmetic as for ``linear``.
    Outputs: [..., n] in x's dtype.
    Rounding points: both products, silu and their product in float32, one rounding at the end.
    Refuses: as ``linear``.
    Source: spec section 5.6.
    """
    _check(x, gate_up, index, 3, arithmetic)
    return reference.swiglu(x, gate_up, index, arithmetic)


def _check(x: jax.Array, w: Weight, index: Index, matrix_axes: int, arithmetic: str) -> None:
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"{arithmetic=} must be one of {ARITHMETICS}")
    if w.ndim != matrix_axes + len(index):
        raise ValueError(f"weight of shape {w.shape} needs {w.ndim - matrix_axes} stack indices, got {len(index)}")
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x of shape {x.shape} does not match a weight of shape {w.shape}: k={w.shape[-1]}")
