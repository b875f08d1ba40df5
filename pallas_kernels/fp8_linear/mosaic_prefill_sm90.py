"""FP8 block-scaled linear layers for more than 64 rows on Hopper, in Pallas Mosaic GPU.

x becomes e4m3 by groups of 128 in a launch of its own (``prefill_split``): one term for W8A8, two for W8A16, x/s = hi + lo/16. Then
persistent blocks of threads walk tiles of [rows, outputs]: one warpgroup copies by TMA, two or three multiply, each its own piece.
The rows of x are the 64-row operand of e4m3 x e4m3 wgmma, so that a thread holds two rows of a product and needs two factors
(scale of the row's group * scale of the weight's block) to promote it; every product of 128 starts afresh and is promoted to
float32, because FP8 wgmma keeps some 14 bits. While one warpgroup promotes, the others have the tensor cores.

What lies beyond the last row or output is zeros to TMA loads and dropped by TMA stores.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import BLOCK, E4M3, BlockScaled
from pallas_kernels.fp8_linear import prefill_split
from pallas_kernels.fp8_linear.norm import flat_layer
from pallas_kernels.fp8_linear.prefill_plan import Plan, plan_for
from pallas_kernels.fp8_linear.spec import Spec
from pallas_kernels.layer_index import layer_slice, scale_slice

_ACC = plgpu.Layout.WGMMA


def run(
    spec: Spec, x: jax.Array, weights: tuple[BlockScaled, ...], index: tuple[Any, ...], after: Any = None
) -> tuple[jax.Array, ...]:
    """Outputs [..., n] of every weight, as ``fp8_linear`` describes them. ``after``: an array that must be ready before."""
    flat = x.reshape(spec.rows, spec.k)
    if after is not None:
        flat, _ = lax.optimization_barrier((flat, after))
    terms = 2 if spec.arithmetic == "w8a16" else 1
    plans = [plan_for(spec.rows, spec.k, n, terms) for n in spec.ns]
    padded_rows = max(plan.padded_rows for plan in plans)
    values, scales = prefill_split.build(spec.rows, padded_rows, spec.k, terms)(flat)
    layer = flat_layer(weights[0].data.shape[: len(index)], index)
    out = jnp.dtype(spec.out_dtype)
    if spec.form == "swiglu":
        gate, up = (
            product(plans[0], jnp.dtype(jnp.float32), 2 * layer + m, values, scales, weights[0]) for m in range(2)
        )
        outs = [(jax.nn.silu(gate) * up).astype(out)]
    else:
        outs = [product(plan, out, layer, values, scales, w) for plan, w in zip(plans, weights, strict=True)]
    return tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in outs)


def product(
    plan: Plan,
    out: jnp.dtype,
    layer: int | jax.Array,
    values: jax.Array,
    scales: jax.Array,
    w: BlockScaled,
) -> jax.Array:
    """[rows, n] of the matrix at ``layer`` of a flattened stack, x as ``prefill_split`` leaves it."""
    kind = out if plan.splits == 1 else jnp.dtype(jnp.float32)
    data, scale = w.data.reshape(-1, plan.n, plan.k), w.scale.reshape(-1)
    if isinstance(layer, int):
        scale, offset = scale_slice(scale, scale.size // data.shape[0], layer)
        (y,) = build(plan, kind.name, offset)(values, scales, layer_slice(data, layer), scale)
    else:
        (y,) = build(plan, kind.name)(jnp.asarray(layer, jnp.int32).reshape(1), values, scales, data, scale)
    y = y[0] if plan.splits == 1 else jnp.sum(y, axis=0).astype(out)
    return y[: plan.rows]


@functools.lru_cache(maxsize=256)
def build(
    plan: Plan, out_dtype: str, offset: int | None = None, interpret: Any = None
) -> Callable[..., list[jax.Array]]:
    """The kernel of a plan: call(layer [1], values, scales, data [stack, n, k], weight_scale) -> [[splits, stored rows, n]].

    offset: the first scale of the one matrix that data has; then there is no layer. None: data and weight_scale are stacks.
    """
    out = jnp.dtype(out_dtype)

    def fp8_linear_prefill(*refs: Any) -> None:
        layer = refs[0][0] if offset is None else 0
        worker = _Worker(plan, layer, offset or 0, *refs[offset is None :])
        warpgroup = lax.axis_index("wg")
        pl.when(warpgroup < plan.consumers)(worker.multiply)
        pl.when(warpgroup == plan.consumers)(worker.copy)

    tiled = (plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(128))
    chunk = 128 // out.itemsize
    scratch = (
        plgpu.SMEM((plan.stages, plan.terms, plan.tile_rows, BLOCK), E4M3, transforms=tiled),
        plgpu.SMEM((plan.stages, plan.groups[1], plan.columns, BLOCK), E4M3, transforms=tiled),
        plgpu.SMEM(
            (plan.consumers, 64, chunk),
            out,
            transforms=(plgpu.TilingTransform((8, chunk)), plgpu.SwizzleTransform(128)),
        ),
        plgpu.Barrier(num_arrivals=plan.terms + plan.groups[1], num_barriers=plan.stages),
        plgpu.Barrier(num_arrivals=plan.consumers, num_barriers=plan.stages),
    )
    return plgpu.kernel(
        fp8_linear_prefill,
        out_type=[jax.ShapeDtypeStruct((plan.splits, plan.stored_rows, plan.n), out)],
        grid=(plan.workers,),
        grid_names=("worker",),
        num_threads=plan.consumers + 1,
        thread_name="wg",
        scratch_types=scratch,
        # Every shared buffer here is ordered by hand.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=mgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
        interpret=interpret,
    )


class _Worker:
    """A block of threads: its tiles, and what the copying and the multiplying warpgroups do with each."""

    def __init__(
        self,
        plan: Plan,
        layer: Any,
        offset: int,
        values: Any,
        scales: Any,
        w: Any,
        weight_scale: Any,
        out: Any,
        *scratch: Any,
    ) -> None:
        self.plan, self.layer, self.offset = plan, layer, offset
        self.values, self.scales, self.w, self.weight_scale, self.out = values, scales, w, weight_scale, out
        self.x_ring, self.w_ring, self.staging, self.full, self.empty = scratch
        self.wg = lax.axis_index("wg")
        # Of a multiplying warpgroup: its place along the rows and along the columns of a tile.
        self.group_row, self.group_column = (0, self.wg) if plan.side_by_side else (self.wg, 0)

    def walk(self, tile: Callable[..., Any]) -> Any:
        """Calls tile(row, column, split, first k-block, k-blocks, steps before) for all tiles of this worker; returns the steps."""
        plan = self.plan
        shape = (plan.row_tiles, plan.column_tiles)
        worker = lax.axis_index("worker")
        mine = (plan.items - worker + plan.workers - 1) // plan.workers

        def body(i: Any, steps: Any) -> Any:
            item = worker + i * plan.workers
            split, item = (
                (lax.div(item, shape[0] * shape[1]), lax.rem(item, shape[0] * shape[1]))
                if plan.splits > 1
                else (0, item)
            )
            row, column = plgpu.planar_snake(item, shape, 0, min(plan.width, shape[0]))
            first = lax.div(split * plan.blocks, plan.splits) if plan.splits > 1 else 0
            last = lax.div((split + 1) * plan.blocks, plan.splits) if plan.splits > 1 else plan.blocks
            tile(row, column, split, first, last - first, steps)
            return steps + (last - first)

        return lax.fori_loop(0, mine, body, jnp.int32(0))

    def copy(self) -> None:
        plgpu.set_max_registers(self.plan.registers[1], action="decrease")
        steps = self.walk(self.copy_tile)
        # Every phase of a barrier is waited for, also those of the last arrivals.
        for i in range(self.plan.stages):
            pl.when(i < steps)(functools.partial(self.wait_empty, i))

    def wait_empty(self, slot: Any) -> None:
        plgpu.barrier_wait(self.empty.at[slot])

    def copy_tile(self, row: Any, column: Any, split: Any, first: Any, count: Any, steps: Any) -> None:
        plan = self.plan
        rows = pl.ds(row * plan.tile_rows, plan.tile_rows)

        def step(j: Any, _: None) -> None:
            at = steps + j
            slot = lax.rem(at, plan.stages)
            pl.when(at >= plan.stages)(functools.partial(self.wait_empty, slot))
            k = pl.ds((first + j) * BLOCK, BLOCK)
            full = self.full.at[slot]
            for t in range(plan.terms):
                plgpu.copy_gmem_to_smem(self.values.at[t, rows, k], self.x_ring.at[slot, t], full)
            for g in range(plan.groups[1]):
                outputs = pl.ds(column * plan.tile_columns + g * plan.columns, plan.columns)
                source = self.w.at[self.layer, outputs, k]
                plgpu.copy_gmem_to_smem(source, self.w_ring.at[slot, g], full)

        lax.fori_loop(0, count, step, None)

    def multiply(self) -> None:
        plgpu.set_max_registers(self.plan.registers[0], action="increase")
        self.walk(self.multiply_tile)
        plgpu.wait_smem_to_gmem(0)

    def multiply_tile(self, row: Any, column: Any, split: Any, first: Any, count: Any, steps: Any) -> None:
        plan = self.plan
        output = column * plan.tile_columns + self.group_column * plan.columns
        top = row * plan.tile_rows + self.group_row * (64 * plan.halves)
        row_blocks = -(-plan.n // BLOCK)
        # A warpgroup without outputs multiplies zeros: any scale will do.
        weight_row = self.layer * row_blocks + lax.min(lax.div(output, BLOCK), row_blocks - 1)
        scales_of = functools.partial(self.load_scales, top, self.offset + weight_row * plan.blocks)

        def step(j: Any, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            weight_scale, row_scales, totals = carry
            sums, slot = list(totals), lax.rem(steps + j, plan.stages)
            ahead = functools.partial(scales_of, first + lax.min(j + 1, count - 1))
            plgpu.barrier_wait(self.full.at[slot])
            pieces = [(t, h) for t in range(plan.terms) for h in range(plan.halves)]
            following: Any = None
            for t, h in pieces:
                partial, loaded = self.wgmma(slot, t, h, ahead if (t, h) == pieces[0] else None)
                following = loaded or following
                if (t, h) == pieces[-1]:
                    plgpu.barrier_arrive(self.empty.at[slot])
                factor = row_scales[h] * (weight_scale * 16.0**-t)
                sums[h] = sums[h] + partial * _by_rows(factor, partial.shape)
            return (*following, tuple(sums))

        zero = plgpu.layout_cast(jnp.zeros((64, plan.columns), jnp.float32), _ACC)
        *_, totals = lax.fori_loop(0, count, step, (*scales_of(first), (zero,) * plan.halves))
        for h, total in enumerate(totals):
            self.store(total, split, top + 64 * h, output)

    def load_scales(self, row: Any, weight_row: Any, block: Any) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """The scale of the weight's block, and those of x [64] for each half."""
        halves = (self.scales.at[block, pl.ds(row + 64 * h, 64)] for h in range(self.plan.halves))
        rows = tuple(plgpu.load(at, layout=_ACC.reduce(1), optimized=False) for at in halves)
        return self.weight_scale[weight_row + block], rows

    def wgmma(self, slot: Any, t: int, h: int, load: Callable[[], Any] | None) -> tuple[jax.Array, Any]:
        """One fresh product over a k-block, and what ``load`` gives while the tensor cores are at it.

        ptxas waits for every load under way before it starts a product: loads of a step ahead that stand before it cost every
        step the latency of the L2.
        """

        def body(acc: Any) -> tuple[jax.Array, Any]:
            rows = pl.ds((self.group_row * self.plan.halves + h) * 64, 64)
            plgpu.wgmma(acc, self.x_ring.at[slot, t, rows], self.w_ring.at[slot, self.group_column].T)
            loaded = load() if load else None
            return acc[...], loaded

        return pl.run_scoped(body, plgpu.ACC((64, self.plan.columns), jnp.float32))

    def store(self, total: jax.Array, split: Any, row: Any, column: Any) -> None:
        """Stores [64, columns] through the staging buffer, 128 bytes of a row at a time."""
        chunk = self.staging.shape[-1]
        staging = self.staging.at[self.wg]
        for c in range(self.plan.columns // chunk):
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staging[...] = total[:, chunk * c : chunk * (c + 1)].astype(self.out.dtype)
            plgpu.commit_smem()
            target = self.out.at[split, pl.ds(row, 64), pl.ds(column + chunk * c, chunk)]
            plgpu.copy_smem_to_gmem(staging, target)


def _by_rows(factor: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return plgpu.layout_cast(lax.broadcast_in_dim(factor, shape, (0,)), _ACC)
