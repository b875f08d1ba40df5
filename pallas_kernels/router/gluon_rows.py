"""Residual add, RMSNorm, router and the experts' row lists of 3 to 8 rows in one launch; Gluon, from SM80 to SM120.

A program has 8 experts and a slice of the hidden size, of all rows: gate is read once in all, and its matrix product needs no
shared memory, because both operands are loaded the way ``mma`` wants them (16 bytes of neighbouring k a thread: the order of k is
another than memory's, the same in both; half of its 16 experts stay empty). Programs meet twice, each time over words that are zero
until they are written, so that nobody needs a fence or a counter: the slices of a tile exchange their sums of squares, and the last
program waits for all logits, chooses (a row a warp), and makes the words zeros again. So programs wait for those before them in the
grid or beside them in their tile. With 16 experts and twice as many slices the last program reads 64 KB of logits, not 32.
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
from pallas_kernels.lowering import triton_options
from pallas_kernels.router.gluon_norm import GONE, MOST_POLLS, keys_of, trap_unless, word
from pallas_kernels.router.spec import MOST_ROWS, TILE, WARPS, Spec, slices_of

jax_gluon.install()
_FAR = gl.constexpr(65535)


@gluon.jit
def _look_at_sums(at, live):
    """Every warp looks for itself, each lane at words of its own."""
    words = gl.load(at, mask=live, other=GONE, volatile=True)
    return words, gl.min(gl.min((words != 0).to(gl.int32), 1), 0)


@gluon.jit
def _inverse(squares, at_own, at_all, live, of_rows: gl.constexpr, HIDDEN: gl.constexpr, EPS: gl.constexpr):
    """1 / RMS of each row, from this program's sums of squares and those of the other slices of its tile."""
    gl.atomic_xchg(at_own, word(squares), sem="relaxed", scope="gpu")
    words, there = _look_at_sums(at_all, live)
    polls = 0
    while (there == 0) & (polls < MOST_POLLS):
        words, there = _look_at_sums(at_all, live)
        polls += 1
    trap_unless(there)
    whole = gl.sum(words.to(gl.float32, bitcast=True), 1)
    return gl.convert_layout(gl.rsqrt(whole / HIDDEN + EPS), of_rows)


@gluon.jit
def _look_at_logits(at, live, EXPERTS: gl.constexpr, SLICES: gl.constexpr):
    """Sums over the slices, in order, and whether all of them are there."""
    logits = gl.load(at, mask=live, other=GONE, volatile=True)
    good = (logits != 0).to(gl.int32)
    logits = logits.to(gl.float32, bitcast=True)
    for part in gl.static_range(1, SLICES):
        words = gl.load(at + part * EXPERTS, mask=live, other=GONE, volatile=True)
        good = good & (words != 0).to(gl.int32)
        logits += words.to(gl.float32, bitcast=True)
    return logits, gl.min(gl.min(good, 1), 0)


@gluon.jit
def _choose(logits, shift, expert, row, EXPERTS: gl.constexpr, K: gl.constexpr, SCALE: gl.constexpr, BK: gl.constexpr):
    """ids and weights [rows, BK]: the largest of score + shift, equal ones by the lower expert, NaN first."""
    score = 1.0 / (1.0 + gl.exp(-logits))
    keys = keys_of(score + shift[None, :], expert[None, :] < EXPERTS)
    places: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [gl.num_warps(), 1], [1, 0])
    of_row: gl.constexpr = gl.SliceLayout(1, places)
    place = gl.arange(0, BK, gl.SliceLayout(0, places))[None, :]
    chosen = place + gl.convert_layout(row, of_row)[:, None] * 0
    own = chosen * 0
    for i in gl.static_range(K):
        best = gl.max(keys, 1)
        one = gl.min(gl.where(keys == best[:, None], expert[None, :], EXPERTS), 1)
        mine = expert[None, :] == one[:, None]
        # Scores are not negative: of their bits, those of one expert are the maximum beside zeros.
        weight = gl.max(gl.where(mine, score.to(gl.int32, bitcast=True), 0), 1)
        own = gl.where(place == i, gl.convert_layout(weight, of_row)[:, None], own)
        chosen = gl.where(place == i, gl.convert_layout(one, of_row)[:, None], chosen)
        keys = gl.where(mine, GONE, keys)
    scores = gl.where(place < K, own.to(gl.float32, bitcast=True), 0.0)
    return chosen, scores / (gl.sum(scores, 1) + 1e-20)[:, None] * SCALE, place, gl.convert_layout(row, of_row)[:, None]


