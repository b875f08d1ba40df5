"""Residual add, RMSNorm, router and the experts' row lists of up to 8 rows in one launch; Gluon, from SM80 to SM120.

Three kinds of programs, in the order of the grid. One a row adds and norms: it says the row's 1 / RMS. 128 have 16 experts and an
eighth of the hidden size each, of all rows, so that gate is read once in all: they add for themselves, wait for 1 / RMS of the rows
while gate is on its way, and multiply; neither operand needs shared memory, because both are loaded the way ``mma`` wants them (16
bytes of neighbouring k a thread: the order of k is another than memory's, the same in both). At the end one a row waits for the
row's logits and chooses; then these tell each other what they chose, and each lists its own pairs and a part of the table. Who
reads a word last zeroes it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax_triton
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from pallas_kernels import jax_gluon
from pallas_kernels.layer_index import layer_argument
from pallas_kernels.lowering import default_arch, triton_options
from pallas_kernels.router.gluon_choice import bits_ahead, eight, hear, list_rows, places_of, store_choice, tell
from pallas_kernels.router.gluon_norm import norm_row
from pallas_kernels.router.gluon_words import KEEP, keys_of, operands, wait_for_sums, word
from pallas_kernels.router.spec import MOST_EXPERTS, MOST_ROWS, TILE, WARPS, Spec, slices_of

jax_gluon.install()
AT_ONCE = 2048  # most numbers that all threads of a norm load at once
EACH = MOST_EXPERTS // (32 * WARPS)  # experts of a thread that waits for logits
_WAIT = gl.constexpr(wait_for_sums(1, 1, 0, clear=False))


@gluon.constexpr_function
def products_layout(WARPS):
    """Of each warp's products [WARPS, 16 experts, rows], over a share of the columns."""
    return gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])


@gluon.jit
def operand_places(part, tile, CHUNKS: gl.constexpr, BM: gl.constexpr, mma: gl.constexpr):
    """expert, column of the left operand [warps, 16, 32] and row, column of the right [warps, 32, BM], in a slice's first chunk."""
    W: gl.constexpr = gl.num_warps()
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 8)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 8)
    expert = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, left)))[None, :, None] + tile * 16
    inner = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, left)))[None, None, :] + part * (CHUNKS * W * 32)
    inner += gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, left)))[:, None, None] * 32
    row = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(1, right)))[None, None, :]
    column = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, right)))[None, :, None] + part * (CHUNKS * W * 32)
    column += gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, right)))[:, None, None] * 32
    return expert, inner, row, column


@gluon.jit
def with_deltas(rows, deltas, ADD: gl.constexpr, CHUNKS: gl.constexpr):
    """rows + deltas, rounded, in chunks; rows alone without ADD."""
    sums = ()
    for c in gl.static_range(CHUNKS):
        y = rows[c]
        if ADD:
            y = (y.to(gl.float32) + deltas[c].to(gl.float32)).to(y.dtype)
            # Not to be put behind the wait.
            y = gl.inline_asm_elementwise(KEEP, "=r,r", [y], dtype=gl.bfloat16, is_pure=False, pack=2)
        sums = sums + (y,)  # noqa: RUF005 (Triton knows no unpacking)
    return sums


