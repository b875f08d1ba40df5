"""Router in Triton; portable from SM80 to SM120.

Two launches. ``logits_kernel`` splits gate by experts and by slices of the hidden size, so that every SM has a part of its few
megabytes, all of it in flight at once. ``choose_kernel`` has a program a row, which adds the slices in a fixed order and chooses:
score and index are one 64-bit number whose maximum is the next expert, so a tie goes to the lower index by itself.
With a norm, few rows are one launch (``gluon_one``, ``gluon_few``); more have ``norm_quant``'s before these two.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl

from pallas_kernels import norm_quant
from pallas_kernels.lowering import triton_options
from pallas_kernels.router import gluon_few, gluon_one
from pallas_kernels.router.spec import Spec, slices_of

_SMALLEST = tl.constexpr(-(2**63))
# One program an SM, or nearly; a slice is no shorter than 128.
_PROGRAMS = 128


@triton.jit
def _add_product(logits, at_x, at_gate, live, known, EXACT: tl.constexpr):
    a = tl.load(at_x, mask=live[:, None], other=0.0)
    w = tl.load(at_gate, mask=known[:, None], other=0.0)
    if EXACT:
        total = tl.dot(a.to(tl.float32), tl.trans(w.to(tl.float32)), logits, input_precision="ieee")
    else:
        total = tl.dot(a, tl.trans(w), logits)
    return total


@triton.jit
def logits_kernel(
    x, gate, layer, partial,
    ROWS: tl.constexpr, HIDDEN: tl.constexpr, EXPERTS: tl.constexpr, SLICE: tl.constexpr,
    BM: tl.constexpr, BE: tl.constexpr, BK: tl.constexpr, EXACT: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Grid (expert tiles, slices, row blocks). partial float32 [slices, rows, experts]."""
    expert = tl.program_id(0) * BE + tl.arange(0, BE)
    part = tl.program_id(1)
    known = expert < EXPERTS
    inner = part * SLICE + tl.arange(0, BK)
    at_gate = gate + (tl.load(layer).to(tl.int64) * EXPERTS + expert)[:, None] * HIDDEN + inner[None, :]
    if BM == 1:
        total = tl.zeros([BE, BK], tl.float32)
        for k in tl.static_range(0, SLICE, BK):
            w = tl.load(at_gate + k, mask=known[:, None], other=0.0)
            total += w.to(tl.float32) * tl.load(x + inner + k).to(tl.float32)[None, :]
        tl.store(partial + part * EXPERTS + expert, tl.sum(total, 1), mask=known)
    else:
        row = tl.program_id(2).to(tl.int64) * BM + tl.arange(0, BM)
        live = row < ROWS
        at_x = x + row[:, None] * HIDDEN + inner[None, :]
        logits = tl.zeros([BM, BE], tl.float32)
        if UNROLL:
            for k in tl.static_range(0, SLICE, BK):
                logits = _add_product(logits, at_x + k, at_gate + k, live, known, EXACT)
        else:
            for k in range(0, SLICE, BK):
                logits = _add_product(logits, at_x + k, at_gate + k, live, known, EXACT)
        out = partial + (part.to(tl.int64) * ROWS + row)[:, None] * EXPERTS + expert[None, :]
        tl.store(out, logits, mask=live[:, None] & known[None, :])


