"""Experts of one row on Hopper, in Pallas Mosaic GPU: gate_up with SwiGLU, then down with the weighted sum.

Weights are the 64-row operand of e4m3 x e4m3 wgmma. The eight columns of one term of x are eight neighbouring k-blocks of the row:
a block of weights is multiplied by all of them and only the column of its own block is kept, so the sum over the columns is the
dot product. W8A16 has a second group of columns, x/s = hi + lo/16 (``fp8_linear`` says why that is exact).

gate_up: persistent blocks of threads walk tiles of eight rows of gate and the same of up. The 64 rows of a wgmma are those eight in
eight neighbouring k-blocks, which is how one copy of eight rows of 1024 lies in shared memory. The product goes out in order of the
experts: the shared one, then the valid choices.
down: a block of threads owns ``down_rows`` outputs and adds all experts in that order: no parts in memory, no atomics.

Each warpgroup has a ring of TMA stages of its own and restarts a stage's copies as soon as it has multiplied it: of gate_up it has
tiles, of down steps of its own. One alone cannot multiply as fast as an SM is given weights. Choices that are no expert take no
part: tiles and steps are counted on the device. A launch waits for memory once before its first copies: layer, choices and x
are loaded together. x is quantized by all warpgroups together while the rings fill.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import BLOCK, E4M3
from pallas_kernels.experts.mosaic_plan import LINE, TILE, UNIT, OneRow
from pallas_kernels.fp8_linear.mosaic_quantize_sm90 import GROUPS, split

ACC = plgpu.Layout.WGMMA
TILED = (plgpu.TilingTransform((8, BLOCK)), plgpu.SwizzleTransform(128))
# A vector with an element in each of eight lanes, the same in all groups of eight.
_EIGHT = plgpu.Layout.TILED(
    plgpu.Tiling(((8,), (1,))),
    warp_dims=(plgpu.Replicated(4),),
    lane_dims=(plgpu.Replicated(4), -2),
    vector_dim=-1,
)


class Walk:
    """What both kernels share: the list of experts, x in shared memory, the ring, a step of products."""

    def __init__(self, plan: OneRow, layer: Any, ids: Any, memory: dict[str, Any], groups: int, stages: int) -> None:
        self.plan, self.layer, self.ids, self.groups, self.stages = plan, layer, ids, groups, stages
        self.__dict__.update(memory)
        self.cta, self.wg = lax.axis_index("worker"), lax.axis_index("wg")

    def load_choices(self, weights: Any = None) -> list[tuple[Any, Any]]:
        """All choices and their weights, to be listed later: memory is waited for once."""
        each = range(self.plan.k)
        return [(self.ids[j], None if weights is None else weights[j]) for j in each]

    def list_experts(self, choices: list[tuple[Any, Any]]) -> Any:
        """Writes the valid choices (and their weights) to shared memory, in order; returns how many there are.

        All threads of a warpgroup write the same, each warpgroup to a place of its own, and no place twice: nobody waits for
        anybody. There is no branch that a load could sink behind: what is no expert goes to a place that nobody reads.
        """
        count = jnp.int32(0)
        for expert, share in choices:
            valid = (expert >= 0) & (expert < self.plan.experts)
            place = jnp.where(valid, count, self.plan.k)
            self.chosen[self.wg, place] = expert
            if share is not None:
                self.shares[self.wg, place] = share
            count = count + valid.astype(jnp.int32)
        return count

    def matrix(self, item: Any) -> Any:
        """Position of a routed expert in the flattened stack."""
        return self.layer * self.plan.experts + self.chosen[self.wg, item]

    def load_units(self, source: Any, units: int) -> list[tuple[Any, Any]]:
        """(number, [8 k-blocks, 128]) of every unit of x that this warpgroup quantizes, straight from global memory."""
        numbers = [self.wg + self.groups * j for j in range(-(-units // self.groups))]
        last = [jnp.minimum(number, units - 1) for number in numbers]
        tiles = [plgpu.load(source.at[pl.ds(UNIT * u, UNIT), :], layout=GROUPS, optimized=False) for u in last]
        return list(zip(numbers, tiles, strict=True))

    def quantize(self, unit: Any, tile: Any) -> None:
        """A unit to e4m3 columns and their scales."""
        terms, scale = split(tile.astype(jnp.float32), self.plan.terms)
        for t, term in enumerate(terms):
            self.x8.at[unit, pl.ds(UNIT * t, UNIT), :][...] = term
        self.x_scales.at[unit][...] = scale

    def share_x(self) -> None:
        """All warpgroups have quantized their units."""
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.x_ready)
        plgpu.barrier_wait(self.x_ready)

    def wait(self, slot: Any) -> None:
        plgpu.barrier_wait(self.full.at[self.wg * self.stages + slot])

    def multiply(self, blocks: list[Any], unit: Any) -> list[jax.Array]:
        """Products of blocks of a stage, a fresh accumulator each: FP8 wgmma keeps some 14 bits."""

        def body(*accumulators: Any) -> list[jax.Array]:
            for block, acc in zip(blocks, accumulators, strict=True):
                plgpu.wgmma(acc, block, self.x8.at[unit].T)
            return [acc[...] for acc in accumulators]

        return pl.run_scoped(body, *[plgpu.ACC((TILE, self.plan.columns), jnp.float32)] * len(blocks))

    def added_terms(self, product: jax.Array) -> jax.Array:
        return product if self.plan.terms == 1 else product[:, :UNIT] + product[:, UNIT:] * (1 / 16)

    def sums(self, group: Any, m: int, first: int, size: int) -> jax.Array:
        """Of a warpgroup's m-th sums of rows, ``size`` from ``first`` on."""
        return plgpu.load(self.partial.at[group, m, pl.ds(first, size)], layout=_EIGHT, optimized=False)