@gluon.jit
def _list_rows(
    chosen, table, order,
    ROWS: gl.constexpr, EXPERTS: gl.constexpr, K: gl.constexpr, UNIT: gl.constexpr, RB: gl.constexpr, BE: gl.constexpr,
    BK: gl.constexpr,
):  # fmt: skip
    """What ``experts``' plan makes of the choices [RB, BK]: pairs sorted by expert, pairs and items up to and with each."""
    PAIRS: gl.constexpr = RB * BK
    square: gl.constexpr = gl.BlockedLayout([1, PAIRS // 4], [8, 4], [gl.num_warps(), 1], [1, 0])
    down: gl.constexpr = gl.SliceLayout(1, square)
    across: gl.constexpr = gl.SliceLayout(0, square)
    flat, other = gl.arange(0, PAIRS, down), gl.arange(0, PAIRS, across)
    found = gl.reshape(chosen, [PAIRS])
    live = (flat % BK < K) & (flat // BK < ROWS)
    own = gl.where(live, gl.convert_layout(found, down), _FAR)
    which = gl.where((other % BK < K) & (other // BK < ROWS), gl.convert_layout(found, across), _FAR)
    same = (which[None, :] == own[:, None]) & (other[None, :] < flat[:, None])
    # Earlier pairs of the same expert count 1, those of lower experts 65536.
    counted = gl.sum(same.to(gl.int32) + (which[None, :] < own[:, None]).to(gl.int32) * 65536, 1)
    rank, before = counted & 65535, (counted >> 16) + (counted & 65535)
    gl.store(order + before, flat // BK * K + flat % BK, mask=live)
    tall: gl.constexpr = gl.BlockedLayout([1, PAIRS], [32, 1], [gl.num_warps(), 1], [1, 0])
    expert = gl.arange(0, BE, gl.SliceLayout(1, tall))
    code = gl.convert_layout(own * 2 + (rank % UNIT == 0).to(gl.int32), gl.SliceLayout(0, tall))[None, :]
    up_to = gl.sum(gl.where((code >> 1) <= expert[:, None], 1 + (code & 1) * 65536, 0), 1)
    gl.store(table + expert, up_to & 65535, mask=expert < EXPERTS)
    gl.store(table + EXPERTS + expert, up_to >> 16, mask=expert < EXPERTS)


@gluon.jit
def rows_kernel(
    x, delta, norm, gate, bias, layer, mailbox, total, normed, ids, weights, table, order,
    ROWS: gl.constexpr, HIDDEN: gl.constexpr, EXPERTS: gl.constexpr, K: gl.constexpr, SCALE: gl.constexpr, EPS: gl.constexpr,
    ADD: gl.constexpr, NORM: gl.constexpr, UNIT: gl.constexpr, CHUNKS: gl.constexpr, SLICES: gl.constexpr, TILES: gl.constexpr,
    TILE: gl.constexpr, BM: gl.constexpr, SUMS: gl.constexpr, BE: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """Grid (TILES * SLICES). mailbox: words of the logits [ROWS, SLICES, EXPERTS], then of the sums [TILES, BM, SLICES]."""
    W: gl.constexpr = gl.num_warps()
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 8)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 8)
    part, tile = gl.program_id(0) % SLICES, gl.program_id(0) // SLICES
    which = gl.load(layer).to(gl.int64)
    sums = mailbox + ROWS * SLICES * EXPERTS
    row = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(1, right)))[None, None, :]
    warp = gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, right)))[:, None, None]
    column = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, right)))[None, :, None] + warp * 32
    column += part * (CHUNKS * W * 32)
    at, live = column + row * HIDDEN, (column >= 0) & (row < ROWS)
    rows, deltas, scales, gates = (), (), (), ()
    for c in gl.static_range(CHUNKS):
        rows = rows + (gl.load(x + at + c * W * 32, mask=live, other=0.0),)  # noqa: RUF005 (Triton knows no unpacking)
        deltas = deltas + (gl.load(delta + at + c * W * 32, mask=live, other=0.0) if ADD else 0,)  # noqa: RUF005
    among = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(2, left)))[None, :, None]
    expert = tile * TILE + among
    inner = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, left)))[None, None, :] + part * (CHUNKS * W * 32)
    inner += gl.arange(0, W, gl.SliceLayout(1, gl.SliceLayout(2, left)))[:, None, None] * 32
    at_gate = gate + which * EXPERTS * HIDDEN + (expert * HIDDEN + inner)
    known = (expert < EXPERTS) & (among < TILE) & (inner >= 0)
    for c in gl.static_range(CHUNKS):
        gates = gates + (gl.load(at_gate + c * W * 32, mask=known, other=0.0),)  # noqa: RUF005
        scales = scales + (gl.load(norm + which * HIDDEN + column + c * W * 32) if NORM else 0,)  # noqa: RUF005
    # ptxas would put loads behind the sum of squares; it moves none across a barrier.
    gl.thread_barrier()
    ready = ()
    squares = gl.zeros([W, 32, BM], gl.float32, right)
    for c in gl.static_range(CHUNKS):
        y = rows[c]
        if ADD:
            y = (y.to(gl.float32) + deltas[c].to(gl.float32)).to(y.dtype)
            gl.store(total + at + c * W * 32, y, mask=live & (row % TILES == tile))
        squares += y.to(gl.float32) * y.to(gl.float32)
        ready = ready + (y,)  # noqa: RUF005
    inverse = 0.0
    if NORM:
        # At least four words a row, so that no two lanes have the same: copies of a word that is read again and again may differ.
        words: gl.constexpr = gl.BlockedLayout([1, (SLICES + 3) // 4], [8, 4], [1, W], [1, 0])
        of_rows: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, right))
        own = sums + (tile * (BM * SLICES) + gl.arange(0, BM, of_rows) * SLICES + part)
        slices = gl.arange(0, (SLICES + 3) // 4 * 4, gl.SliceLayout(0, words))[None, :]
        at_all = gl.arange(0, BM, gl.SliceLayout(1, words))[:, None] * SLICES + slices
        squared = gl.sum(gl.sum(squares, 1), 0)
        all_sums = sums + (tile * (BM * SLICES) + at_all)
        inverse = _inverse(squared, own, all_sums, (slices < SLICES) & (at_all >= 0), of_rows, HIDDEN, EPS)[
            None, None, :
        ]
    products = gl.zeros([W, 16, BM], gl.float32, mma)
    for c in gl.static_range(CHUNKS):
        z = ready[c]
        if NORM:
            z = (z.to(gl.float32) * inverse * scales[c].to(gl.float32)).to(z.dtype)
            gl.store(normed + at + c * W * 32, z, mask=live & (row % TILES == tile))
        products = mma_v2(gates[c], z, products)
    logits = gl.sum(products, 0)
    to = gl.arange(0, BM, gl.SliceLayout(0, gl.SliceLayout(0, mma)))[None, :]
    nth = gl.arange(0, 16, gl.SliceLayout(1, gl.SliceLayout(0, mma)))[:, None]
    of = tile * TILE + nth
    gl.atomic_xchg(
        mailbox + ((to * SLICES + part) * EXPERTS + of), word(logits), mask=(to < ROWS) & (nth < TILE) & (of < EXPERTS),
        sem="relaxed", scope="gpu",
    )  # fmt: skip
    if gl.program_id(0) == TILES * SLICES - 1:
        wide: gl.constexpr = gl.BlockedLayout([1, BE // 32], [1, 32], [W, 1], [1, 0])
        one = gl.arange(0, W, gl.SliceLayout(1, wide))
        any_expert = gl.arange(0, BE, gl.SliceLayout(0, wide))
        shift = gl.load(bias + which * EXPERTS + any_expert, mask=any_expert < EXPERTS, other=0.0).to(gl.float32)
        at_words = mailbox + (one[:, None] * (SLICES * EXPERTS) + any_expert[None, :])
        there_at = (one[:, None] < ROWS) & (any_expert[None, :] < EXPERTS)
        found, there = _look_at_logits(at_words, there_at, EXPERTS, SLICES)
        polls = 0
        while (there == 0) & (polls < MOST_POLLS):
            found, there = _look_at_logits(at_words, there_at, EXPERTS, SLICES)
            polls += 1
        trap_unless(there)
        # Every program has written its last word and read its last sum.
        for s in gl.static_range(SLICES):
            gl.store(at_words + s * EXPERTS, gl.zeros_like(any_expert)[None, :], mask=there_at)
        if NORM:
            every = gl.arange(0, SUMS, gl.BlockedLayout([4], [32], [W], [0]))
            gl.store(sums + every, gl.zeros_like(every), mask=every < TILES * BM * SLICES)
        chosen, shares, place, of_row = _choose(found, shift, any_expert, one, EXPERTS, K, SCALE, BK)
        picked = (place < K) & (of_row < ROWS)
        gl.store(ids + (of_row * K + place), chosen, mask=picked)
        gl.store(weights + (of_row * K + place), shares, mask=picked)
        if UNIT:
            _list_rows(chosen, table, order, ROWS, EXPERTS, K, UNIT, W, BE, BK)


def run(
    spec: Spec,
    x: jax.Array,
    gate: jax.Array,
    bias: jax.Array,
    layer: jax.Array,
    norm: jax.Array | None,
    delta: jax.Array | None,
    mailbox: jax.Array,
) -> tuple[jax.Array, ...]:
    """(total, normed, ids, weights, lists, mailbox), as ``router.add_norm_route`` describes them."""
    shape, slices, tiles, unit = jax.ShapeDtypeStruct, slices_of(spec), -(-spec.experts // TILE), spec.unit_here
    words = jax.new_ref(mailbox)
    row, unused = shape((spec.rows, spec.hidden), x.dtype), shape((1,), jnp.int32)
    total, normed, ids, weights, table, order = jax_triton.triton_call(
        x, x if delta is None else delta, x if norm is None else norm, gate, bias, layer.reshape(1), words,
        kernel=rows_kernel,
        out_type=(
            row if spec.delta else unused, row if spec.norm else unused,
            shape((spec.rows, spec.k), jnp.int32), shape((spec.rows, spec.k), jnp.float32),
            shape((2, spec.experts), jnp.int32) if unit else unused, shape((spec.rows * spec.k,), jnp.int32) if unit else unused,
        ),
        grid=(tiles * slices,), name="router_rows", num_warps=WARPS, **triton_options(),
        ROWS=spec.rows, HIDDEN=spec.hidden, EXPERTS=spec.experts, K=spec.k, SCALE=spec.scale, EPS=spec.eps, ADD=spec.delta,
        NORM=bool(spec.norm), UNIT=unit, CHUNKS=spec.hidden // (32 * WARPS * slices), SLICES=slices, TILES=tiles, TILE=TILE,
        BM=MOST_ROWS, SUMS=triton.next_power_of_2(tiles * MOST_ROWS * slices),
        BE=max(32, triton.next_power_of_2(spec.experts)), BK=triton.next_power_of_2(spec.k),
    )  # fmt: skip
    total = total if spec.delta else x
    return total, normed if spec.norm else total, ids, weights, (table, order) if unit else None, jax.freeze(words)
