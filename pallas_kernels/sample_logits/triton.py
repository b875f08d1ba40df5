"""Sampling in Triton; portable from SM80 to SM120. Launches, not bytes, are its time: nothing waits inside a kernel.

A row is cut into slices of 4096 tokens, a program each. Launches: ``peak_kernel`` (largest logit, NaN), then the thresholds,
each digit of a key one launch that adds its slices' histograms up (atomics on integers: any order, the same sums) and the
next launch reads: three digits until top_k's key is known, two more for top_p's, whose first digit is in the first histogram.
``draw_kernel`` scores what is better than the threshold and, apart, its ties; ``finish_kernel`` knows which slice holds the
last tie that is kept and looks at that one again. Rows at temperature 0 leave at once. A program without temperature is the
first launch and the last.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl

from pallas_kernels.lowering import triton_options
from pallas_kernels.sample_logits import search_triton as search
from pallas_kernels.sample_logits.spec import Spec

_BLOCK = 4096
_WARPS = 8
_HISTOGRAMS = 5


@triton.jit
def peak_kernel(
    logits, best, first, nan, histograms,
    VOCAB: tl.constexpr, SLICES: tl.constexpr, BLOCK: tl.constexpr, CLEARED: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """Grid (slices, rows). best, first, nan int32 [rows, slices]; also zeroes the row's CLEARED words of histograms."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = part * BLOCK + tl.arange(0, BLOCK)
    live = token < VOCAB
    x = tl.load(logits + row * VOCAB + token, mask=live, other=-float("inf")).to(tl.float32)
    order = search.order_key(x)
    largest = tl.max(order, 0)
    tl.store(best + row * SLICES + part, largest)
    tl.store(first + row * SLICES + part, tl.min(tl.where(order == largest, token, 0x7FFFFFFF), 0))
    tl.store(nan + row * SLICES + part, tl.max((order == search.NAN).to(tl.int32), 0))
    if CLEARED > 0:
        each: tl.constexpr = (CLEARED + SLICES - 1) // SLICES
        at = tl.arange(0, PADDED)
        inside = (at < each) & (part * each + at < CLEARED)
        tl.store(histograms + row * CLEARED + part * each + at, tl.zeros([PADDED], tl.uint32), mask=inside)


