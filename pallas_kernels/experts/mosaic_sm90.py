"""Experts of 1 to 64 rows on Hopper, in Pallas Mosaic GPU: the launches.

One row: gate_up and down, which adds the experts. More: the plan (Triton's, if the router made none), gate_up, down with its parts
in memory, both in one launch up to eight rows of narrow experts, and their sum, which is left to the launch that adds it to the
residual stream (``norm_quant``), or is XLA's. Above eight rows the shared expert is two launches of ``fp8_linear``, which reads its
weights once for all rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import fp8_linear
from pallas_kernels.blocks import BLOCK, E4M3, BlockScaled
from pallas_kernels.experts import mosaic_both_sm90, mosaic_down_sm90, mosaic_gate_up_sm90
from pallas_kernels.experts.mosaic_both_plan import Both, both_of
from pallas_kernels.experts.mosaic_one_sm90 import kernel_of
from pallas_kernels.experts.mosaic_plan import LINE, SMS, TILE, UNIT, OneRow, Rows, one_row, several_rows
from pallas_kernels.experts.mosaic_rows_sm90 import Worker
from pallas_kernels.experts.spec import Spec, mailbox_words
from pallas_kernels.layer_index import layer_slice, scale_slice
from pallas_kernels.lowering import default_arch
from pallas_kernels.parts import Parts, combined

# gate_up, down and those of the shared expert.
type Stacks = tuple[BlockScaled, BlockScaled, BlockScaled, BlockScaled]


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
    lists: tuple[jax.Array, jax.Array] | None = None,
    mailbox: jax.Array | None = None,
    epoch: jax.Array | None = None,
    quantized: tuple[jax.Array, jax.Array] | None = None,
    plan: Any = None,
) -> Any:
    """As ``experts.mix`` describes it; nothing reads ``after``. plan: instead of what is chosen for the spec."""
    alone = mailbox is None
    plan = plan or one_row(spec) or _joined(spec) or several_rows(spec)
    assert plan is not None, spec
    stacks = (gate_up, down, shared_gate_up, shared_down)
    if isinstance(plan, OneRow):
        y = _one_row(spec, plan, x, ids, weights, stacks, layer)
    elif isinstance(plan, Both):
        y, mailbox = _one_launch(spec, plan, x, ids, weights, stacks, layer, lists, mailbox, epoch, quantized)
    else:
        y = _two_launches(spec, plan, x, ids, weights, stacks, layer, lists)
    return y if alone else (y, mailbox)


def _one_row(
    spec: Spec,
    plan: OneRow,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    stacks: Stacks,
    layer: int | jax.Array,
) -> jax.Array:
    """gate_up, and down, which adds the experts. Layers that are known and rows that come quantized gained nothing here."""
    at, chosen, shares = _index(layer), ids.reshape(-1), weights.reshape(-1)
    heights = (spec.width, spec.hidden, spec.shared_width, spec.hidden)
    gate_up, down, shared_gate_up, shared_down = (_operands(w, n) for w, n in zip(stacks, heights, strict=True))
    (h,) = mosaic_gate_up_sm90.build(plan)(at, chosen, x.reshape(-1, BLOCK), *gate_up, *shared_gate_up)
    (y,) = mosaic_down_sm90.build(plan)(at, chosen, shares, h.reshape(-1, BLOCK), *down, *shared_down)
    return y.reshape(x.shape)


def _one_launch(
    spec: Spec,
    plan: Both,
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    stacks: Stacks,
    layer: int | jax.Array,
    lists: tuple[jax.Array, jax.Array] | None,
    mailbox: jax.Array | None,
    epoch: jax.Array | None,
    quantized: tuple[jax.Array, jax.Array] | None,
) -> tuple[jax.Array | Parts, jax.Array]:
    """The sum, or what it is taken of, and the mailbox."""
    tables = (_lines(array) for array in lists or sorted_pairs(spec, UNIT, ids))
    words = mailbox_words(spec.rows, spec.k, spec.width, spec.shared_width)
    box = jnp.zeros((words,), jnp.int32) if mailbox is None else mailbox
    number = jnp.ones((1,), jnp.int32) if epoch is None else jnp.asarray(epoch, jnp.int32).reshape(1)
    operands, skips = _layer_of(spec, stacks, layer)
    places = (None if isinstance(layer, int) else _index(layer), number, *tables)
    quantized = quantized if plan.terms == 2 else None
    parts, box = mosaic_both_sm90.run(plan, places, x, operands, box, quantized=quantized, skips=skips)
    y = Parts(parts, ids, weights, spec.experts)
    return y if spec.apart else y.summed(x.dtype), box


def _two_launches(
    spec: Spec,
    plan: tuple[Rows, Rows],
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    stacks: Stacks,
    layer: int | jax.Array,
    lists: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    """gate_up, down with its parts in memory, and their sum, which is XLA's."""
    gate_up, down, shared_gate_up, shared_down = stacks
    up = (*_operands(gate_up, spec.width), *_operands(shared_gate_up, spec.shared_width))
    out = (*_operands(down, spec.hidden), *_operands(shared_down, spec.hidden))
    places = (_index(layer), *(_lines(array) for array in lists or sorted_pairs(spec, UNIT, ids)))
    blocks = x.reshape(spec.rows, -1, BLOCK)
    h, shared_h = build_rows(plan[0])(*places, blocks, blocks, *up)
    inner = (h.reshape(spec.pairs, -1, BLOCK), shared_h.reshape(spec.rows, -1, BLOCK))
    parts, shared = build_rows(plan[1])(*places, *inner, *out)
    if not plan[0].folded:
        h = fp8_linear.swiglu(x, shared_gate_up, (layer,), arithmetic=spec.arithmetic)
        shared = fp8_linear.linear(h, shared_down, (layer,), arithmetic=spec.arithmetic, dtype=jnp.float32)
    return combined(parts, shared, ids, weights, spec.experts).astype(x.dtype)