def columns_of(ref: Any) -> jax.Array:
    """Eight numbers of shared memory as the columns of a product."""
    values = plgpu.load(ref, layout=ACC.reduce(0), optimized=False)
    return plgpu.layout_cast(lax.broadcast_in_dim(values, (TILE, UNIT), (1,)), ACC)


def rows_of(values: jax.Array) -> jax.Array:
    return plgpu.layout_cast(lax.broadcast_in_dim(values, (TILE, UNIT), (0,)), ACC)


def added(parts: list[jax.Array]) -> jax.Array:
    """Their sum, from the first to the last."""
    return functools.reduce(lambda a, b: a + b, parts)


def paired(parts: list[jax.Array]) -> jax.Array:
    """Their sum, neighbours first."""
    while len(parts) > 1:
        parts = [parts[i] + parts[i + 1] for i in range(0, len(parts), 2)]
    return parts[0]


def loop(first: Any, last: Any, body: Any) -> None:
    lax.fori_loop(first, last, lambda i, _: body(i), None)


def iota(dimension: int, columns: int = UNIT) -> jax.Array:
    return plgpu.broadcasted_iota(jnp.int32, (TILE, columns), dimension, layout=ACC)


def zero(columns: int = UNIT) -> jax.Array:
    return plgpu.layout_cast(jnp.zeros((TILE, columns), jnp.float32), ACC)


def scratch_of(plan: OneRow, units: int, groups: int, stages: int, ring: Any, copies: int, sums: int) -> dict[str, Any]:
    return {
        "ring": ring,
        "x8": plgpu.SMEM((units, plan.columns, BLOCK), E4M3, transforms=TILED),
        "scales": plgpu.SMEM((groups, stages, 2, LINE), jnp.float32),
        "x_scales": plgpu.SMEM((units, UNIT), jnp.float32),
        "partial": plgpu.SMEM((groups, sums, TILE), jnp.float32),
        "chosen": plgpu.SMEM((groups, plan.k + 1), jnp.int32),
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=groups * stages),
        "x_ready": plgpu.Barrier(num_arrivals=groups),
    }


def kernel_of(body: Any, out: list[Any], grid: int, groups: int, scratch: dict[str, Any], interpret: Any) -> Any:
    return plgpu.kernel(
        body,
        out_type=out,
        grid=(grid,),
        grid_names=("worker",),
        num_threads=groups,
        thread_name="wg",
        scratch_types=tuple(scratch.values()),
        # Every shared buffer here is ordered by hand; every reduction stays within a warp.
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=mgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        interpret=interpret,
    )
