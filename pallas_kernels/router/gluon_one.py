"""Residual add, RMSNorm and router of one row in one launch; Gluon, from SM80 to SM120.

As ``gluon_few``, but 1 / RMS is no meeting: each of the 128 programs with 16 experts and a slice of the hidden size reads the whole
row while gate is on its way. One program chooses, one stores the sum and the norm.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax_triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pallas_kernels import jax_gluon
from pallas_kernels.gluon_shared import own_shared, warp_barrier
from pallas_kernels.layer_index import layer_argument
from pallas_kernels.lowering import default_arch, triton_options
from pallas_kernels.router.gluon_few import AT_ONCE, EACH, multiply, operand_places, products_layout, with_deltas
from pallas_kernels.router.gluon_norm import load_row, norm_row, sum_row
from pallas_kernels.router.gluon_rank import SHARED, choose_eight, key_of
from pallas_kernels.router.gluon_words import operands, wait_for_sums
from pallas_kernels.router.spec import MOST_ROWS, TILE, WARPS, Spec, slices_of

jax_gluon.install()


@gluon.jit
def _norm_and_multiply(
    gates, rows, deltas, scales, whole, added, mailbox, part, tile,
    HIDDEN: gl.constexpr, ADD: gl.constexpr, CHUNKS: gl.constexpr, SLICES: gl.constexpr, PADDED: gl.constexpr, BM: gl.constexpr,
    EPS: gl.constexpr, CHUNK: gl.constexpr, mma: gl.constexpr,
):  # fmt: skip
    """What ``_add_logits`` adds, of what it has loaded."""
    sums, normed = with_deltas(rows, deltas, ADD, CHUNKS), ()
    _, inverse = sum_row(whole, added, HIDDEN, EPS, ADD, True, CHUNK)
    for c in gl.static_range(CHUNKS):
        z = (sums[c].to(gl.float32) * inverse * scales[c].to(gl.float32)).to(sums[c].dtype)
        normed = normed + (z,)  # noqa: RUF005 (Triton knows no unpacking)
    multiply(gates, normed, mailbox, mailbox, part, tile, 1, False, CHUNKS, SLICES, PADDED, BM, mma)


@gluon.jit
def _add_logits(
    x, delta, norm, gate, mailbox, part, tile, always,
    HIDDEN: gl.constexpr, EXPERTS: gl.constexpr, ADD: gl.constexpr, CHUNKS: gl.constexpr, SLICES: gl.constexpr,
    PADDED: gl.constexpr, BM: gl.constexpr, EPS: gl.constexpr, CHUNK: gl.constexpr,
):  # fmt: skip
    """16 experts' part of a slice in the row's logits: mailbox [SLICES, PADDED]."""
    W: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = products_layout(W)
    expert, inner, row, column = operand_places(part, tile, CHUNKS, BM, mma)
    # What is not there is another's once more, which nobody reads: no mask, so few instructions stand in front of the loads.
    expert = gl.minimum(expert, EXPERTS - 1)
    row *= 0  # every column of the right operand is the row
    rows, deltas, scales, gates = (), (), (), ()
    whole, added = load_row(x, delta, 0, HIDDEN, ADD, CHUNK)
    # ptxas would put gate's loads, which take longest, last.
    warp_barrier()
    for c in gl.static_range(CHUNKS):
        gates = gates + (gl.load(gate + (expert * HIDDEN + (inner + c * W * 32))),)  # noqa: RUF005
    warp_barrier()
    for c in gl.static_range(CHUNKS):
        at = column + c * W * 32
        rows = rows + (gl.load(x + (row + at)),)  # noqa: RUF005
        deltas = deltas + (gl.load(delta + (row + at)) if ADD else 0,)  # noqa: RUF005
        scales = scales + (gl.load(norm + at),)  # noqa: RUF005
    gl.thread_barrier()
    # Always so. ptxas would put sums and products between the loads, to save registers; but nothing in front of a branch.
    if always > 0:
        _norm_and_multiply(
            gates, rows, deltas, scales, whole, added, mailbox, part, tile,
            HIDDEN, ADD, CHUNKS, SLICES, PADDED, BM, EPS, CHUNK, mma,
        )  # fmt: skip


@gluon.jit
def _choose(
    logits, bias, ids, weights, always, base,
    EXPERTS: gl.constexpr, PADDED: gl.constexpr, K: gl.constexpr, SCALE: gl.constexpr, LOOK: gl.constexpr,
    LOOK_OPERANDS: gl.constexpr, LOOK_TYPES: gl.constexpr,
):  # fmt: skip
    """ids and weights [K], K up to 8, of logits [SLICES, PADDED]."""
    thread = gl.arange(0, 128, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    a, b = thread * 2 < EXPERTS, thread * 2 + 1 < EXPERTS
    shift_a = gl.load(bias + thread * 2, mask=a, other=0.0).to(gl.float32)
    shift_b = gl.load(bias + (thread * 2 + 1), mask=b, other=0.0).to(gl.float32)
    given = [logits + thread * 2, (thread * 2 < PADDED).to(gl.int32)]
    found = gl.inline_asm_elementwise(LOOK, LOOK_OPERANDS, given, dtype=LOOK_TYPES, is_pure=False, pack=1)
    score_a = 1.0 / (1.0 + gl.exp(-found[0].to(gl.float32, bitcast=True)))
    score_b = 1.0 / (1.0 + gl.exp(-found[1].to(gl.float32, bitcast=True)))
    keys = (key_of(score_a + shift_a, a), key_of(score_b + shift_b, b))
    place, expert, score, total = choose_eight(keys, (score_a, score_b), thread, base, K)
    if always > 0:
        gl.store(ids + place, expert, mask=place < K)
        gl.store(weights + place, score * (SCALE / (total + 1e-20)), mask=place < K)


@gluon.jit
def one_row_kernel(
    x, delta, norm, gate, bias, layer, always, mailbox, total, normed, ids, weights, values, terms,
    HIDDEN: gl.constexpr, EXPERTS: gl.constexpr, K: gl.constexpr, SCALE: gl.constexpr, EPS: gl.constexpr, ADD: gl.constexpr,
    CHUNKS: gl.constexpr, SLICES: gl.constexpr, TILES: gl.constexpr, BM: gl.constexpr, CHUNK: gl.constexpr, AT_CALL: gl.constexpr,
    SPLIT: gl.constexpr, LOOK: gl.constexpr, LOOK_OPERANDS: gl.constexpr, LOOK_TYPES: gl.constexpr,
):  # fmt: skip
    """Grid (TILES * SLICES, then who chooses, then who stores). mailbox: words of logits [SLICES, TILES * 16]. always: above 0."""
    PADDED: gl.constexpr = TILES * 16
    which = (layer >> 5 if AT_CALL else gl.load(layer)).to(gl.int64)
    program = gl.program_id(0)
    base = own_shared(SHARED)
    if program < TILES * SLICES:
        _add_logits(
            x, delta, norm + which * HIDDEN, gate + which * EXPERTS * HIDDEN, mailbox, program % SLICES, program // SLICES, always,
            HIDDEN, EXPERTS, ADD, CHUNKS, SLICES, PADDED, BM, EPS, CHUNK,
        )  # fmt: skip
    elif program == TILES * SLICES:
        _choose(
            mailbox, bias + which * EXPERTS, ids, weights, always, base,
            EXPERTS, PADDED, K, SCALE, LOOK, LOOK_OPERANDS, LOOK_TYPES,
        )  # fmt: skip
    else:
        norm_row(
            x, delta, norm + which * HIDDEN, mailbox, total, normed, values, terms, 0, always,
            HIDDEN, EPS, ADD, True, CHUNK, SPLIT, False, 1, 1, BM,
        )  # fmt: skip


def serves(spec: Spec) -> bool:
    return spec.rows == 1 and bool(spec.norm) and spec.k <= 8 and slices_of(spec) > 0


def run(
    spec: Spec,
    x: jax.Array,
    gate: jax.Array,
    bias: jax.Array,
    layer: int | jax.Array,
    norm: jax.Array,
    delta: jax.Array | None,
    mailbox: jax.Array,
) -> tuple[jax.Array, ...]:
    """(total, normed, ids, weights, None, terms, mailbox), as ``router.add_norm_route`` describes them."""
    shape, slices, tiles = jax.ShapeDtypeStruct, slices_of(spec), -(-spec.experts // TILE)
    words, split = jax.new_ref(mailbox), spec.split_by(default_arch())
    row, unused, groups = shape((1, spec.hidden), x.dtype), shape((1,), jnp.int32), spec.hidden // 128
    total, normed, ids, weights, values, scales = jax_triton.triton_call(
        x, x if delta is None else delta, norm, gate, bias, layer_argument(layer), 3, words,
        kernel=one_row_kernel,
        out_type=(
            row if spec.delta else unused, row, shape((1, spec.k), jnp.int32), shape((1, spec.k), jnp.float32),
            shape((groups, 2 * MOST_ROWS, 128), jnp.float8_e4m3fn) if split else unused,
            shape((groups, MOST_ROWS), jnp.float32) if split else unused,
        ),
        grid=(tiles * slices + 2,), name="router_one", num_warps=WARPS, **triton_options(),
        HIDDEN=spec.hidden, EXPERTS=spec.experts, K=spec.k, SCALE=spec.scale, EPS=spec.eps, ADD=spec.delta,
        CHUNKS=groups // slices, SLICES=slices, TILES=tiles, BM=MOST_ROWS, CHUNK=min(spec.hidden & -spec.hidden, AT_ONCE),
        AT_CALL=isinstance(layer, int), SPLIT=split,
        LOOK=wait_for_sums(EACH, slices, tiles * TILE, clear=True), LOOK_OPERANDS=operands(EACH, 1), LOOK_TYPES=(gl.int32,) * EACH,
    )  # fmt: skip
    terms = (values, scales) if split else None
    return total if spec.delta else x, normed, ids, weights, None, terms, jax.freeze(words)