@gluon.jit
def multiply(
    gates, rows, mailbox, inverses, part, tile,
    ROWS: gl.constexpr, NORM: gl.constexpr, CHUNKS: gl.constexpr, SLICES: gl.constexpr, PADDED: gl.constexpr, BM: gl.constexpr,
    mma: gl.constexpr,
):  # fmt: skip
    """What ``_add_logits`` adds, of its operands in chunks."""
    W: gl.constexpr = gl.num_warps()
    products = mma_v2(gates[0], rows[0], gl.zeros([W, 16, BM], gl.float32, mma))
    for c in gl.static_range(1, CHUNKS):
        products += mma_v2(gates[c], rows[c], gl.zeros([W, 16, BM], gl.float32, mma))
    # All warps' products of a logit in one thread.
    own: gl.constexpr = gl.BlockedLayout([W, 1, 1], [1, 16, 2], [1, 1, W], [1, 2, 0])
    logits = gl.sum(gl.convert_layout(products, own), 0)
    if NORM:
        # Warps met to exchange the products, so all have seen 1 / RMS.
        of_row = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(1, gl.DotOperandLayout(1, mma, 8))))
        gl.store(inverses + of_row, of_row * 0, mask=of_row < ROWS)
    nth = gl.arange(0, 16, gl.SliceLayout(1, gl.SliceLayout(0, own)))[:, None]
    to = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(0, own)))[None, :]
    words = mailbox + ((to * SLICES + part) * PADDED + (tile * 16 + nth))
    gl.atomic_xchg(words, word(logits), mask=(to < ROWS) & (nth < 16), sem="relaxed", scope="gpu")


@gluon.jit
def _add_logits(
    x, delta, norm, gate, mailbox, inverses, part, tile, always,
    ROWS: gl.constexpr, HIDDEN: gl.constexpr, EXPERTS: gl.constexpr, ADD: gl.constexpr, NORM: gl.constexpr, CHUNKS: gl.constexpr,
    SLICES: gl.constexpr, PADDED: gl.constexpr, BM: gl.constexpr,
):  # fmt: skip
    """16 experts' part of a slice in the logits of all rows: mailbox [ROWS, SLICES, PADDED]; 1 / RMS from inverses [BM]."""
    W: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = products_layout(W)
    expert, inner, row, column = operand_places(part, tile, CHUNKS, BM, mma)
    rows, deltas, scales, gates, normed = (), (), (), (), ()
    for c in gl.static_range(CHUNKS):
        at = inner + c * W * 32
        known = (expert < EXPERTS) & (at < HIDDEN)
        gates = gates + (gl.load(gate + (expert * HIDDEN + at), mask=known, other=0.0),)  # noqa: RUF005
    for c in gl.static_range(CHUNKS):
        at = column + c * W * 32
        live = (row < ROWS) & (at < HIDDEN)
        rows = rows + (gl.load(x + (row * HIDDEN + at), mask=live, other=0.0),)  # noqa: RUF005
        deltas = deltas + (gl.load(delta + (row * HIDDEN + at), mask=live, other=0.0) if ADD else 0,)  # noqa: RUF005
        scales = scales + (gl.load(norm + at, mask=at < HIDDEN, other=0.0) if NORM else 0,)  # noqa: RUF005
    # ptxas would put loads behind the sum and the wait.
    gl.thread_barrier()
    sums = with_deltas(rows, deltas, ADD, CHUNKS)
    inverse = 0.0
    if NORM:
        of_row = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(1, gl.DotOperandLayout(1, mma, 8))))
        found = gl.inline_asm_elementwise(
            _WAIT, "=&r,l,r", [inverses + of_row, (of_row < ROWS).to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1
        )
        inverse = found.to(gl.float32, bitcast=True)[None, None, :]
    for c in gl.static_range(CHUNKS):
        z = sums[c]
        if NORM:
            z = (z.to(gl.float32) * inverse * scales[c].to(gl.float32)).to(z.dtype)
        normed = normed + (z,)  # noqa: RUF005
    if NORM:
        multiply(gates, normed, mailbox, inverses, part, tile, ROWS, NORM, CHUNKS, SLICES, PADDED, BM, mma)
    elif always > 0:
        # Always so. ptxas would put products between the loads, to save registers; but nothing in front of a branch.
        multiply(gates, normed, mailbox, inverses, part, tile, ROWS, NORM, CHUNKS, SLICES, PADDED, BM, mma)


@gluon.jit
def _choose(
    logits, told, bias, number, ids, weights, table, order, rounds,
    ROWS: gl.constexpr, EXPERTS: gl.constexpr, PADDED: gl.constexpr, K: gl.constexpr, SCALE: gl.constexpr, UNIT: gl.constexpr,
    LOOK: gl.constexpr, LOOK_OPERANDS: gl.constexpr, LOOK_TYPES: gl.constexpr,
):  # fmt: skip
    """Row ``number``: ids and weights [K], of logits [SLICES, PADDED], and its part of the lists."""
    EACH: gl.constexpr = 256 // (32 * gl.num_warps())
    flat: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [1, gl.num_warps()], [1, 0])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [gl.num_warps(), 1], [1, 0])
    thread = gl.arange(0, 32 * gl.num_warps(), gl.SliceLayout(0, flat))[None, :]
    expert = gl.arange(0, 256, gl.SliceLayout(0, wide))[None, :]
    shifts = eight(gl.load(bias + expert, mask=expert < EXPERTS, other=0.0).to(gl.float32))
    found = gl.inline_asm_elementwise(
        LOOK, LOOK_OPERANDS, [logits + thread * EACH, (thread * EACH < PADDED).to(gl.int32)], dtype=LOOK_TYPES, is_pure=False,
        pack=1,
    )  # fmt: skip
    scores, keys = (), ()
    for j in gl.static_range(EACH):
        scores = scores + (1.0 / (1.0 + gl.exp(-found[j].to(gl.float32, bitcast=True))),)  # noqa: RUF005
    scores = scores[0] if EACH == 1 else gl.reshape(gl.join(scores[0], scores[1]), [1, 256])
    scores = eight(gl.convert_layout(scores, wide))
    lane = gl.arange(0, 32, gl.SliceLayout(0, scores[0].type.layout))[None, :]
    for j in gl.static_range(8):
        keys = keys + (keys_of(scores[j] + shifts[j], lane * 8 + j < EXPERTS),)  # noqa: RUF005
    places = places_of(keys, lane, rounds, K)
    if UNIT:
        tell(places, told, number, ROWS, K)
    # Always so; as in _norm_row, for the others wait for what was told.
    if rounds > 0:
        store_choice(places, scores, lane, ids + number * K, weights + number * K, K, SCALE)
    if UNIT:
        ahead_low, ahead_high = bits_ahead(places, number)
        low, high = hear(told, number, ROWS)
        list_rows(ahead_low, ahead_high, low, high, number, table, order, ROWS, EXPERTS, K)


