"""Routed experts and the shared expert of one layer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import registry
from pallas_kernels.arch import Arch
from pallas_kernels.blocks import BLOCK, BlockScaled, Weight
from pallas_kernels.experts.mosaic_plan import UNIT, one_row, several_rows
from pallas_kernels.experts.spec import Spec, joined, mailbox_words
from pallas_kernels.layer_index import cut_index
from pallas_kernels.lowering import default_arch
from pallas_kernels.parts import Parts
from pallas_kernels.registry import Backend, Module, Refusal, always, needs_sm80, needs_sm90

__all__ = ["ARITHMETICS", "BACKENDS", "Parts", "list_unit", "mailbox_words", "mix", "takes_quantized"]
ARITHMETICS = ("w8a16", "w8a8")
# What one program can hold a counter of in registers.
_MOST_EXPERTS = 1024
# Of a row: the Hopper kernel of one row looks at each in a step of its own.
_MOST_CHOICES = 32


def mix(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up: Weight,
    down: Weight,
    shared_gate_up: Weight,
    shared_down: Weight,
    layer: int | jax.Array,
    *,
    arithmetic: str = "w8a16",
    lists: tuple[jax.Array, jax.Array] | None = None,
    mailbox: jax.Array | None = None,
    epoch: int | jax.Array = 1,
    quantized: tuple[jax.Array, jax.Array] | None = None,
    apart: bool = False,
    backend: str | None = None,
) -> Any:
    """Weighted sum of the chosen experts, plus the shared expert.

    Computes: sum_j weights[r, j] * ffn_{ids[r, j]}(x[r]) + ffn_shared(x[r]), ffn(x) = (silu(x @ gate.T) * (x @ up.T)) @ down.T.
    Inputs: x [rows, hidden]; ids int32 [rows, k], an id that is negative or no expert's adds nothing, whatever its weight; weights
      float32 [rows, k], 2.5 included; gate_up [moe layers, experts, 2, width, hidden]; down [moe layers, experts, hidden, width];
      shared_gate_up [moe layers, 2, shared width, hidden]; shared_down [moe layers, hidden, shared width]; layer: static or traced
      scalar. No stack is sliced or copied (but see Refuses), offsets are 64-bit. lists: of ``router.add_norm_route`` for exactly
      these ids and the unit of ``list_unit()``; without them a launch of its own makes them. backend: None chooses.
      mailbox: int32 [at least ``mailbox_words`` of these sizes], in which tiles of a launch give each other their products; epoch,
      1 to 65535: of this call, another one than of any call on this mailbox since it was zeros. Without a mailbox zeros are made.
      quantized: of ``router.add_norm_route(..., split=True)`` for exactly this x: the two e4m3 terms of 1 to 8 rows
      [hidden / 128, 16, 128] and their scales float32 [hidden / 128, 8], which kernels then need not make; the result is the same.
      Read where ``takes_quantized`` says so.
      apart: static; whether the sum may be left to the caller.
    Outputs: [rows, hidden] in x's dtype; with ``apart``, where a kernel ends with the parts of a sum (2 to 8 rows in one launch),
      ``Parts`` whose ``summed(x.dtype)`` that is; with a mailbox (that, the mailbox as the call leaves it).
    Rounding points: the SwiGLU product once to x's dtype; down-projections, weights and sums in float32; one rounding at the end.
      The Hopper backend (up to 64 rows) multiplies e4m3 by e4m3 as ``fp8_linear`` does, W8A16 with two terms of x.
      The Triton backend multiplies in bfloat16, which holds e4m3 exactly, applies a block's scale to its sum in float32, and
      reads an e4m3 NaN byte as 480 times the scale on GPUs older than SM89.
    Refuses: kernels take bfloat16 x, FP8 block-scaled weights, sizes that are multiples of 128 and up to 1024 experts, the one for
      Hopper 1 to 64 rows (one row: a hidden size that is a multiple of 1024), Triton's W8A16 only; everything else is the
      reference's. On GPUs older than SM89 the stacks are passed as bytes, and whether XLA does that without a copy is unmeasured.
    In place: the mailbox, under jit where it is no parameter, or donated.
    Graph-safe: yes; fixed shapes. On Hopper two launches for one row; for 2 to 8 two in W8A16 where all experts are equally wide
      and at most 256, else three, and one more without lists; eight for 9 to 64. Where both projections are one launch, its blocks
      of threads wait for each other: all of them must be resident, one an SM.
    Bound: bytes of the distinct experts hit and of the shared one, once: 340 MB for one row at GLM's shape.
    Source: spec section 5.6; the weight multiplies the expert's output.
    """
    if arithmetic not in ARITHMETICS:
        raise ValueError(f"{arithmetic=} must be one of {ARITHMETICS}")
    _check(x, ids, weights, gate_up, down, shared_gate_up, shared_down)
    layers, experts, _, width, hidden = gate_up.shape
    kinds = {_kind(w) for w in (gate_up, down, shared_gate_up, shared_down)}
    spec = Spec(
        *(x.shape[0], ids.shape[1], experts, hidden, width, shared_gate_up.shape[-2], layers, x.dtype.name),
        *(kinds.pop() if len(kinds) == 1 else "mixed", arithmetic),
        apart=apart,
    )
    stacks = (gate_up, down, shared_gate_up, shared_down)
    if not (mailbox is None or (mailbox.ndim == 1 and mailbox.dtype == jnp.int32)):
        raise ValueError(f"mailbox {mailbox.dtype}{mailbox.shape} must be int32 and flat")
    words = mailbox_words(spec.rows, spec.k, width, spec.shared_width)
    if mailbox is not None and mailbox.size < words:
        raise ValueError(f"mailbox of {mailbox.size} words must have {words}: {x.shape=}, {ids.shape=}, {width=}")
    if quantized is not None:
        _check_quantized(spec, *quantized)
    # A layer that is known stays a number in jit: a kernel may be given its part of the stacks.
    where = (cut_index(layer, gate_up), None, lists)
    args = (x, ids, weights, *stacks, *where, mailbox, jnp.asarray(epoch, jnp.int32), quantized)
    return registry.call("experts", BACKENDS, spec, args, forced=backend)


def list_unit() -> int:
    """Rows of an item of the lists that ``mix`` takes on the default device; 0 where it takes none."""
    return 0 if needs_sm90(default_arch()) else UNIT


def takes_quantized(rows: int, width: int, shared_width: int, arithmetic: str) -> bool:
    """Whether ``mix`` has a use for ``quantized`` on the default device: where one launch has both projections of several rows."""
    return not needs_sm90(default_arch()) and arithmetic == "w8a16" and joined(rows, width, shared_width)


def _kind(w: Weight) -> str:
    return "float8_e4m3fn" if isinstance(w, BlockScaled) else f"{w.dtype.name} without scales"


def _check(x: jax.Array, ids: jax.Array, weights: jax.Array, gate_up: Weight, down: Weight, *shared: Weight) -> None:
    if x.ndim != 2 or ids.ndim != 2 or ids.shape != weights.shape or ids.shape[0] != x.shape[0]:
        raise ValueError(f"x {x.shape}, ids {ids.shape} and weights {weights.shape} must be [r, h], [r, k] and [r, k]")
    layers, experts, _, width, hidden = gate_up.shape
    shared_width = shared[0].shape[-2]
    wanted = ((layers, experts, hidden, width), (layers, 2, shared_width, hidden), (layers, hidden, shared_width))
    given = (down.shape, *(w.shape for w in shared))
    if given != wanted or gate_up.shape[2] != 2 or x.shape[1] != hidden:
        raise ValueError(
            f"gate_up {gate_up.shape} and x {x.shape} need down and the shared two as {wanted}, got {given}"
        )


def _check_quantized(spec: Spec, values: jax.Array, scales: jax.Array) -> None:
    blocks = spec.hidden // BLOCK
    given = (values.shape, values.dtype, scales.shape, scales.dtype)
    wanted = ((blocks, 16, BLOCK), jnp.float8_e4m3fn, (blocks, 8), jnp.float32)
    if given != wanted or not 1 <= spec.rows <= 8:
        raise ValueError(f"quantized {given} must be {wanted}, of 1 to 8 rows: {spec.rows=}")


def _kernels_support(spec: Spec) -> Refusal | None:
    """What both kernels ask."""
    if spec.weights != "float8_e4m3fn":
        return Refusal(f"needs FP8 block-scaled weights, got {spec.weights}")
    if spec.dtype != "bfloat16":
        return Refusal(f"needs bfloat16 rows, got {spec.dtype}")
    if any(size % BLOCK for size in (spec.hidden, spec.width, spec.shared_width)):
        sizes = f"hidden {spec.hidden}, width {spec.width} and shared_width {spec.shared_width}"
        return Refusal(f"{sizes} must be multiples of {BLOCK}")
    if spec.experts > _MOST_EXPERTS:
        return Refusal(f"{spec.experts} experts: one program counts the rows of at most {_MOST_EXPERTS}")
    return None


def _triton_supports(spec: Spec, arch: Arch | None) -> Refusal | None:
    if refusal := needs_sm80(arch):
        return refusal
    if spec.arithmetic != "w8a16":
        return Refusal(f"serves w8a16, not {spec.arithmetic}")
    return _kernels_support(spec)


def _hopper_supports(spec: Spec, arch: Arch | None) -> Refusal | None:
    if refusal := needs_sm90(arch):
        return refusal
    if refusal := _kernels_support(spec):
        return refusal
    if not 1 <= spec.rows <= 64:
        return Refusal(f"serves 1 to 64 rows, got {spec.rows}")
    if spec.k > _MOST_CHOICES:
        return Refusal(f"{spec.k} choices a row: at most {_MOST_CHOICES}")
    if one_row(spec) is None and several_rows(spec) is None:
        sizes = f"hidden {spec.hidden}, width {spec.width} and shared_width {spec.shared_width}"
        return Refusal(f"no plan for rows={spec.rows} with {sizes}: shared memory, or one row of no whole 1024")
    return None


BACKENDS = (
    Backend("mosaic_sm90", _hopper_supports, Module("pallas_kernels.experts.mosaic_sm90")),
    Backend("triton", _triton_supports, Module("pallas_kernels.experts.triton")),
    Backend("reference", always, Module("pallas_kernels.experts.reference")),
)