@triton.jit
def choose_kernel(
    partial, bias, layer, ids, weights,
    ROWS: tl.constexpr, EXPERTS: tl.constexpr, K: tl.constexpr, SLICES: tl.constexpr, SCALE: tl.constexpr,
    BE: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Grid (rows). ids, weights [rows, K]."""
    row = tl.program_id(0).to(tl.int64)
    expert = tl.arange(0, BE)
    known = expert < EXPERTS
    shift = tl.load(bias + tl.load(layer).to(tl.int64) * EXPERTS + expert, mask=known, other=0.0).to(tl.float32)
    logit = tl.zeros([BE], tl.float32)
    for part in tl.static_range(0, SLICES):
        logit += tl.load(partial + (part * ROWS + row) * EXPERTS + expert, mask=known, other=0.0)
    score = 1.0 / (1.0 + tl.exp(-logit))
    # A float's bits order as an integer's do, once those of negative ones are inverted below the sign; NaN comes first.
    bits = (score + shift).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    keys = tl.where(known, ordered * 4294967296 + (EXPERTS - 1 - expert), _SMALLEST)
    place = tl.arange(0, BK)
    chosen = tl.zeros([BK], tl.int32)
    for i in tl.static_range(0, K):
        best = tl.max(keys, 0)
        chosen = tl.where(place == i, EXPERTS - 1 - (best & 0xFFFFFFFF).to(tl.int32), chosen)
        keys = tl.where(keys == best, _SMALLEST, keys)
    own = tl.sum(tl.where(chosen[:, None] == expert[None, :], score[None, :], 0.0), 1)
    own = tl.where(place < K, own, 0.0)
    share = own / (tl.sum(own, 0) + 1e-20) * SCALE
    tl.store(ids + row * K + place, chosen, mask=place < K)
    tl.store(weights + row * K + place, share, mask=place < K)


def slices(spec: Spec) -> int:
    """Slices of the hidden size: enough programs for every SM, each slice a multiple of 128."""
    blocks = spec.hidden // 128
    wanted = -(-_PROGRAMS // (-(-spec.experts // _tile(spec)) * -(-spec.rows // _rows(spec))))
    return next(n for n in range(min(wanted, blocks, 16), 0, -1) if blocks % n == 0)


def _exact(spec: Spec) -> bool:
    """Whether the matrix units would round an operand: float32 is multiplied by vector instructions."""
    return (spec.dtype, spec.gate_dtype) != ("bfloat16", "bfloat16")


def _rows(spec: Spec) -> int:
    """Rows of a program. 64 rows of float32 products spill."""
    return 1 if spec.rows == 1 else 16 if spec.rows <= 16 or _exact(spec) else 64


def _tile(spec: Spec) -> int:
    """Experts of a program."""
    return 16 if spec.rows <= 64 or _exact(spec) else 64


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
) -> tuple[jax.Array, ...]:
    """(ids, weights); with a mailbox (total, normed, ids, weights, lists, terms, mailbox)."""
    if mailbox is None:
        return _route(spec, x, gate, bias, layer)
    if norm is not None and gluon_one.serves(spec):
        return gluon_one.run(spec, x, gate, bias, layer, norm, delta, mailbox)
    if slices_of(spec):
        return gluon_few.run(spec, x, gate, bias, layer, norm, delta, mailbox)
    layer = jnp.asarray(layer, jnp.int32)
    if norm is None:
        total = normed = x if delta is None else x + delta
    else:
        total, normed = norm_quant.add_norm(x, delta, norm, layer, spec.eps)
    return total, normed, *_route(spec, normed, gate, bias, layer), None, None, mailbox


def _route(spec: Spec, x: jax.Array, gate: jax.Array, bias: jax.Array, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    parts, rows, tile, exact = slices(spec), _rows(spec), _tile(spec), _exact(spec)
    length, at = spec.hidden // parts, layer.reshape(1)
    deep = 256 if length % 256 == 0 and (rows == 1 or (rows == 16 and not exact)) else 128
    partial = jax_triton.triton_call(
        x, gate, at, kernel=logits_kernel, out_type=jax.ShapeDtypeStruct((parts, spec.rows, spec.experts), jnp.float32),
        grid=(-(-spec.experts // tile), parts, -(-spec.rows // rows)), name="router_logits", num_warps=4,
        **triton_options(), ROWS=spec.rows, HIDDEN=spec.hidden, EXPERTS=spec.experts, SLICE=length, BM=rows, BE=tile,
        # Short slices have all their loads in flight at once; long ones would make a kernel of thousands of instructions.
        BK=deep, EXACT=exact, UNROLL=length <= 1024 and not exact,
    )  # fmt: skip
    shape = (spec.rows, spec.k)
    return jax_triton.triton_call(
        partial, bias, at, kernel=choose_kernel, grid=(spec.rows,), name="router_choose", num_warps=1,
        out_type=(jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)), **triton_options(),
        ROWS=spec.rows, EXPERTS=spec.experts, K=spec.k, SLICES=parts, SCALE=spec.scale,
        BE=triton.next_power_of_2(spec.experts), BK=triton.next_power_of_2(spec.k),
    )  # fmt: skip
