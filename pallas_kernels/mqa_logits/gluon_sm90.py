"""MQA logits for Hopper in Gluon: pages of 64 keys are the rows of e4m3 wgmma, queries times heads its columns.

A block of threads is one warpgroup; several share an SM, so that one multiplies while another one weights and sums. Pages travel
through a ring in shared memory (16-byte asynchronous copies, several pages ahead; the page ids one page further). The columns of
a product are ordered so that the four lanes which hold a row of an accumulator hold a query each: the sum over its heads then
stays inside a thread. With fewer than four queries the lanes share one and add across.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from pallas_kernels import jax_gluon
from pallas_kernels.lowering import default_arch, triton_options
from pallas_kernels.mqa_logits.plan import Plan, make_plan
from pallas_kernels.mqa_logits.spec import Spec

jax_gluon.install()
_NAN = gl.constexpr(tl.PropagateNan.ALL)
_PAGE_BYTES = gl.constexpr(64 * 132)
_SMEM_E4M3 = gl.constexpr(gl.NVMMASharedLayout(128, 8, 2))
_SMEM_LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
_COPY = gl.constexpr(gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0]))
_COPY_LINE = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))


@gluon.constexpr_function
def _accumulator(columns):
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 32])


@gluon.constexpr_function
def _vector(size):
    """A vector that every warp holds whole, so that its sums stay within a warp."""
    return gl.BlockedLayout([max(size // 32, 1)], [32], [4], [0])


@gluon.jit
def _sum_heads(x, HEADS: gl.constexpr, LANES: gl.constexpr):
    """[64, HEADS * LANES] in the order of ``_column`` -> [64, LANES]."""
    x = x.reshape([64, HEADS * LANES // 8, LANES, 8 // LANES])
    return gl.sum(gl.sum(x, 1), 2)


@gluon.jit
def _column(n, LANES: gl.constexpr):
    """(query of the tile, head) of column n: eight neighbours belong to all LANES queries."""
    EACH: gl.constexpr = 8 // LANES
    return (n % 8) // EACH, (n // 8) * EACH + n % EACH


@gluon.jit
def _copy_page(values, scales, cache, base, page_id, PAGES: gl.constexpr):
    at = base + gl.minimum(gl.maximum(page_id, 0), PAGES - 1).to(gl.int64) * _PAGE_BYTES
    source = cache.to(gl.pointer_type(gl.float8e4nv)) + at
    row = gl.arange(0, 64, gl.SliceLayout(1, _COPY))
    column = gl.arange(0, 128, gl.SliceLayout(0, _COPY))
    async_copy.async_copy_global_to_shared(values, source + (row[:, None] * 128 + column[None, :]))
    line = (cache + (at + 64 * 128)).to(gl.pointer_type(gl.float32))
    async_copy.async_copy_global_to_shared(scales, line + gl.arange(0, 64, _COPY_LINE))


@gluon.jit
def _copy_queries(queries, q, row, count, tile, HEADS: gl.constexpr, LANES: gl.constexpr):
    """One tile's columns; queries past the group repeat its last one, and nothing of them is stored."""
    column = gl.arange(0, HEADS * LANES, gl.SliceLayout(1, _COPY))
    query, head = _column(column, LANES)
    query = gl.minimum(query + tile * LANES, count - 1)
    at = (row + query) * (HEADS * 128) + head * 128
    source = q.to(gl.pointer_type(gl.float8e4nv)) + at.to(gl.int64)[:, None]
    async_copy.async_copy_global_to_shared(queries, source + gl.arange(0, 128, gl.SliceLayout(0, _COPY))[None, :])


@gluon.jit
def _score(out, acc, weight, scales, page, begin, length, SPAN: gl.constexpr, HEADS: gl.constexpr, LANES: gl.constexpr):
    """Weights, sums and stores one accumulator [64, HEADS * LANES]. out: at the first query of the tile."""
    acc = gl.maximum(acc, 0.0, propagate_nan=_NAN) * weight[None, :]
    score = _sum_heads(acc, HEADS, LANES)
    rows: gl.constexpr = gl.SliceLayout(1, score.type.layout)
    score = score * scales.load(rows)[:, None]
    position = page * 64 + gl.arange(0, 64, rows)
    query = gl.arange(0, LANES, gl.SliceLayout(0, score.type.layout))
    live = (position[:, None] >= begin[None, :]) & (position[:, None] < length[None, :])
    gl.store(out + (query.to(gl.int64) * SPAN)[None, :] + position[:, None], score, mask=live)


@gluon.jit
def _limits(lengths, row, count, tile, like, SPAN: gl.constexpr, LANES: gl.constexpr):
    """Lengths of a tile's queries, 0 past the group."""
    query = tile * LANES + gl.arange(0, LANES, gl.SliceLayout(0, like.type.layout))
    return gl.minimum(gl.load(lengths + row + query, mask=query < count, other=0), SPAN)


