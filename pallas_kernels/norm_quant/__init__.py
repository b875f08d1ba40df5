"""RMSNorm, LayerNorm, quantization to e4m3 by groups, and their fusions with a residual add."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from pallas_kernels import registry
from pallas_kernels.arch import Arch
from pallas_kernels.layer_index import layer_index
from pallas_kernels.norm_quant import reference
from pallas_kernels.norm_quant.spec import Spec
from pallas_kernels.parts import Parts
from pallas_kernels.registry import Backend, Module, Refusal, always, needs_sm80, needs_sm90


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis, in jnp; XLA fuses it with what stands around it.

    Computes: weight * x / sqrt(mean(x^2) + eps).
    Inputs: x [..., n] float32 or bfloat16; weight [n]; eps: static float.
    Outputs: [..., n] in x's dtype.
    Rounding points: everything in float32, one rounding at the end.
    Bound: bytes of x read once and written once.
    Source: spec section 5; transformers rounds before the multiplication by weight, vLLM after it, as here.
    """
    return reference.rms_norm(x, weight, eps)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """LayerNorm over the last axis: subtracts the mean, biased variance.

    Computes: weight * (x - mean) / sqrt(var + eps) + bias.
    Inputs: x [..., n]; weight, bias [n]; eps: static float. Outputs: [..., n] in x's dtype.
    Rounding points: everything in float32, one rounding at the end.
    Source: spec section 5.3 (index keys, eps 1e-6).
    """
    return reference.layer_norm(x, weight, bias, eps)