@triton.jit
def digit_kernel(
    logits, temperature, top_k, top_p, best, before, histograms, state,
    STAGE: tl.constexpr, VOCAB: tl.constexpr, SLICES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (slices, rows). Stage 0: the first digit of all keys; 1, 2: of top_k's; 3, 4: of top_p's. state: where the search is.

    before: the state of the stage before.
    """
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    heat, peak = tl.load(temperature + row), search.best_of_row(best, row, SLICES, PADDED)
    if (heat > 0) & (peak > search.EMPTY_BELOW):
        own = histograms + row * 5 * search.HISTOGRAM
        last = own + (STAGE - 1) * search.HISTOGRAM
        _, live, key, _, weight = search.keys(logits, row, part, peak, heat, VOCAB, BLOCK)
        prefix, wanted = 0, tl.full((), 0, tl.int64)
        mass = wanted
        if STAGE == 1:
            k = tl.load(top_k + row)
            wanted = tl.where((k <= 0) | (k > VOCAB), VOCAB, k).to(tl.int64)
            prefix, wanted, mass = search.digit_of(last, wanted, False)
        elif STAGE == 2:
            above, wanted, passed = search.get(before + row * 8)
            digit, wanted, mass = search.digit_of(last, wanted, False)
            prefix, mass = above * 1024 + digit, mass + passed
        elif STAGE == 3:
            above, wanted, passed = search.get(before + row * 8)
            digit, wanted, mass = search.digit_of(last, wanted, False)
            total = passed + mass + wanted * search.weight_of_key(above * 1024 + digit)
            wanted = search.share(total, tl.load(top_p + row))
            prefix, wanted, mass = search.digit_of(own, wanted, True)
        elif STAGE == 4:
            above, wanted, _ = search.get(before + row * 8)
            digit, wanted, mass = search.digit_of(last, wanted, True)
            prefix = above * 1024 + digit
        if part == 0:
            search.put(state + row * 8, prefix, wanted, mass)
        mine = own + STAGE * search.HISTOGRAM
        if STAGE == 0:
            search.count_digits(mine, key, weight, live, 20, 11, prefix)
        elif STAGE % 2 == 1:
            search.count_digits(mine, key, weight, live, 10, 10, prefix)
        else:
            search.count_digits(mine, key, weight, live, 0, 10, prefix)


@triton.jit
def draw_kernel(
    logits, temperature, min_p, words, positions, best, before, histograms, scores, ties, limits,
    VOCAB: tl.constexpr, SLICES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (slices, rows). scores int32 [rows, slices, 4]: the best score of what is better than the threshold and of its ties,
    upper and lower halves; ties int32 [rows, slices]; limits int32 [rows, 2]: threshold and how many of its ties are kept."""
    part, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    heat, peak = tl.load(temperature + row), search.best_of_row(best, row, SLICES, PADDED)
    if (heat > 0) & (peak > search.EMPTY_BELOW):
        above, wanted, _ = search.get(before + row * 8)
        digit, wanted, _ = search.digit_of(histograms + (row * 5 + 4) * search.HISTOGRAM, wanted, True)
        limit = above * 1024 + digit
        unit = tl.maximum(search.weight_of_key(limit), 1)
        if part == 0:
            tl.store(limits + row * 2, limit)
            tl.store(limits + row * 2 + 1, ((wanted + unit - 1) // unit).to(tl.int32))
        token, live, key, q, weight = search.keys(logits, row, part, peak, heat, VOCAB, BLOCK)
        least = tl.math.ceil(tl.minimum(tl.maximum(tl.load(min_p + row), 0.0), 1.0) * 268435456.0).to(tl.uint32)
        likely = live & (weight > 0) & (weight >= least)
        tied = live & (key == limit)
        tl.store(ties + row * SLICES + part, tl.sum(tied.to(tl.int32), 0))
        at = scores + (row * SLICES + part) * 4
        k0, k1 = tl.load(words + row * 2), tl.load(words + row * 2 + 1)
        score = search.score(q, token, likely & (key <= limit), k0, k1, tl.load(positions + row).to(tl.uint32))
        better = tl.max(tl.where(key < limit, score, search.NOTHING), 0)
        equal = tl.max(tl.where(tied, score, search.NOTHING), 0)
        tl.store(at, (better >> 32).to(tl.int32))
        tl.store(at + 1, better.to(tl.int32))
        tl.store(at + 2, (equal >> 32).to(tl.int32))
        tl.store(at + 3, equal.to(tl.int32))


@triton.jit
def finish_kernel(
    logits, temperature, min_p, words, positions, best, first, nan, scores, ties, limits, tokens, flags,
    GREEDY: tl.constexpr, VOCAB: tl.constexpr, SLICES: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows). tokens, flags int32 [rows]."""
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PADDED)
    known = part < SLICES
    orders = tl.load(best + row * SLICES + part, mask=known, other=search.NAN)
    peak = tl.max(orders, 0)
    firsts = tl.load(first + row * SLICES + part, mask=known, other=0x7FFFFFFF)
    chosen = tl.min(tl.where(orders == peak, firsts, 0x7FFFFFFF), 0)
    empty = peak <= search.EMPTY_BELOW
    flag = tl.max(tl.load(nan + row * SLICES + part, mask=known, other=0), 0)
    flag += 2 * (peak == 0x7F800000).to(tl.int32) + 4 * empty.to(tl.int32)
    chosen = tl.where(empty, 0, chosen)
    if not GREEDY:
        heat = tl.load(temperature + row)
        if (heat > 0) & (peak > search.EMPTY_BELOW):
            limit, kept = tl.load(limits + row * 2), tl.load(limits + row * 2 + 1)
            count = tl.load(ties + row * SLICES + part, mask=known, other=0)
            to = tl.cumsum(count, 0)
            at = scores + (row * SLICES + part) * 4
            high = tl.load(at, mask=known, other=-2147483648).to(tl.int64) << 32
            better = tl.max(high | (tl.load(at + 1, mask=known, other=0).to(tl.int64) & 0xFFFFFFFF), 0)
            high = tl.load(at + 2, mask=known, other=-2147483648).to(tl.int64) << 32
            equal = high | (tl.load(at + 3, mask=known, other=0).to(tl.int64) & 0xFFFFFFFF)
            winner = tl.maximum(better, tl.max(tl.where(known & (to <= kept), equal, search.NOTHING), 0))
            # Of the slice in which the last kept tie is, only the first ones count.
            split = tl.sum((known & (to <= kept)).to(tl.int32), 0)
            if split < SLICES:
                earlier = tl.max(tl.where(known & (to <= kept), to, 0), 0)
                token, live, key, q, weight = search.keys(logits, row, split, peak, heat, VOCAB, BLOCK)
                least = tl.math.ceil(tl.minimum(tl.maximum(tl.load(min_p + row), 0.0), 1.0) * 268435456.0).to(tl.uint32)
                tied = live & (key == limit)
                inside = tied & (tl.cumsum(tied.to(tl.int32), 0) <= kept - earlier)
                inside = inside & (weight > 0) & (weight >= least)
                k0, k1 = tl.load(words + row * 2), tl.load(words + row * 2 + 1)
                score = search.score(q, token, inside, k0, k1, tl.load(positions + row).to(tl.uint32))
                winner = tl.maximum(winner, tl.max(score, 0))
            chosen = 0x7FFFFFFF - (winner & 0xFFFFFFFF).to(tl.int32)
    tl.store(tokens + row, chosen)
    tl.store(flags + row, flag)


def _int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def run(
    spec: Spec,
    logits: jax.Array,
    temperature: jax.Array | None,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    key: jax.Array,
    positions: jax.Array,
    after: jax.Array | None = None,
    block: int = _BLOCK,
) -> tuple[jax.Array, jax.Array]:
    rows, slices = spec.rows, -(-spec.vocab // block)
    each = (slices, rows)
    options: dict[str, Any] = {"num_warps": _WARPS, **triton_options()}
    sizes = {"VOCAB": spec.vocab, "SLICES": slices, "BLOCK": block}
    words = 0 if temperature is None else _HISTOGRAMS * search.HISTOGRAM.value
    best, first, nan, zeroed = jax_triton.triton_call(
        logits, kernel=peak_kernel, grid=each, name="sample_peak", **options, **sizes, CLEARED=words,
        out_type=(*[_int32(rows, slices)] * 3, jax.ShapeDtypeStruct((rows, max(words, 1)), jnp.uint32)),
        PADDED=triton.next_power_of_2(max(1, -(-words // slices))),
    )  # fmt: skip
    sizes["PADDED"] = triton.next_power_of_2(slices)
    ends = (_int32(rows), _int32(rows))
    finish = {"kernel": finish_kernel, "grid": (rows,), "name": "sample_finish", "out_type": ends}
    if temperature is None:
        unused = (best,) * 3
        return jax_triton.triton_call(
            logits, *[best] * 4, best, first, nan, *unused, **finish, **options, **sizes, GREEDY=True
        )
    histograms, state = jax.new_ref(zeroed), best
    for stage in range(_HISTOGRAMS):
        (state,) = jax_triton.triton_call(
            logits, temperature, top_k, top_p, best, state, histograms, kernel=digit_kernel, grid=each,
            name=f"sample_digit_{stage}", out_type=(_int32(rows, 8),), **options, **sizes, STAGE=stage,
        )  # fmt: skip
    parts = jax_triton.triton_call(
        logits, temperature, min_p, key, positions, best, state, histograms, kernel=draw_kernel, grid=each,
        name="sample_draw", out_type=(_int32(rows, slices, 4), _int32(rows, slices), _int32(rows, 2)),
        **options, **sizes,
    )  # fmt: skip
    jax.freeze(histograms)
    return jax_triton.triton_call(
        logits, temperature, min_p, key, positions, best, first, nan, *parts, **finish, **options, **sizes, GREEDY=False
    )
