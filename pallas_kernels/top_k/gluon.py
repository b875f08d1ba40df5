"""Selection of the k best positions in Gluon: radix search on 32-bit keys, portable from SM80 to SM120.

A histogram of 11 bits of the keys, its prefix sums and the bin in which the k-th falls fix 11 bits of the k-th key.
Rows of up to 8192: one program a row does it all; short ones are ``gluon_row``'s, which counts otherwise. Long rows, two
launches: ``count_kernel`` writes the prefix sums of each slice's histogram of the top 11 bits; in ``select_kernel`` every
slice finds the row's bin from them and appends what is not worse to a list in order of position, and the slice that
finishes last selects among the list. Where too many scores share the bin for a list, the slices of a row fix the other
21 bits together, waiting for each other twice.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from pallas_kernels import jax_gluon
from pallas_kernels.lowering import default_arch, triton_options
from pallas_kernels.top_k.gluon_bins import BINS, bin_of, clear, count, iota, key_of, limit_of, scan, shared_bins
from pallas_kernels.top_k.gluon_outputs import pages_of, slot_of, take, take_all
from pallas_kernels.top_k.gluon_row import short_row_kernel
from pallas_kernels.top_k.gluon_slices import bin_of_row, count_slice, meet
from pallas_kernels.top_k.plan import GROUPS, Plan, make_plan
from pallas_kernels.top_k.spec import Spec

jax_gluon.install()
_GROUPS = gl.constexpr(GROUPS)


@gluon.jit
def row_kernel(
    scores, lengths, table, positions, slots,
    N: gl.constexpr, K: gl.constexpr, K_PADDED: gl.constexpr, PAGES: gl.constexpr, WIDTH: gl.constexpr,
    BLOCK: gl.constexpr,
):  # fmt: skip
    """Grid (rows,): rows of up to BLOCK scores, kept in registers."""
    row = gl.program_id(0)
    bins = shared_bins()
    at = iota(BLOCK)
    # Not masked by length, which is still on its way; what lies behind it is never live.
    score = gl.load(scores + row.to(gl.int64) * N + at, mask=at < N, other=0.0)
    page = pages_of(0, row, table, BLOCK, PAGES, WIDTH)
    length = gl.minimum(gl.load(lengths + row), N)
    if length <= K:
        take_all(length, row, positions, slots, table, K, K_PADDED, PAGES, WIDTH)
    else:
        live = at < length
        clear(bins)
        key = key_of(score)
        count(bins, key >> 21, live)
        top, want, inside = bin_of(bins, K)
        limit = (top.to(gl.uint32) + 1) << 21
        ties = 0
        if inside != want:
            limit, ties = limit_of(bins, key, live, top.to(gl.uint32), want)
        take(key, live, at, slot_of(at, page), 0, 0, limit, ties, row * K, positions, slots, PAGES)


@gluon.jit
def count_kernel(
    scores, lengths, sums, group_sums, done,
    N: gl.constexpr, K: gl.constexpr, SLICES: gl.constexpr, BLOCKS: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Grid (slices, rows): the top 11 bits. Zeroes done, three counters a row."""
    part, row = gl.program_id(0), gl.program_id(1)
    bins = shared_bins()
    first = part * (BLOCKS * BLOCK)
    source = scores + row.to(gl.int64) * N
    at = first + iota(BLOCK)
    score = gl.load(source + at, mask=at < N, other=0.0)
    length = gl.minimum(gl.load(lengths + row), N)
    if part == 0:
        gl.store(done + row * 3, 0)
        gl.store(done + row * 3 + 1, 0)
        gl.store(done + row * 3 + 2, 0)
    if (length > K) & (first < length):
        count_slice(
            bins, source, score, first, length, 0, sums, group_sums, row * SLICES + part, 21, 11, N, BLOCKS, BLOCK
        )