def _layer_of(
    spec: Spec, stacks: Stacks, layer: int | jax.Array
) -> tuple[tuple[jax.Array, ...], tuple[int, int, int, int]]:
    """(matrices and scales of each stack, scales in front of each): of a layer that is known, else of all, behind nothing."""
    heights = (spec.width, spec.hidden, spec.shared_width, spec.hidden)
    cut = [
        layer_operands(w, layer, rows) if isinstance(layer, int) else (_operands(w, rows), 0)
        for w, rows in zip(stacks, heights, strict=True)
    ]
    a, b, c, d = (skip for _, skip in cut)
    return tuple(array for pair, _ in cut for array in pair), (a, b, c, d)


def layer_operands(w: BlockScaled, layer: int, rows: int) -> tuple[tuple[jax.Array, jax.Array], int]:
    """((matrices [.., rows, k] of a layer, its scales in one row), scales in front of them): pointers into the stacks."""
    flat, size = w.scale.reshape(-1), math.prod(w.scale.shape[1:])
    scale, skip = scale_slice(flat, size, layer, LINE)
    return (layer_slice(w.data, layer).reshape(-1, rows, w.shape[-1]), _copied(scale)), skip


def _joined(spec: Spec) -> Both | None:
    """The plan of one launch, whose blocks of threads wait for each other: there is one an SM. W8A8 was not measured."""
    arch = default_arch()
    workers = SMS if arch is None else min(SMS, arch.num_sms)
    return both_of(spec, workers=workers) if spec.arithmetic == "w8a16" else None


def sorted_pairs(spec: Spec, block_rows: int, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The Triton plan: (pairs and items up to and with each expert [2, experts], pairs sorted by expert)."""
    from pallas_kernels.experts import triton

    return triton.sorted_pairs(spec, block_rows, ids)


def _index(layer: int | jax.Array) -> jax.Array:
    return jnp.asarray(layer, jnp.int32).reshape(1)


def _lines(table: jax.Array) -> jax.Array:
    flat = table.reshape(-1)
    return jnp.pad(flat, (0, -flat.size % LINE)).reshape(-1, LINE)


def _operands(w: BlockScaled, rows: int) -> tuple[jax.Array, jax.Array]:
    """(matrices of a stack, all scales in one row)."""
    return w.data.reshape(-1, rows, w.shape[-1]), _copied(w.scale.reshape(-1))


def _copied(scales: jax.Array) -> jax.Array:
    """As many scales at least as a copy takes."""
    return jnp.pad(scales, (0, LINE - scales.size)) if scales.size < LINE else scales


@functools.lru_cache(maxsize=64)
def build_rows(plan: Rows, interpret: Any = None) -> Callable[..., list[jax.Array]]:
    """call(layer [1], table, order, rows [.., blocks, 128], shared rows [rows, blocks, 128], data [stack, n, k], its scales
    in one row, the shared two) -> [out [pairs, n], shared out [rows, shared n]]: bfloat16 of gate_up, float32 of down.

    table, order: of the Triton plan, in lines of 32. rows: x for gate_up, the product by pair for down.
    """
    tiled = (plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(128))
    scratch = {
        "ring": plgpu.SMEM((plan.groups, plan.stages, plan.mats, TILE, plan.step * BLOCK), E4M3, transforms=tiled),
        "x8": plgpu.SMEM((plan.most_blocks, UNIT * plan.terms, BLOCK), E4M3, transforms=tiled),
        "staging": plgpu.SMEM((2 * plan.groups, UNIT, plan.piece, BLOCK), jnp.bfloat16),
        "scales": plgpu.SMEM((plan.groups, plan.stages, plan.mats, LINE), jnp.float32),
        "factors": plgpu.SMEM((plan.most_blocks, UNIT), jnp.float32),
        "partial": plgpu.SMEM((plan.groups, TILE, UNIT), jnp.float32),
        "ends": plgpu.SMEM((plan.table_lines, LINE), jnp.int32),
        "pairs": plgpu.SMEM((plan.order_lines, LINE), jnp.int32),
        "here": plgpu.SMEM((plan.groups, 3 * plan.items_here), jnp.int32),
        "full": plgpu.Barrier(num_arrivals=2 * plan.mats, num_barriers=plan.groups * plan.stages),
        "x_full": plgpu.Barrier(num_arrivals=UNIT, num_barriers=2 * plan.groups),
        "tables_full": plgpu.Barrier(num_arrivals=2),
        "turn": plgpu.Barrier(num_arrivals=plan.groups),
    }

    def experts_rows(*refs: Any) -> None:
        inputs = 11
        Worker(plan, refs[:inputs], dict(zip(scratch, refs[inputs:], strict=True))).compute()

    out = jnp.bfloat16 if plan.mats == 2 else jnp.float32
    shapes = [jax.ShapeDtypeStruct((plan.pairs, plan.n), out), jax.ShapeDtypeStruct((plan.rows, plan.shared_n), out)]
    return kernel_of(experts_rows, shapes, plan.workers, plan.groups, scratch, interpret)
