"""Residual add, RMSNorm and router in one launch, for few rows; Gluon, portable from SM80 to SM120.

A program has two experts and all of the hidden size: what it reads of gate is 24 KB in two contiguous pieces, and while they come
it adds and norms the row, which every program repeats for itself (24 KB from the L2). A row's last program chooses. Logits reach it
in words that are zero until they are written, so it waits for words, without a fence or a counter, and then makes them zeros again.
Every warp of it holds all logits, so that a maximum is one instruction of a warp (redux) and needs no shared memory.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax_triton
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pallas_kernels import jax_gluon
from pallas_kernels.lowering import triton_options
from pallas_kernels.router.spec import Spec

jax_gluon.install()
_EXPERTS = 2  # of a program
_WARPS = 8
_CHUNK = 2048  # most numbers that all threads load at once, 16 bytes each
GONE = gl.constexpr(-(2**31))
# About 0.7 us each. Only choosing programs wait, one a row, and for programs that wait for nobody.
MOST_POLLS = gl.constexpr(1 << 22)
_TRAP = gl.constexpr("{ .reg .pred p; setp.eq.s32 p, $1, 0; @p trap; mov.u32 $0, 0; }")


@gluon.jit
def _add_pairs(a, b, c, d):
    return a + c, b + d


@gluon.jit
def word(number):
    """A number's bits, never zero: +0 becomes -0, which makes no difference to a sum of others or to a sigmoid."""
    bits = number.to(gl.int32, bitcast=True)
    return gl.where(bits == 0, GONE, bits)


@gluon.jit
def keys_of(number, known):
    """Integers in the order of the numbers, NaN first; the least where nothing is known."""
    # A float's bits order as an integer's do, once those of negative ones are inverted below the sign.
    bits = number.to(gl.int32, bitcast=True)
    return gl.where(known, gl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), GONE)