@gluon.jit
def _select_together(
    bins, source, score, first, length, part, row, table, done, sums, group_sums, more_sums, more_groups, positions, slots,
    N: gl.constexpr, K: gl.constexpr, PAGES: gl.constexpr, WIDTH: gl.constexpr,
    SLICES: gl.constexpr, PADDED: gl.constexpr, BLOCKS: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Fixes 21 more bits of the k-th key with the row's other programs and writes this slice's part of the outputs."""
    span: gl.constexpr = BLOCKS * BLOCK
    slot = row * SLICES + part
    parts = gl.cdiv(length, span)
    digit, _to, _before, less, better = bin_of_row(sums, group_sums, K, length, part, row, SLICES, PADDED, span, True)
    want = K - less
    prefix = digit.to(gl.uint32)
    count_slice(bins, source, score, first, length, prefix, more_sums, more_groups, slot, 10, 11, N, BLOCKS, BLOCK)
    meet(done + row * 3 + 1, parts)
    digit, _to, _before, less, less_before = bin_of_row(
        more_sums, more_groups, want, length, part, row, SLICES, PADDED, span, True
    )
    want -= less
    better += less_before
    prefix = (prefix << 11) | digit.to(gl.uint32)
    more_sums += gl.num_programs(1) * SLICES * BINS
    more_groups += gl.num_programs(1) * SLICES * _GROUPS
    count_slice(bins, source, score, first, length, prefix, more_sums, more_groups, slot, 0, 10, N, BLOCKS, BLOCK)
    meet(done + row * 3 + 2, parts)
    digit, _to, before, less, less_before = bin_of_row(
        more_sums, more_groups, want, length, part, row, SLICES, PADDED, span, True
    )
    ties = want - less
    better += less_before
    tied = before - less_before
    limit = (prefix << 10) | digit.to(gl.uint32)
    at = first + iota(BLOCK)
    for block in range(BLOCKS):
        live = at < length
        key = key_of(score)
        page = pages_of(first + block * BLOCK, row, table, BLOCK, PAGES, WIDTH)
        take(key, live, at, slot_of(at, page), better, tied, limit, ties, row * K, positions, slots, PAGES)
        if BLOCKS > 1:
            better += gl.sum((live & (key < limit)).to(gl.int32), 0)
            tied += gl.sum((live & (key == limit)).to(gl.int32), 0)
            at += BLOCK
            score = gl.load(source + at, mask=(at < N) & (block + 1 < BLOCKS), other=0.0)


@gluon.jit
def _append(
    source, score, page, first, length, limit, to, row, table, scores, positions, slots,
    N: gl.constexpr, BLOCKS: gl.constexpr, BLOCK: gl.constexpr, PAGES: gl.constexpr, WIDTH: gl.constexpr,
):  # fmt: skip
    """Appends a slice's scores below limit, their positions and slots to the row's list, from index to on."""
    at = first + iota(BLOCK)
    for block in range(BLOCKS):
        keep = (at < length) & (key_of(score) < limit)
        ones = keep.to(gl.int32)
        target = to + scan(ones) - ones
        gl.store(scores + target, score, mask=keep)
        gl.store(positions + target, at, mask=keep)
        if PAGES > 0:
            gl.store(slots + target, slot_of(at, page), mask=keep)
        if BLOCKS > 1:
            to += gl.sum(ones, 0)
            at += BLOCK
            score = gl.load(source + at, mask=(at < N) & (block + 1 < BLOCKS), other=0.0)
            page = pages_of(first + (block + 1) * BLOCK, row, table, BLOCK, PAGES, WIDTH)


@gluon.jit
def _select_list(
    bins, scores, list_positions, list_slots, listed, top, better, at, positions, slots,
    K: gl.constexpr, PAGES: gl.constexpr, BLOCK: gl.constexpr,
):  # fmt: skip
    """Selects among a list that is one block, given the k-th key's top 11 bits and how many are better than those."""
    index = iota(BLOCK)
    live = index < listed
    score = gl.load(scores + index, cache_modifier=".cg")
    position = gl.load(list_positions + index, cache_modifier=".cg")
    slot = position
    if PAGES > 0:
        slot = gl.load(list_slots + index, cache_modifier=".cg")
    key = key_of(score)
    limit = (top + 1) << 21
    ties = 0
    if listed != K:
        limit, ties = limit_of(bins, key, live, top, K - better)
    take(key, live, position, slot, 0, 0, limit, ties, at, positions, slots, PAGES)


@gluon.jit
def select_kernel(
    scores, lengths, table, sums, group_sums, done,
    positions, slots, list_scores, list_positions, list_slots, more_sums, more_groups,
    N: gl.constexpr, K: gl.constexpr, K_PADDED: gl.constexpr, PAGES: gl.constexpr, WIDTH: gl.constexpr,
    SLICES: gl.constexpr, PADDED: gl.constexpr, BLOCKS: gl.constexpr, BLOCK: gl.constexpr, LISTED: gl.constexpr,
):  # fmt: skip
    """Grid (slices, rows). LISTED: the longest list of a row."""
    part, row = gl.program_id(0), gl.program_id(1)
    bins = shared_bins()
    first = part * (BLOCKS * BLOCK)
    source = scores + row.to(gl.int64) * N
    at = first + iota(BLOCK)
    score = gl.load(source + at, mask=at < N, other=0.0)
    page = pages_of(first, row, table, BLOCK, PAGES, WIDTH)
    length = gl.minimum(gl.load(lengths + row), N)
    if length <= K:
        if part == 0:
            take_all(length, row, positions, slots, table, K, K_PADDED, PAGES, WIDTH)
    elif first < length:
        top, listed, to, better, _none = bin_of_row(
            sums, group_sums, K, length, part, row, SLICES, PADDED, BLOCKS * BLOCK, False
        )
        top = top.to(gl.uint32)
        if listed > LISTED:
            _select_together(
                bins, source, score, first, length, part, row, table, done, sums, group_sums, more_sums, more_groups,
                positions, slots, N, K, PAGES, WIDTH, SLICES, PADDED, BLOCKS, BLOCK,
            )  # fmt: skip
        else:
            list_scores += row * LISTED
            list_positions += row * LISTED
            list_slots += row * LISTED
            _append(
                source, score, page, first, length, (top + 1) << 21, to, row, table,
                list_scores, list_positions, list_slots, N, BLOCKS, BLOCK, PAGES, WIDTH,
            )  # fmt: skip
            # All stores of this program come before its count, and the last one's loads after it.
            gl.thread_barrier()
            arrived = gl.atomic_add(done + row * 3, 1, sem="acq_rel", scope="gpu") + 1
            if arrived == gl.cdiv(length, BLOCKS * BLOCK):
                gl.thread_barrier()
                if listed <= LISTED // 2:
                    _select_list(
                        bins, list_scores, list_positions, list_slots, listed, top, better, row * K, positions, slots,
                        K, PAGES, LISTED // 2,
                    )  # fmt: skip
                else:
                    _select_list(
                        bins, list_scores, list_positions, list_slots, listed, top, better, row * K, positions, slots,
                        K, PAGES, LISTED,
                    )  # fmt: skip


def _int32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def run(
    spec: Spec, scores: jax.Array, lengths: jax.Array, table: jax.Array | None = None, plan: Plan | None = None
) -> jax.Array | tuple[jax.Array, jax.Array]:
    plan = plan or make_plan(spec, default_arch())
    rows, slices = spec.rows, plan.slices
    sizes = {
        "N": spec.n, "K": spec.k, "K_PADDED": triton.next_power_of_2(spec.k), "PAGES": spec.pages, "WIDTH": spec.width,
    }  # fmt: skip
    options: dict[str, Any] = {"num_warps": plan.warps, **triton_options()}
    outputs = (_int32(rows, spec.k), _int32(rows, spec.k) if spec.pages else _int32(1))
    pages = lengths if table is None else table
    if slices * plan.blocks == 1:
        kernel, cut = row_kernel, {"BLOCK": plan.block}
        if plan.short:
            bins = max(BINS.value, 128 * plan.warps)
            kernel, cut = short_row_kernel, {"EACH": plan.block // (32 * plan.warps), "BINS": bins}
        positions, slots = jax_triton.triton_call(
            scores, lengths, pages, kernel=kernel, out_type=outputs, grid=(rows,), name="top_k_row", **options, **sizes, **cut,
        )  # fmt: skip
        return positions if table is None else (positions, slots)
    cut = {"SLICES": slices, "BLOCKS": plan.blocks, "BLOCK": plan.block}
    sums, group_sums, zeroed = jax_triton.triton_call(
        scores, lengths, kernel=count_kernel, grid=(slices, rows), name="top_k_count", **options, N=spec.n, K=spec.k,
        out_type=(_int32(rows, slices, BINS.value), _int32(rows, slices, GROUPS), _int32(rows, 3)), **cut,
    )  # fmt: skip
    done = jax.new_ref(zeroed)
    positions, slots, *_ = jax_triton.triton_call(
        scores, lengths, pages, sums, group_sums, done, kernel=select_kernel, grid=(slices, rows), name="top_k_select",
        out_type=(
            *outputs, jax.ShapeDtypeStruct((rows, plan.listed), jnp.float32), _int32(rows, plan.listed),
            _int32(rows, plan.listed) if spec.pages else _int32(1),
            _int32(2, rows, slices, BINS.value), _int32(2, rows, slices, GROUPS),
        ),
        **options, **sizes, **cut, PADDED=triton.next_power_of_2(slices), LISTED=plan.listed,
    )  # fmt: skip
    jax.freeze(done)
    return positions if table is None else (positions, slots)