@gluon.jit
def few_rows_kernel(
    x, delta, norm, gate, bias, layer, rounds, mailbox, total, normed, ids, weights, table, order, values, terms,
    ROWS: gl.constexpr, HIDDEN: gl.constexpr, EXPERTS: gl.constexpr, K: gl.constexpr, SCALE: gl.constexpr, EPS: gl.constexpr,
    ADD: gl.constexpr, NORM: gl.constexpr, UNIT: gl.constexpr, CHUNKS: gl.constexpr, SLICES: gl.constexpr, TILES: gl.constexpr,
    BM: gl.constexpr, BP: gl.constexpr, CHUNK: gl.constexpr, AT_CALL: gl.constexpr, SPLIT: gl.constexpr, LOOK: gl.constexpr,
    LOOK_OPERANDS: gl.constexpr, LOOK_TYPES: gl.constexpr,
):  # fmt: skip
    """Grid (ROWS, where there is something to add or to norm, then TILES * SLICES, then ROWS). mailbox: words of the logits [ROWS,
    SLICES, TILES * 16], of 1 / RMS [TILES * SLICES, BM], of the choices [ROWS, ROWS, 32]."""
    NORMS: gl.constexpr = ROWS if ADD or NORM else 0
    PADDED: gl.constexpr = TILES * 16
    which = (layer >> 5 if AT_CALL else gl.load(layer)).to(gl.int64)
    program = gl.program_id(0)
    inverses = mailbox + ROWS * SLICES * PADDED
    if program < NORMS:
        norm_row(
            x, delta, norm + which * HIDDEN, inverses, total, normed, values, terms, program, rounds,
            HIDDEN, EPS, ADD, NORM, CHUNK, SPLIT, NORM, TILES * SLICES, BP, BM,
        )  # fmt: skip
    elif program < NORMS + TILES * SLICES:
        own = program - NORMS
        _add_logits(
            x, delta, norm + which * HIDDEN, gate + which * EXPERTS * HIDDEN, mailbox, inverses + own * BM, own % SLICES,
            own // SLICES, rounds,
            ROWS, HIDDEN, EXPERTS, ADD, NORM, CHUNKS, SLICES, PADDED, BM,
        )  # fmt: skip
    else:
        number = program - NORMS - TILES * SLICES
        _choose(
            mailbox + number * (SLICES * PADDED), inverses + TILES * SLICES * BM, bias + which * EXPERTS, number,
            ids, weights, table, order, rounds,
            ROWS, EXPERTS, PADDED, K, SCALE, UNIT, LOOK, LOOK_OPERANDS, LOOK_TYPES,
        )  # fmt: skip


