"""RMSNorm, LayerNorm and quantization to e4m3 by groups."""

from __future__ import annotations

import jax

from pallas_kernels.norm_quant import reference


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis.

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


def quantize_groups(x: jax.Array, group: int = 128, floor: float = 1e-10) -> tuple[jax.Array, jax.Array]:
    """Quantizes each group of the last axis to e4m3 with its own scale.

    Computes: scale = max(amax, floor) / 448; values = e4m3(clamp(x / scale)).
    Inputs: x [..., k] float; group: static, the last group may be short; floor: lower bound of amax.
    Outputs: values float8_e4m3fn [..., k]; scale float32 [..., ceil(k / group)].
    Source: spec section 4; scales are not rounded to powers of two.
    """
    return reference.quantize_groups(x, group, floor)
