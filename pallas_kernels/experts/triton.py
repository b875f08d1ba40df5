"""Experts in Triton; portable from SM80 to SM120.

Launches: ``plan`` sorts the pairs (row, choice) by expert (not needed for one row), ``gate_up`` and ``down`` give a program one
tile of an expert's matrix and up to BM of its rows, ``combine`` adds a row's experts in a fixed order. The shared expert's tiles
are the first programs of the two. Weights are the left operand, whose many rows fill the matrix units; rows of x are the few
columns of the right one. Everything between the launches is indexed by pair, so only ``plan`` knows the order.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import jax_triton
import triton
import triton.language as tl

from pallas_kernels.blocks import BlockScaled
from pallas_kernels.e4m3_triton import from_e4m3
from pallas_kernels.experts.plan import Plan, plan_for
from pallas_kernels.experts.spec import Spec
from pallas_kernels.lowering import default_arch, triton_options

# Pairs that one program of ``plan`` places, and that it compares at a time.
_PLACED = 64
_FAR = tl.constexpr(2147483647)


@triton.jit
def _expert_of(ids, pair, PAIRS: tl.constexpr, EXPERTS: tl.constexpr, PADDING: tl.constexpr):
    """Experts of pairs: those that are no expert's sort behind all experts, pairs that do not exist are PADDING."""
    expert = tl.load(ids + pair, mask=pair < PAIRS, other=0)
    expert = tl.where((expert >= 0) & (expert < EXPERTS), expert, EXPERTS)
    return tl.where(pair < PAIRS, expert, PADDING)