def run(
    spec: Spec,
    x: jax.Array,
    gate: jax.Array,
    bias: jax.Array,
    layer: int | jax.Array,
    norm: jax.Array | None,
    delta: jax.Array | None,
    mailbox: jax.Array,
) -> tuple[jax.Array, ...]:
    """(total, normed, ids, weights, lists, terms, mailbox), as ``router.add_norm_route`` describes them."""
    shape, slices, tiles, unit = jax.ShapeDtypeStruct, slices_of(spec), -(-spec.experts // TILE), spec.unit_here
    words, at_call, split = jax.new_ref(mailbox), isinstance(layer, int), spec.split_by(default_arch())
    row, unused, groups = shape((spec.rows, spec.hidden), x.dtype), shape((1,), jnp.int32), spec.hidden // 128
    total, normed, ids, weights, table, order, values, scales = jax_triton.triton_call(
        x, x if delta is None else delta, x if norm is None else norm, gate, bias,
        layer_argument(layer), spec.k, words,
        kernel=few_rows_kernel,
        out_type=(
            row if spec.delta else unused, row if spec.norm else unused,
            shape((spec.rows, spec.k), jnp.int32), shape((spec.rows, spec.k), jnp.float32),
            shape((2, spec.experts), jnp.int32) if unit else unused,
            # Whole lines, as the experts' kernels read them.
            shape((-(-spec.rows * spec.k // 32) * 32,), jnp.int32) if unit else unused,
            shape((groups, 2 * MOST_ROWS, 128), jnp.float8_e4m3fn) if split else unused,
            shape((groups, MOST_ROWS), jnp.float32) if split else unused,
        ),
        grid=((spec.rows if spec.delta or spec.norm else 0) + tiles * slices + spec.rows,), name="router_few", num_warps=WARPS,
        **triton_options(),
        ROWS=spec.rows, HIDDEN=spec.hidden, EXPERTS=spec.experts, K=spec.k, SCALE=spec.scale, EPS=spec.eps, ADD=spec.delta,
        NORM=bool(spec.norm), UNIT=unit, CHUNKS=-(-spec.hidden // (32 * WARPS * slices)), SLICES=slices, TILES=tiles,
        BM=MOST_ROWS, BP=triton.next_power_of_2(tiles * slices), CHUNK=min(spec.hidden & -spec.hidden, AT_ONCE), AT_CALL=at_call,
        SPLIT=split,
        LOOK=wait_for_sums(EACH, slices, tiles * TILE, clear=True), LOOK_OPERANDS=operands(EACH, 1),
        LOOK_TYPES=(gl.int32,) * EACH,
    )  # fmt: skip
    total = total if spec.delta else x
    lists, terms = (table, order) if unit else None, (values, scales) if split else None
    return total, normed if spec.norm else total, ids, weights, lists, terms, jax.freeze(words)