@gluon.jit
def trap_unless(there):
    gl.inline_asm_elementwise(_TRAP, "=r,r", [there], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _look(words, expert, EXPERTS: gl.constexpr):
    """The words and whether all of them are written; every warp looks for itself."""
    found = gl.load(words + expert, mask=expert < EXPERTS, other=GONE, volatile=True)
    return found, gl.min((found != 0).to(gl.int32), 0)


@gluon.jit
def _choose(
    logit, shift, expert, ids, weights,
    EXPERTS: gl.constexpr, K: gl.constexpr, SCALE: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """ids, weights [K] of one row: the largest of score + shift, equal ones by the lower expert, NaN first."""
    score = 1.0 / (1.0 + gl.exp(-logit))
    keys = keys_of(score + shift, expert < EXPERTS)
    place = gl.arange(0, BK, gl.BlockedLayout([1], [32], [gl.num_warps()], [0]))
    chosen, own = gl.zeros_like(place), gl.zeros_like(place)
    for i in gl.static_range(K):
        best = gl.max(keys, 0)
        one = gl.min(gl.where(keys == best, expert, EXPERTS), 0)
        mine = expert == one
        # Scores are not negative: of their bits, those of one expert are the maximum beside zeros.
        own = gl.where(place == i, gl.max(gl.where(mine, score.to(gl.int32, bitcast=True), 0), 0), own)
        chosen = gl.where(place == i, one, chosen)
        keys = gl.where(mine, GONE, keys)
    score = own.to(gl.float32, bitcast=True)
    gl.store(ids + place, chosen, mask=place < K)
    gl.store(weights + place, score / (gl.sum(score, 0) + 1e-20) * SCALE, mask=place < K)


@gluon.jit
def norm_route_kernel(
    x, delta, norm, gate, bias, layer, mailbox, total, normed, ids, weights,
    HIDDEN: gl.constexpr, EXPERTS: gl.constexpr, K: gl.constexpr, SCALE: gl.constexpr, EPS: gl.constexpr, ADD: gl.constexpr,
    NORM: gl.constexpr, CHUNK: gl.constexpr, CHUNKS: gl.constexpr, PROGRAMS: gl.constexpr, BE: gl.constexpr, BK: gl.constexpr,
):  # fmt: skip
    """Grid (PROGRAMS, rows). total, normed [rows, HIDDEN]; mailbox: words of the logits [rows, EXPERTS]; ids, weights [rows, K]."""
    program, row = gl.program_id(0), gl.program_id(1).to(gl.int64)
    which = gl.load(layer).to(gl.int64)
    words: gl.constexpr = gl.BlockedLayout([8], [32], [gl.num_warps()], [0])
    lane = gl.arange(0, CHUNK, words)
    expert = gl.arange(0, BE, gl.BlockedLayout([BE // 32], [32], [gl.num_warps()], [0]))
    first = program * 2
    second = gl.minimum(first + 1, EXPERTS - 1)
    rows, deltas, ones, others, scales = (), (), (), (), ()
    for c in gl.static_range(CHUNKS):
        at = which * EXPERTS * HIDDEN + c * CHUNK + lane
        ones = ones + (gl.load(gate + first * HIDDEN + at, eviction_policy="evict_first"),)  # noqa: RUF005
        others = others + (gl.load(gate + second * HIDDEN + at, eviction_policy="evict_first"),)  # noqa: RUF005
        scales = scales + (gl.load(norm + which * HIDDEN + c * CHUNK + lane) if NORM else 0,)  # noqa: RUF005
    shift = gl.load(bias + which * EXPERTS + expert, mask=expert < EXPERTS, other=0.0).to(gl.float32)
    # ptxas would put the loads of gate behind the sum of squares, which needs only the row; it moves none across a barrier.
    gl.thread_barrier()
    for c in gl.static_range(CHUNKS):
        at = row * HIDDEN + c * CHUNK + lane
        rows = rows + (gl.load(x + at),)  # noqa: RUF005 (Triton knows no unpacking)
        deltas = deltas + (gl.load(delta + at) if ADD else 0,)  # noqa: RUF005
    sums, normeds = (), ()
    squares = gl.zeros([CHUNK], gl.float32, words)
    for c in gl.static_range(CHUNKS):
        y = rows[c]
        if ADD:
            y = (y.to(gl.float32) + deltas[c].to(gl.float32)).to(y.dtype)
        sums = sums + (y,)  # noqa: RUF005
        squares += y.to(gl.float32) * y.to(gl.float32)
    inverse = gl.rsqrt(gl.sum(squares, 0) / HIDDEN + EPS) if NORM else 0
    one, other = gl.zeros_like(squares), gl.zeros_like(squares)
    for c in gl.static_range(CHUNKS):
        z = sums[c]
        if NORM:
            z = (z.to(gl.float32) * inverse * scales[c].to(gl.float32)).to(z.dtype)
        normeds = normeds + (z,)  # noqa: RUF005
        one += z.to(gl.float32) * ones[c].to(gl.float32)
        other += z.to(gl.float32) * others[c].to(gl.float32)
    one_logit, other_logit = gl.reduce((one, other), 0, _add_pairs)
    words = mailbox + row * EXPERTS
    gl.atomic_xchg(words + first, word(one_logit), sem="relaxed", scope="gpu")
    gl.atomic_xchg(words + second, word(other_logit), mask=first + 1 < EXPERTS, sem="relaxed", scope="gpu")
    for c in gl.static_range(CHUNKS):
        if program == c % PROGRAMS:
            at = row * HIDDEN + c * CHUNK + lane
            if NORM:
                gl.store(normed + at, normeds[c])
            if ADD:
                gl.store(total + at, sums[c])
    if program == PROGRAMS - 1:
        found, there = _look(words, expert, EXPERTS)
        polls = 0
        while (there == 0) & (polls < MOST_POLLS):
            found, there = _look(words, expert, EXPERTS)
            polls += 1
        trap_unless(there)
        # All warps have seen all words, and nobody writes another.
        gl.thread_barrier()
        gl.store(words + expert, gl.zeros_like(expert), mask=expert < EXPERTS)
        logit = found.to(gl.float32, bitcast=True)
        _choose(logit, shift, expert, ids + row * K, weights + row * K, EXPERTS, K, SCALE, BK)


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
    """(total, normed, ids, weights, None, mailbox), as ``router.add_norm_route`` describes them."""
    # The largest power of two that divides the hidden size.
    chunk, shape = min(spec.hidden & -spec.hidden, _CHUNK), jax.ShapeDtypeStruct
    programs = -(-spec.experts // _EXPERTS)
    words = jax.new_ref(mailbox)
    row, unused = shape((spec.rows, spec.hidden), x.dtype), shape((1,), x.dtype)
    total, normed, ids, weights = jax_triton.triton_call(
        x, x if delta is None else delta, x if norm is None else norm, gate, bias, layer.reshape(1), words,
        kernel=norm_route_kernel,
        out_type=(
            row if spec.delta else unused, row if spec.norm else unused,
            shape((spec.rows, spec.k), jnp.int32), shape((spec.rows, spec.k), jnp.float32),
        ),
        grid=(programs, spec.rows), name="router_norm", num_warps=_WARPS, **triton_options(),
        HIDDEN=spec.hidden, EXPERTS=spec.experts, K=spec.k, SCALE=spec.scale, EPS=spec.eps, ADD=spec.delta, NORM=bool(spec.norm),
        CHUNK=chunk, CHUNKS=spec.hidden // chunk, PROGRAMS=programs, BE=max(32, triton.next_power_of_2(spec.experts)),
        BK=triton.next_power_of_2(spec.k),
    )  # fmt: skip
    total = total if spec.delta else x
    return total, normed if spec.norm else total, ids, weights, None, jax.freeze(words)
