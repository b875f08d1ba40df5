"""Linear layers with float or FP8 block-scaled weights, single or stacked."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.arch import Arch
from pallas_kernels.blocks import BLOCK, BlockScaled, Weight
from pallas_kernels.fp8_linear.norm import add_norm
from pallas_kernels.fp8_linear.plan import TILE, plan_for
from pallas_kernels.fp8_linear.spec import Spec
from pallas_kernels.layer_index import cut_index
from pallas_kernels.lowering import default_arch
from pallas_kernels.parts import Parts
from pallas_kernels.registry import Backend, Module, Refusal, always, needs_sm90

ARITHMETICS = ("w8a16", "w8a8")
Index = tuple[int | jax.Array, ...]
# Backends whose run takes a norm; for the others ``norm_linears`` puts it before them.
_FUSING = ("mosaic_sm90", "reference")


def linear(
    x: jax.Array,
    w: Weight,
    index: Index = (),
    *,
    arithmetic: str = "w8a16",
    dtype: jnp.dtype | type | None = None,
    backend: str | None = None,
) -> jax.Array:
    """One projection.

    Computes: y = x @ dequant(w[index]).T.
    Inputs: x [..., k] float32 or bfloat16; w [stack..., n, k] float32, bfloat16 or BlockScaled; index: one static or traced
      scalar for each stack axis (the stack is not sliced into a copy). arithmetic: "w8a16" dequantizes the weight, "w8a8" also
      quantizes x to e4m3 by groups of 128; it only matters for BlockScaled weights. backend: None chooses.
    Outputs: [..., n] in ``dtype`` (x's unless given).
    Rounding points: products accumulate in float32 (never TF32), FP8 weights are not rounded after scaling, one rounding at the
      end; "w8a8" adds the quantization of x. Hopper's FP8 units, which ``mosaic_sm90`` uses for both, keep some 14 bits within a
      k-block of 128; blocks are added in float32.
    Refuses: ValueError for an unknown arithmetic, an index that does not match the stack, or a k that differs.
    Graph-safe: yes; on Hopper a static index becomes pointers to the layer, a traced one is read from device memory.
    Bound: bytes of w[index] once, for up to some hundred rows.
    Source: spec section 4.
    """
    return linears(x, (w,), index, arithmetic=arithmetic, dtype=dtype, backend=backend)[0]


def linears(
    x: jax.Array,
    weights: tuple[Weight, ...],
    index: Index = (),
    *,
    arithmetic: str = "w8a16",
    dtype: jnp.dtype | type | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, ...]:
    """Several projections of one input, such as q_a and kv_a, in one launch where a GPU backend serves them.

    Computes: tuple of ``linear(x, w, index)``; all weights share the stack and k, their n may differ. All else as for ``linear``.
    """
    for w in weights:
        _check(x, w, index, 2, arithmetic)
    out = x.dtype if dtype is None else dtype
    spec = _spec(x, weights, len(index), arithmetic, "linear", out)
    return registry.call("fp8_linear", BACKENDS, spec, (x, tuple(weights), _placed(index, weights)), forced=backend)


def norm_linears(
    x: jax.Array,
    norm: jax.Array,
    weights: tuple[Weight, ...],
    index: Index = (),
    *,
    eps: float,
    delta: jax.Array | Parts | None = None,
    arithmetic: str = "w8a16",
    dtype: jnp.dtype | type | None = None,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, ...]]:
    """Residual add, RMSNorm and the projections of its result: one launch where a GPU backend serves it so (Hopper: one
    row, and up to 8 rows of at most 2048 elements without a residual, for as many outputs at most).

    Computes: total = x + delta (x itself without delta); normed = norm[index] * total / sqrt(mean(total^2) + eps);
      outs = linears(normed, weights, index).
    Inputs: x, delta [..., k] of one dtype, delta also as ``Parts`` of x's shape, which the norm's launch sums; norm [stack..., k],
      the stack of the weights; weights: 1 or more, as for ``linears``; eps: static; index, arithmetic, dtype and backend as for
      ``linear``.
    Outputs: total and normed [..., k] in x's dtype, outs.
    Rounding points: total once; the norm is taken of the rounded total, in float32, and rounded once; outs as ``linear``.
    Refuses: as ``linear``; ValueError for a delta or a norm of another shape. A forced backend that has no fused form of the norm
      serves the projections after a norm of its own launch.
    Graph-safe: yes. Bound: bytes of the weights once. Source: spec sections 4 and 5.
    """
    for w in weights:
        _check(x, w, index, 2, arithmetic)
    if norm.shape != (*weights[0].shape[: len(index)], x.shape[-1]):
        raise ValueError(
            f"norm of shape {norm.shape} must be the weights' stack and k: {weights[0].shape}, {len(index)=}"
        )
    apart = isinstance(delta, Parts)
    if delta is not None and (delta.shape, x.dtype if apart else delta.dtype) != (x.shape, x.dtype):
        raise ValueError(f"delta {delta.shape} {'' if apart else delta.dtype} must match x {x.shape} {x.dtype}")
    out = x.dtype if dtype is None else dtype
    plain = _spec(x, weights, len(index), arithmetic, "linear", out)
    spec = dataclasses.replace(plain, norm=norm.dtype.name, delta=delta is not None, eps=float(eps))
    if not apart and (backend in _FUSING or (backend is None and _mosaic_supports(spec, default_arch()) is None)):
        args = (x, tuple(weights), _placed(index, weights), None, norm, delta)
        total, normed, *outs = registry.call("fp8_linear", BACKENDS, spec, args, forced=backend)
        return total, normed, tuple(outs)
    total, normed = add_norm(x, delta, norm, index, eps)
    return total, normed, linears(normed, weights, index, arithmetic=arithmetic, dtype=dtype, backend=backend)


def swiglu(
    x: jax.Array, gate_up: Weight, index: Index = (), *, arithmetic: str = "w8a16", backend: str | None = None
) -> jax.Array:
    """Gate and up projections of one input and their SwiGLU product.

    Computes: silu(x @ gate.T) * (x @ up.T), gate = gate_up[index][0], up = gate_up[index][1].
    Inputs: x [..., k]; gate_up [stack..., 2, n, k]; index, arithmetic and backend as for ``linear``.
    Outputs: [..., n] in x's dtype.
    Rounding points: both products, silu and their product in float32, one rounding at the end.
    Refuses: as ``linear``.
    Source: spec section 5.6.
    """
    _check(x, gate_up, index, 3, arithmetic)
    spec = _spec(x, (gate_up,), len(index), arithmetic, "swiglu", x.dtype)
    return registry.call("fp8_linear", BACKENDS, spec, (x, (gate_up,), _placed(index, (gate_up,))), forced=backend)[0]


def _placed(index: Index, weights: tuple[Weight, ...]) -> Index:
    """The index as kernels take it, which may cut what is known out of the stacks."""
    return tuple(cut_index(i, weights[0]) for i in index)


def _spec(
    x: jax.Array, weights: tuple[Weight, ...], stack_axes: int, arithmetic: str, form: str, out: jnp.dtype | type
) -> Spec:
    stacks = {w.shape[:stack_axes] for w in weights}
    if len(stacks) != 1:
        raise ValueError(f"weights of one call must share their stack axes, got {sorted(stacks)}")
    blocks = all(isinstance(w, BlockScaled) for w in weights)
    kinds = {"float8_e4m3fn"} if blocks else {_kind(w) for w in weights}
    return Spec(
        rows=math.prod(x.shape[:-1]),
        k=x.shape[-1],
        ns=tuple(w.shape[-2] for w in weights),
        arithmetic=arithmetic,
        form=form,
        weights=kinds.pop() if len(kinds) == 1 else "mixed",
        layers=math.prod(weights[0].shape[:stack_axes]),
        x_dtype=jnp.dtype(x.dtype).name,
        out_dtype=jnp.dtype(out).name,
    )


def _kind(w: Weight) -> str:
    return "float8_e4m3fn blocks" if isinstance(w, BlockScaled) else jnp.dtype(w.dtype).name


def _check(x: jax.Array, w: Weight, index: Index, matrix_axes: int, arithmetic: str) -> None:
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"{arithmetic=} must be one of {ARITHMETICS}")
    if w.ndim != matrix_axes + len(index):
        raise ValueError(f"weight of shape {w.shape} needs {w.ndim - matrix_axes} stack indices, got {len(index)}")
    if x.shape[-1] != w.shape[-1]:
        raise ValueError(f"x of shape {x.shape} does not match a weight of shape {w.shape}: k={w.shape[-1]}")


def _hopper_supports(spec: Spec, arch: Arch | None) -> Refusal | None:
    """What both Hopper kernels ask first."""
    if refusal := needs_sm90(arch):
        return refusal
    if spec.weights != "float8_e4m3fn":
        return Refusal(f"needs FP8 block-scaled weights, got {spec.weights}")
    if spec.x_dtype != "bfloat16" or spec.out_dtype not in ("bfloat16", "float32"):
        return Refusal(f"needs bfloat16 inputs and bfloat16 or float32 outputs, got {spec.x_dtype}, {spec.out_dtype}")
    return None


def _mosaic_supports(spec: Spec, arch: Arch | None) -> Refusal | None:
    if refusal := _hopper_supports(spec, arch):
        return refusal
    if spec.norm not in ("", "bfloat16", "float32"):
        return Refusal(f"needs a norm of bfloat16 or float32, got {spec.norm}")
    if not 1 <= spec.rows <= 64:
        return Refusal(f"serves 1 to 64 rows, got {spec.rows}")
    if spec.k % BLOCK or any(n % TILE for n in spec.ns):
        return Refusal(f"k must be a multiple of {BLOCK} and every n of {TILE}, got k={spec.k}, n={spec.ns}")
    if plan_for(dataclasses.replace(spec, norm="", delta=False)) is None:
        return Refusal(f"no plan fits shared memory and its copies for rows={spec.rows}, k={spec.k}, {spec.form}")
    return None


def _prefill_supports(spec: Spec, arch: Arch | None) -> Refusal | None:
    if refusal := _hopper_supports(spec, arch):
        return refusal
    if spec.rows <= 64:
        return Refusal(f"serves more than 64 rows, got {spec.rows}")
    if spec.k % BLOCK or any(n % TILE for n in spec.ns):
        return Refusal(f"k must be a multiple of {BLOCK} and every n of {TILE}, got k={spec.k}, n={spec.ns}")
    if spec.norm:
        return Refusal("has no norm in its launch")
    return None


BACKENDS = (
    Backend("mosaic_sm90", _mosaic_supports, Module("pallas_kernels.fp8_linear.mosaic_sm90")),
    Backend("mosaic_prefill_sm90", _prefill_supports, Module("pallas_kernels.fp8_linear.mosaic_prefill_sm90")),
    Backend("reference", always, Module("pallas_kernels.fp8_linear.reference")),
)