def quantize_groups(
    x: jax.Array, group: int = 128, floor: float = 1e-10, *, backend: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Quantizes each group of the last axis to e4m3 with its own scale.

    Computes: scale = max(amax, floor) / 448; values = e4m3(clamp(x / scale)).
    Inputs: x [..., k] float; group: static, the last group may be short; floor: lower bound of amax.
    Outputs: values float8_e4m3fn [..., k]; scale float32 [..., ceil(k / group)].
    Refuses: a backend other than the reference takes [rows, k] bfloat16, group 128 and floor 1e-10.
    Graph-safe: yes.
    Source: spec section 4; scales are not rounded to powers of two.
    """
    if x.ndim != 2 or (group, floor) != (128, 1e-10):
        if backend not in (None, "reference"):
            raise ValueError(f"{backend=} takes [rows, k], group 128, floor 1e-10: got {x.shape}, {group=}, {floor=}")
        return reference.quantize_groups(x, group, floor)
    values, scale = _fused(x, None, None, 0, 0.0, True, backend)
    return values, scale


def norm_quantize(
    x: jax.Array, weight: jax.Array, layer: int | jax.Array, eps: float, *, backend: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """RMSNorm and quantization by groups of 128 in one launch.

    Computes: quantize_groups(rms_norm(x, weight[layer], eps)).
    Inputs: x [rows, n] bfloat16; weight [layers, n]; layer: static or traced scalar; eps: static.
    Outputs: values float8_e4m3fn [rows, n]; scale float32 [rows, ceil(n / 128)].
    Rounding points: the norm once to x's dtype, then e4m3, so that the result equals the two operations one after the other.
    Graph-safe: yes. Source: spec sections 4 and 5.
    """
    values, scale = _fused(x, None, weight, layer, eps, True, backend)
    return values, scale


def add_norm(
    x: jax.Array,
    residual: jax.Array | Parts | None,
    weight: jax.Array,
    layer: int | jax.Array,
    eps: float,
    *,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Residual add and the RMSNorm that follows, in one launch; without a residual ``rms_norm``, whatever the backend.

    Computes: h = x + residual (x itself without residual); (h, rms_norm(h, weight[layer], eps)).
    Inputs: x and residual (or None) [rows, n] of one dtype; weight [layers, n]; layer: static or traced scalar; eps: static.
      residual: also ``Parts`` of ``experts.mix``, for ``residual.summed(x.dtype)``, with the same bits.
    Outputs: h and its norm, [rows, n] in x's dtype.
    Rounding points: a sum of parts once; h once; the norm is taken of the rounded h, and rounded once.
    Graph-safe: yes. Source: spec section 5. On Hopper parts are summed in the same launch, by a cluster of eight blocks a row.
    """
    if residual is None:
        return x, rms_norm(x, weight[layer], eps)
    total, normed = _fused(x, residual, weight, layer, eps, False, backend)
    return total, normed


def add_norm_quantize(
    x: jax.Array,
    residual: jax.Array,
    weight: jax.Array,
    layer: int | jax.Array,
    eps: float,
    *,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``add_norm`` with the norm quantized by groups of 128: (h, values float8_e4m3fn [rows, n], scale [rows, ceil(n / 128)]).

    Inputs, rounding points and source: as ``add_norm`` and ``norm_quantize``.
    """
    total, values, scale = _fused(x, residual, weight, layer, eps, True, backend)
    return total, values, scale


def add_norm_split(
    x: jax.Array,
    residual: jax.Array,
    weight: jax.Array,
    layer: int | jax.Array,
    eps: float,
    *,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """``add_norm`` whose norm also comes as the two e4m3 terms that ``fp8_linear`` multiplies for W8A16 on Hopper.

    Computes: (h, normed) of ``add_norm``; values and scales with normed = scale * (values[0] + values[1] / 16), by groups of 128:
      scale is the power of two that max(amax, 2^-100) / 448 rounds up to, so that the terms are exact for elements above 2^-14
      of the group's largest.
    Inputs: as ``add_norm``, n a multiple of 128.
    Outputs: h and normed [rows, n]; values float8_e4m3fn [2, padded, n], scales float32 [n / 128, padded], padded = rows rounded
      up to 32; anything beyond the rows.
    Rounding points: as ``add_norm``, then one a term. Refuses: ValueError for another n.
    Graph-safe: yes. Source: spec sections 4 and 5.
    """
    if x.shape[1] % 128:
        raise ValueError(f"the width of {x.shape} must be a multiple of 128")
    total, normed, values, scales = _fused(x, residual, weight, layer, eps, False, backend, True)
    return total, normed, values, scales


def _fused(
    x: jax.Array,
    residual: jax.Array | Parts | None,
    weight: jax.Array | None,
    layer: int | jax.Array,
    eps: float,
    quantize: bool,
    backend: str | None,
    split: bool = False,
) -> tuple[jax.Array, ...]:
    parts = residual.ids.shape[1] if isinstance(residual, Parts) else 0
    if residual is not None:
        given = (residual.shape, x.dtype if isinstance(residual, Parts) else residual.dtype)
        if given != (x.shape, x.dtype):
            raise ValueError(f"residual {given[0]} {given[1]} must match x {x.shape} {x.dtype}")
    if weight is not None and (weight.ndim != 2 or weight.shape[1] != x.shape[1]):
        raise ValueError(f"weight of shape {weight.shape} must be [layers, {x.shape[1]}]")
    layers, kind = (1, "none") if weight is None else (weight.shape[0], weight.dtype.name)
    sizes = (x.shape[0], x.shape[1], layers, x.dtype.name, kind)
    spec = Spec(*sizes, residual is not None, weight is not None, quantize, float(eps), split, parts)
    args = (x, residual, weight, layer_index(layer))
    return registry.call("norm_quant", BACKENDS, spec, args, forced=backend)


def _gluon_supports(spec: Spec, arch: Arch | None) -> Refusal | None:
    if refusal := needs_sm90(arch):
        return refusal
    if not spec.parts or not spec.norm or spec.quantize or spec.split:
        return Refusal("serves the residual add of parts with the norm that follows, and nothing else")
    if spec.dtype != "bfloat16":
        return Refusal(f"rows are {spec.dtype}, the kernel takes bfloat16")
    if spec.parts & (spec.parts - 1) or not 2 <= spec.parts <= 16:
        return Refusal(f"{spec.parts} parts a row must be 2, 4, 8 or 16")
    if spec.width % 1024 or spec.width > 16384:
        return Refusal(f"width {spec.width} must be a multiple of 1024, 16384 at most: eight blocks a row")
    return None


def _triton_supports(spec: Spec, arch: Arch | None) -> Refusal | None:
    if refusal := needs_sm80(arch):
        return refusal
    if spec.dtype != "bfloat16":
        return Refusal(f"rows are {spec.dtype}, the kernel takes bfloat16")
    if spec.split and arch is not None and arch.sm < 89:
        return Refusal(f"e4m3 terms need a GPU that converts to them, SM89 or newer, got SM{arch.sm}")
    if spec.width > 16384:
        return Refusal(f"width {spec.width} exceeds 16384, what one program holds in registers")
    return None


def _load_reference() -> Callable[..., Any]:
    return reference.fused


BACKENDS = (
    Backend("gluon", _gluon_supports, Module("pallas_kernels.norm_quant.gluon_parts")),
    Backend("triton", _triton_supports, Module("pallas_kernels.norm_quant.triton")),
    Backend("reference", always, _load_reference),
)