@gluon.jit
def _weights(weights, row, count, tile, layout: gl.constexpr, HEADS: gl.constexpr, LANES: gl.constexpr):
    query, head = _column(gl.arange(0, HEADS * LANES, layout), LANES)
    query = gl.minimum(query + tile * LANES, count - 1)
    return gl.load(weights + (row + query) * HEADS + head)


@gluon.jit
def _segment(
    q, weights, cache, base, table, lengths, starts, out, row, count, first, end, queries, values, scales,
    HEADS: gl.constexpr, LANES: gl.constexpr, TILES: gl.constexpr, SPAN: gl.constexpr,
    PAGES: gl.constexpr, STARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Pages first .. end of one group: ``count`` queries from ``row`` on, which share a table."""
    gl.thread_barrier()
    for tile in gl.static_range(TILES):
        _copy_queries(queries.index(tile), q, row, count, tile, HEADS, LANES)
    ids = ()
    for stage in gl.static_range(STAGES):
        ids = ids + (gl.load(table + gl.minimum(first + stage, end - 1)),)  # noqa: RUF005
    for stage in gl.static_range(STAGES - 1):
        if first + stage < end:
            _copy_page(values.index(stage), scales.index(stage), cache, base, ids[stage], PAGES)
        async_copy.commit_group()
    following = ids[STAGES - 1]

    layout: gl.constexpr = _accumulator(HEADS * LANES)
    zero = gl.full([64, HEADS * LANES], 0.0, gl.float32, layout)
    like = _sum_heads(zero, HEADS, LANES)
    weight, length, begin = (), (), ()
    for tile in gl.static_range(TILES):
        weight = weight + (_weights(weights, row, count, tile, gl.SliceLayout(0, layout), HEADS, LANES),)  # noqa: RUF005
        length = length + (_limits(lengths, row, count, tile, like, SPAN, LANES),)  # noqa: RUF005
        begin = begin + (_limits(starts, row, count, tile, like, SPAN, LANES) if STARTS else length[tile] * 0,)  # noqa: RUF005
    out += row.to(gl.int64) * SPAN
    slot = 0
    for page in range(first, end):
        async_copy.wait_group(STAGES - 2)
        hopper.fence_async_shared()
        gl.thread_barrier()
        # The slot of the page before: every warp is through with it.
        ahead = page + STAGES - 1
        free = gl.where(slot == 0, STAGES - 1, slot - 1)
        if ahead < end:
            _copy_page(values.index(free), scales.index(free), cache, base, following, PAGES)
        async_copy.commit_group()
        following = gl.load(table + gl.minimum(ahead + 1, end - 1))
        for tile in gl.static_range(TILES):
            columns = queries.index(tile).permute((1, 0))
            acc = hopper.warpgroup_mma(values.index(slot), columns, zero, use_acc=False, is_async=True)
            acc = hopper.warpgroup_mma_wait(0, deps=[acc])
            to = out + tile * LANES * SPAN
            _score(to, acc, weight[tile], scales.index(slot), page, begin[tile], length[tile], SPAN, HEADS, LANES)
        slot = gl.where(slot == STAGES - 1, 0, slot + 1)
    async_copy.wait_group(0)


@gluon.jit
def _page_range(lengths, starts, row, count, ROWS: gl.constexpr, SPAN: gl.constexpr, STARTS: gl.constexpr):
    """(first, end) of the pages that ``count`` queries from row on see together; empty ones see none."""
    longest = gl.load(lengths + row)
    lowest = gl.load(starts + row) if STARTS else 0
    for i in gl.static_range(1, ROWS):
        at = row + gl.minimum(i, count - 1)
        longest = gl.maximum(longest, gl.load(lengths + at))
        if STARTS:
            lowest = gl.minimum(lowest, gl.load(starts + at))
    longest = gl.minimum(gl.maximum(longest, 0), SPAN)
    return gl.maximum(lowest, 0) // 64, (longest + 63) // 64


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def decode_kernel(
    q, weights, cache, layer, table, lengths, starts, out,
    BATCH: gl.constexpr, BATCH_PADDED: gl.constexpr, TABLE: gl.constexpr,
    ROWS: gl.constexpr, HEADS: gl.constexpr, LANES: gl.constexpr, TILES: gl.constexpr, SPAN: gl.constexpr,
    PAGES: gl.constexpr, STARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid (programs,): each takes an equal share of all pages of all sequences, whatever their lengths."""
    queries = gl.allocate_shared_memory(gl.float8e4nv, [TILES, HEADS * LANES, 128], _SMEM_E4M3)
    values = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 64, 128], _SMEM_E4M3)
    scales = gl.allocate_shared_memory(gl.float32, [STAGES, 64], _SMEM_LINE)
    base = gl.load(layer).to(gl.int64) * (PAGES * _PAGE_BYTES)
    program, programs = gl.program_id(0).to(gl.int64), gl.num_programs(0)
    if BATCH == 1:
        first, end = _page_range(lengths, starts, 0, ROWS, ROWS, SPAN, STARTS)
        total = gl.maximum(end - first, 0)
        low = (total * program // programs).to(gl.int32)
        high = (total * (program + 1) // programs).to(gl.int32)
        if low < high:
            _segment(
                q, weights, cache, base, table, lengths, starts, out, gl.program_id(0) * 0, ROWS, first + low, first + high,
                queries, values, scales, HEADS, LANES, TILES, SPAN, PAGES, STARTS, STAGES,
            )  # fmt: skip
    else:
        sequence = gl.arange(0, BATCH_PADDED, _vector(BATCH_PADDED))
        firsts, ends = _page_range(lengths, starts, gl.minimum(sequence, BATCH - 1) * ROWS, ROWS, ROWS, SPAN, STARTS)
        counts = gl.where(sequence < BATCH, gl.maximum(ends - firsts, 0), 0)
        sums = gl.associative_scan(counts, 0, _add)
        total = gl.sum(counts, 0)
        low = (total * program // programs).to(gl.int32)
        high = (total * (program + 1) // programs).to(gl.int32)
        while low < high:
            before = sums <= low
            index = gl.sum(before.to(gl.int32), 0)
            skipped = gl.max(gl.where(before, sums, 0), 0)
            stop = gl.minimum(high, gl.min(gl.where(before, 0x7FFFFFFF, sums), 0))
            first, end = _page_range(lengths, starts, index * ROWS, ROWS, ROWS, SPAN, STARTS)
            _segment(
                q, weights, cache, base, table + index.to(gl.int64) * TABLE, lengths, starts, out, index * ROWS, ROWS,
                first + low - skipped, first + stop - skipped,
                queries, values, scales, HEADS, LANES, TILES, SPAN, PAGES, STARTS, STAGES,
            )  # fmt: skip
            low = stop


@gluon.jit
def prefill_kernel(
    q, weights, cache, layer, table, lengths, starts, out,
    WIDTH: gl.constexpr, CHUNK: gl.constexpr, TABLE: gl.constexpr,
    ROWS: gl.constexpr, HEADS: gl.constexpr, LANES: gl.constexpr, TILES: gl.constexpr, SPAN: gl.constexpr,
    PAGES: gl.constexpr, STARTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Grid (chunks of pages, groups of ROWS queries, sequences); WIDTH queries a sequence."""
    queries = gl.allocate_shared_memory(gl.float8e4nv, [TILES, HEADS * LANES, 128], _SMEM_E4M3)
    values = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, 64, 128], _SMEM_E4M3)
    scales = gl.allocate_shared_memory(gl.float32, [STAGES, 64], _SMEM_LINE)
    base = gl.load(layer).to(gl.int64) * (PAGES * _PAGE_BYTES)
    sequence = gl.program_id(2)
    row = sequence * WIDTH + gl.program_id(1) * ROWS
    count = gl.minimum(ROWS, WIDTH - gl.program_id(1) * ROWS)
    first, last = _page_range(lengths, starts, row, count, ROWS, SPAN, STARTS)
    low = gl.maximum(first, gl.program_id(0) * CHUNK)
    high = gl.minimum(last, (gl.program_id(0) + 1) * CHUNK)
    if low < high:
        _segment(
            q, weights, cache, base, table + sequence.to(gl.int64) * TABLE, lengths, starts, out, row, count, low, high,
            queries, values, scales, HEADS, LANES, TILES, SPAN, PAGES, STARTS, STAGES,
        )  # fmt: skip


def run(
    spec: Spec, q: jax.Array, weights: jax.Array, cache: jax.Array, layer: jax.Array, table: jax.Array, lengths: jax.Array,
    starts: jax.Array | None, plan: Plan | None = None,
) -> jax.Array:  # fmt: skip
    plan = plan or make_plan(spec, default_arch())
    constants: dict[str, Any] = {
        "ROWS": plan.rows, "HEADS": spec.heads, "LANES": plan.lanes, "TILES": plan.tiles, "SPAN": spec.span,
        "PAGES": spec.pages, "STARTS": starts is not None, "STAGES": plan.stages, "TABLE": spec.table,
    }  # fmt: skip
    if plan.chunk:
        kernel, grid = prefill_kernel, (-(-spec.table // plan.chunk), -(-spec.width // plan.rows), spec.rows)
        constants |= {"WIDTH": spec.width, "CHUNK": plan.chunk}
    else:
        kernel, grid = decode_kernel, (plan.programs,)
        constants |= {"BATCH": spec.rows, "BATCH_PADDED": triton.next_power_of_2(spec.rows)}
    return jax_triton.triton_call(
        jax.lax.bitcast_convert_type(q, jnp.uint8), weights, cache, layer.reshape(1), table, lengths,
        lengths if starts is None else starts,
        kernel=kernel, out_type=jax.ShapeDtypeStruct((spec.rows, spec.width, spec.span), jnp.float32), grid=grid,
        name="mqa_logits_sm90", num_warps=4, **triton_options(), **constants,
    )  # fmt: skip
