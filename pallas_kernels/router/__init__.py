"""Router of the mixture of experts (noaux_tc, one group)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.arch import Arch
from pallas_kernels.layer_index import layer_index
from pallas_kernels.registry import Backend, Module, Refusal, always, needs_sm80
from pallas_kernels.router.spec import Spec, mailbox_words

_MOST_EXPERTS = 1024
# Of the experts: (pairs and items up to and with each [2, experts], pairs sorted by expert).
type Lists = tuple[jax.Array, jax.Array]


def route(
    x: jax.Array,
    gate: jax.Array,
    bias: jax.Array,
    layer: int | jax.Array,
    *,
    k: int,
    scale: float,
    backend: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Chosen experts of each row and their weights.

    Computes: s = sigmoid(f32(x) @ f32(gate[layer]).T); ids = the k largest of s + bias[layer] (equal values: lower id);
      weights = s[ids] / (sum s[ids] + 1e-20) * scale.
    Inputs: x [rows, hidden]; gate [moe layers, experts, hidden]; bias float32 [moe layers, experts]; layer: static or traced
      scalar; k, scale: static; backend: None chooses.
    Outputs: ids int32 [rows, k] by descending biased score, always in range and distinct, also of a row that holds NaN; weights
      float32 [rows, k].
    Rounding points: float32 throughout. Two bfloat16 operands are multiplied exactly by the matrix units and summed in float32.
    Refuses: the Triton backend takes bfloat16 or float32 x and gate, a hidden size that is a multiple of 128 and up to 1024
      experts; everything else is the reference's. ValueError where k is not within 1 .. experts.
    Graph-safe: yes; two launches (logits by slices of the hidden size, then the choice of each row).
    Bound: bytes of gate[layer] once (3.1 MB in bfloat16 at GLM's shape).
    Source: spec section 5.5.
    """
    spec = _spec(x, gate, bias, k, scale)
    args = (x, gate, bias, jnp.asarray(layer, jnp.int32), None)
    return registry.call("router", BACKENDS, spec, args, forced=backend)


def add_norm_route(
    x: jax.Array,
    delta: jax.Array | None,
    norm: jax.Array | None,
    gate: jax.Array,
    bias: jax.Array,
    layer: int | jax.Array,
    mailbox: jax.Array,
    *,
    eps: float,
    k: int,
    scale: float,
    unit: int = 0,
    split: bool = False,
    backend: str | None = None,
) -> tuple[Any, ...]:
    """Residual add, RMSNorm and the router of its result: one launch for few rows.

    Computes: total = x + delta (x itself without delta); normed = norm[layer] * total / sqrt(mean(total^2) + eps)
      (total without norm); ids, weights = route(normed, gate, bias, layer).
    Inputs: x and delta [rows, hidden] of one dtype; norm [moe layers, hidden]; mailbox int32 [``mailbox_words(rows, hidden,
      experts)``], zeros: programs of a launch meet there; gate, bias, layer, k, scale and backend as for ``route``, eps: static;
      unit: rows of an item of the experts (``experts.list_unit()``), 0 for no lists; split: whether normed is wanted in two terms.
    Outputs: total and normed [rows, hidden] in x's dtype; ids and weights as ``route``; lists, what ``experts.mix`` would make of
      the ids first: (pairs and items up to and with each expert int32 [2, experts], pairs by expert int32 [rows * k, rounded up to
      32], with anything behind the pairs), or None where the launch does not make them (unit below the rows, one row or more than
      8, more than 8 choices); with split, and only then, the terms of normed = scale * (values 0 + values 1 / 16) as ``fp8_linear``
      splits rows on Hopper: (values float8_e4m3fn [hidden / 128, 16, 128], term t of row r at 8 t + r; scales float32 [hidden /
      128, 8]; anything in what no row has), or None where the launch does not make them (no norm, more than 8 rows, a GPU before
      SM89); mailbox, zeros again.
    Rounding points: total once; the norm is taken of the rounded total, in float32, and rounded once; the rest as ``route``.
    Refuses: as ``route``; ValueError for a delta, a norm or a mailbox of another shape. One launch for up to 8 rows of bfloat16
      with a gate of bfloat16 and up to 256 experts; three for others.
    In place: the mailbox, under jit where it is no parameter, or donated. Graph-safe: yes; the same bits in every call and, up to
      8 rows, for a row whatever is in the rows beside it. Programs wait for each other there: for such as are before them in the
      grid, and the last, as many as rows, for each other.
    Bound: bytes of gate[layer] once (3.1 MB in bfloat16 at GLM's shape).
    Source: spec sections 5 and 5.5.
    """
    kind = "" if norm is None else norm.dtype.name
    spec = dataclasses.replace(
        _spec(x, gate, bias, k, scale), norm=kind, delta=delta is not None, eps=float(eps), unit=unit, split=split
    )
    shape = (gate.shape[0], x.shape[1]) if norm is None else norm.shape
    if shape != (gate.shape[0], x.shape[1]):
        raise ValueError(f"norm {shape} must be [layers, hidden]: {x.shape=}, {gate.shape=}")
    words = mailbox_words(spec.rows, spec.hidden, spec.experts)
    if mailbox.shape != (words,) or mailbox.dtype != jnp.int32:
        raise ValueError(f"mailbox {mailbox.dtype}{mailbox.shape} must be int32({words},): {x.shape=}, {gate.shape=}")
    if delta is not None and (delta.shape, delta.dtype) != (x.shape, x.dtype):
        raise ValueError(f"delta {delta.shape} {delta.dtype} must match x {x.shape} {x.dtype}")
    # A number that is known goes along with the launch, and the kernel has nothing to wait for before it loads gate.
    args = (x, gate, bias, layer_index(layer), None, norm, delta, mailbox)
    *results, terms, mailbox = registry.call("router", BACKENDS, spec, args, forced=backend)
    return (*results, terms, mailbox) if split else (*results, mailbox)


def _spec(x: jax.Array, gate: jax.Array, bias: jax.Array, k: int, scale: float) -> Spec:
    layers, experts, hidden = gate.shape
    if x.ndim != 2 or x.shape[1] != hidden or bias.shape != (layers, experts):
        raise ValueError(f"x {x.shape}, gate {gate.shape} and bias {bias.shape} must be [r, h], [l, e, h] and [l, e]")
    if not 1 <= k <= experts:
        raise ValueError(f"{k=} must be within 1 .. {experts=}")
    return Spec(x.shape[0], hidden, experts, k, layers, x.dtype.name, gate.dtype.name, float(scale))


def _triton_supports(spec: Spec, arch: Arch | None) -> Refusal | None:
    if refusal := needs_sm80(arch):
        return refusal
    if {spec.dtype, spec.gate_dtype} - {"bfloat16", "float32"}:
        return Refusal(f"{spec.dtype} rows and {spec.gate_dtype} gate: the kernel takes bfloat16 and float32")
    if spec.norm and (spec.dtype != "bfloat16" or spec.norm not in ("bfloat16", "float32")):
        return Refusal(f"rows of {spec.dtype} with a norm of {spec.norm}: the kernel takes bfloat16")
    if spec.hidden % 128:
        return Refusal(f"hidden {spec.hidden} must be a multiple of 128")
    if spec.experts > _MOST_EXPERTS:
        return Refusal(f"{spec.experts} experts: one program chooses among at most {_MOST_EXPERTS}")
    return None


BACKENDS = (
    Backend("triton", _triton_supports, Module("pallas_kernels.router.triton")),
    Backend("reference", always, Module("pallas_kernels.router.reference")),
)