@triton.jit
def plan_kernel(
    ids, table, order,
    PAIRS: tl.constexpr, EXPERTS: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Program 0: table [2, experts], the pairs, and the items, up to and with each expert. The others: order [pairs], pairs
    sorted by expert, then by number."""
    if tl.program_id(0) == 0:
        expert = tl.arange(0, BE)
        hits = tl.zeros([BC, BE], tl.int32)
        for start in range(0, PAIRS, BC):
            which = _expert_of(ids, start + tl.arange(0, BC), PAIRS, EXPERTS, -1)
            hits += (which[:, None] == expert[None, :]).to(tl.int32)
        count = tl.where(expert < EXPERTS, tl.sum(hits, 0), 0)
        tl.store(table + expert, tl.cumsum(count, 0), mask=expert < EXPERTS)
        tl.store(table + EXPERTS + expert, tl.cumsum((count + (BM - 1)) // BM, 0), mask=expert < EXPERTS)
    else:
        pair = (tl.program_id(0) - 1) * BP + tl.arange(0, BP)
        own = _expert_of(ids, pair, PAIRS, EXPERTS, -1)
        before = tl.zeros([BP, BP], tl.int32)
        for start in range(0, PAIRS, BP):
            other = start + tl.arange(0, BP)
            which = _expert_of(ids, other, PAIRS, EXPERTS, _FAR)
            same = (which[None, :] == own[:, None]) & (other[None, :] < pair[:, None])
            before += ((which[None, :] < own[:, None]) | same).to(tl.int32)
        tl.store(order + tl.sum(before, 1), pair, mask=pair < PAIRS)


@triton.jit
def _locate(
    ids, table, order, item,
    PAIRS: tl.constexpr, EXPERTS: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, DIRECT: tl.constexpr,
):  # fmt: skip
    """(expert, pairs [BM], live [BM]) of an item; expert is EXPERTS where the item is empty."""
    lane = tl.arange(0, BM)
    if DIRECT:
        expert = tl.load(ids + item)
        expert = tl.where((expert >= 0) & (expert < EXPERTS), expert, EXPERTS)
        pair, live = item + lane, lane < 1
    else:
        every = tl.arange(0, BE)
        last = tl.load(table + EXPERTS + every, mask=every < EXPERTS, other=_FAR)
        gone = last <= item
        expert = tl.sum(gone.to(tl.int32), 0)
        known = expert < EXPERTS
        start = tl.load(table + expert - 1, mask=known & (expert > 0), other=0)
        end = tl.load(table + expert, mask=known, other=0)
        place = start + (item - tl.max(tl.where(gone, last, 0), 0)) * BM + lane
        live = place < end
        pair = tl.load(order + place, mask=live, other=0)
    return expert, pair, live


@triton.jit
def _gate_up_tile(
    x, w, scale, out, tile, row, slot, live,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """HALF rows of gate and as many of up, one matrix operand, times up to BM rows of x -> out [slot, WIDTH]."""
    inner, n = tl.arange(0, 128), tl.arange(0, 2 * HALF)
    is_up = n >= HALF
    at_w = w + (tl.where(is_up, WIDTH - HALF, 0) + tile * HALF + n)[:, None] * HIDDEN + inner[None, :]
    at_x = x + row.to(tl.int64)[:, None] * HIDDEN + inner[None, :]
    BLOCKS: tl.constexpr = HIDDEN // 128
    at_gate = scale + tile * HALF // 128 * BLOCKS
    at_up = at_gate + WIDTH // 128 * BLOCKS
    gate_scale, up_scale = tl.load(at_gate), tl.load(at_up)
    total = tl.zeros([2 * HALF, BM], tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        a = tl.load(at_w + block * 128)
        b = tl.load(at_x + block * 128, mask=live[:, None], other=0.0)
        # The next block's scales are asked for a step ahead: a scalar load is not part of the pipeline.
        following = tl.minimum(block + 1, BLOCKS - 1)
        next_gate, next_up = tl.load(at_gate + following), tl.load(at_up + following)
        total += tl.dot(from_e4m3(a).to(tl.bfloat16), tl.trans(b)) * tl.where(is_up, up_scale, gate_scale)[:, None]
        gate_scale, up_scale = next_gate, next_up
    gate, up = tl.split(tl.permute(tl.reshape(total, [2, HALF, BM]), (1, 2, 0)))
    product = gate * (1.0 / (1.0 + tl.exp(-gate))) * up
    at_out = out + slot.to(tl.int64)[:, None] * WIDTH + (tile * HALF + tl.arange(0, HALF))[None, :]
    tl.store(at_out, tl.trans(product).to(tl.bfloat16), mask=live[:, None])


@triton.jit
def gate_up_kernel(
    x, gate_up, scale, shared, shared_scale, layer, ids, table, order, out, shared_out,
    ROWS: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
    SHARED: tl.constexpr, ITEMS: tl.constexpr, HALF: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of the shared expert by row blocks, then tiles of width by items (fastest). out bfloat16 [pairs, WIDTH],
    shared_out bfloat16 [rows, SHARED]."""
    program = tl.program_id(0)
    which = tl.load(layer).to(tl.int64)
    ROW_BLOCKS: tl.constexpr = (ROWS + BM - 1) // BM
    FIRST: tl.constexpr = SHARED // HALF * ROW_BLOCKS
    if program < FIRST:
        row = program % ROW_BLOCKS * BM + tl.arange(0, BM)
        w = shared + which * (2 * SHARED * HIDDEN)
        at_scale = shared_scale + which * (2 * SHARED // 128 * (HIDDEN // 128))
        tile = program // ROW_BLOCKS
        _gate_up_tile(x, w, at_scale, shared_out, tile, row, row, row < ROWS, HIDDEN, SHARED, HALF, BM, STAGES)
    else:
        program -= FIRST
        expert, pair, live = _locate(ids, table, order, program % ITEMS, ROWS * K, EXPERTS, BM, BE, ROWS == 1)
        if expert < EXPERTS:
            matrix = which * EXPERTS + expert
            w, at_scale = gate_up + matrix * (2 * WIDTH * HIDDEN), scale + matrix * (2 * WIDTH // 128 * (HIDDEN // 128))
            _gate_up_tile(x, w, at_scale, out, program // ITEMS, pair // K, pair, live, HIDDEN, WIDTH, HALF, BM, STAGES)


@triton.jit
def _down_tile(
    x, w, scale, out, tile, slot, live,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BN rows of down times up to BM rows of x [slot, WIDTH] -> out float32 [slot, HIDDEN]."""
    inner, n = tl.arange(0, 128), tile * BN + tl.arange(0, BN)
    at_w = w + n[:, None] * WIDTH + inner[None, :]
    at_x = x + slot.to(tl.int64)[:, None] * WIDTH + inner[None, :]
    BLOCKS: tl.constexpr = WIDTH // 128
    at_scale = scale + tile * BN // 128 * BLOCKS
    block_scale = tl.load(at_scale)
    total = tl.zeros([BN, BM], tl.float32)
    for block in tl.range(0, BLOCKS, num_stages=STAGES):
        a = tl.load(at_w + block * 128)
        b = tl.load(at_x + block * 128, mask=live[:, None], other=0.0)
        following = tl.load(at_scale + tl.minimum(block + 1, BLOCKS - 1))
        total += tl.dot(from_e4m3(a).to(tl.bfloat16), tl.trans(b)) * block_scale
        block_scale = following
    tl.store(out + slot.to(tl.int64)[:, None] * HIDDEN + n[None, :], tl.trans(total), mask=live[:, None])


@triton.jit
def down_kernel(
    x, shared_x, down, scale, shared, shared_scale, layer, ids, table, order, out, shared_out,
    ROWS: tl.constexpr, K: tl.constexpr, EXPERTS: tl.constexpr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr,
    SHARED: tl.constexpr, ITEMS: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid as ``gate_up_kernel``, tiles of hidden. out float32 [pairs, HIDDEN], shared_out float32 [rows, HIDDEN]."""
    program = tl.program_id(0)
    which = tl.load(layer).to(tl.int64)
    ROW_BLOCKS: tl.constexpr = (ROWS + BM - 1) // BM
    FIRST: tl.constexpr = HIDDEN // BN * ROW_BLOCKS
    if program < FIRST:
        row = program % ROW_BLOCKS * BM + tl.arange(0, BM)
        w = shared + which * (HIDDEN * SHARED)
        at_scale = shared_scale + which * (HIDDEN // 128 * (SHARED // 128))
        _down_tile(
            shared_x, w, at_scale, shared_out, program // ROW_BLOCKS, row, row < ROWS, HIDDEN, SHARED, BN, BM, STAGES
        )
    else:
        program -= FIRST
        expert, pair, live = _locate(ids, table, order, program % ITEMS, ROWS * K, EXPERTS, BM, BE, ROWS == 1)
        if expert < EXPERTS:
            matrix = which * EXPERTS + expert
            w, at_scale = down + matrix * (HIDDEN * WIDTH), scale + matrix * (HIDDEN // 128 * (WIDTH // 128))
            _down_tile(x, w, at_scale, out, program // ITEMS, pair, live, HIDDEN, WIDTH, BN, BM, STAGES)


@triton.jit
def combine_kernel(
    ids, weights, parts, shared, out,
    K: tl.constexpr, EXPERTS: tl.constexpr, HIDDEN: tl.constexpr, BK: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Grid (hidden / BC, rows): weighted sum of a row's parts, plus the shared expert's."""
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BC + tl.arange(0, BC)
    choice = tl.arange(0, BK)
    pair = row * K + choice
    expert = tl.load(ids + pair, mask=choice < K, other=-1)
    placed = (expert >= 0) & (expert < EXPERTS)
    weight = tl.load(weights + pair, mask=placed, other=0.0)
    # Parts of pairs without an expert were never written: they are not read either.
    part = tl.load(parts + pair[:, None] * HIDDEN + column[None, :], mask=placed[:, None], other=0.0)
    routed = tl.sum(part * weight[:, None], 0)
    tl.store(out + row * HIDDEN + column, (routed + tl.load(shared + row * HIDDEN + column)).to(tl.bfloat16))


def sorted_pairs(spec: Spec, block_rows: int, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(table, order) of ``plan_kernel``; dummies for one row, whose pairs are its items."""
    if spec.rows == 1:
        return ids, ids
    experts = triton.next_power_of_2(spec.experts)
    return jax_triton.triton_call(
        ids, kernel=plan_kernel, grid=(1 + -(-spec.pairs // _PLACED),), name="experts_plan", num_warps=4,
        out_type=(jax.ShapeDtypeStruct((2, spec.experts), jnp.int32), jax.ShapeDtypeStruct((spec.pairs,), jnp.int32)),
        **triton_options(), PAIRS=spec.pairs, EXPERTS=spec.experts, BM=block_rows, BE=experts,
        BC=max(1, 8192 // experts), BP=_PLACED,
    )  # fmt: skip


def _operands(w: BlockScaled, native: bool) -> tuple[jax.Array, jax.Array]:
    """(data, scale); as bytes where Triton has no e4m3."""
    return (w.data if native else jax.lax.bitcast_convert_type(w.data, jnp.uint8)), w.scale


def run(
    spec: Spec,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up: BlockScaled,
    down: BlockScaled,
    shared_gate_up: BlockScaled,
    shared_down: BlockScaled,
    layer: int | jax.Array,
    after: Any = None,
    lists: Any = None,
    mailbox: Any = None,
    epoch: Any = None,
    quantized: Any = None,
    plan: Plan | None = None,
) -> Any:
    """As ``experts.mix`` describes it; nothing reads ``after``, nor what follows it, which is of the kernels for Hopper."""
    plan = plan or plan_for(spec, default_arch())
    table, order = sorted_pairs(spec, plan.block_rows, ids)
    at, blocks, size = jnp.asarray(layer, jnp.int32).reshape(1), -(-spec.rows // plan.block_rows), jax.ShapeDtypeStruct
    common = {
        **triton_options(), "num_warps": plan.warps, "num_stages": plan.stages, "STAGES": plan.stages,
        "ROWS": spec.rows, "K": spec.k, "EXPERTS": spec.experts, "HIDDEN": spec.hidden, "WIDTH": spec.width,
        "SHARED": spec.shared_width, "ITEMS": plan.items, "BM": plan.block_rows, "BE": triton.next_power_of_2(spec.experts),
    }  # fmt: skip
    product, shared_product = jax_triton.triton_call(
        x, *_operands(gate_up, plan.native), *_operands(shared_gate_up, plan.native), at, ids, table, order,
        kernel=gate_up_kernel, name="experts_gate_up", **common, HALF=plan.half,
        grid=(blocks * spec.shared_width // plan.half + plan.items * spec.width // plan.half,),
        out_type=(size((spec.pairs, spec.width), x.dtype), size((spec.rows, spec.shared_width), x.dtype)),
    )  # fmt: skip
    parts, shared = jax_triton.triton_call(
        product, shared_product, *_operands(down, plan.native), *_operands(shared_down, plan.native), at, ids, table, order,
        kernel=down_kernel, name="experts_down", **common, BN=plan.block_down,
        grid=((blocks + plan.items) * spec.hidden // plan.block_down,),
        out_type=(size((spec.pairs, spec.hidden), jnp.float32), size((spec.rows, spec.hidden), jnp.float32)),
    )  # fmt: skip
    y = jax_triton.triton_call(
        ids, weights, parts, shared, kernel=combine_kernel, name="experts_combine", num_warps=4, **triton_options(),
        grid=(spec.hidden // 128, spec.rows), out_type=size((spec.rows, spec.hidden), x.dtype),
        K=spec.k, EXPERTS=spec.experts, HIDDEN=spec.hidden, BK=triton.next_power_of_2(spec.k), BC=128,
    )  # fmt: skip
    return y if mailbox is None else (y, mailbox)
