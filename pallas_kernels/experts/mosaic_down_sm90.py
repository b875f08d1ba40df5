"""down and the weighted sum for one row on Hopper, in Pallas Mosaic GPU; ``mosaic_one_sm90`` says how."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.blocks import BLOCK, E4M3
from pallas_kernels.experts.mosaic_one_sm90 import (
    ACC,
    TILED,
    Walk,
    added,
    columns_of,
    iota,
    kernel_of,
    loop,
    rows_of,
    scratch_of,
    zero,
)
from pallas_kernels.experts.mosaic_plan import LINE, TILE, UNIT, OneRow
from pallas_kernels.fp8_linear.mosaic_quantize_sm90 import GROUPS


class _Down(Walk):
    """A warpgroup of down: every ``groups``-th step of the tile of its block of threads."""

    def compute(self, h: Any, shares: Any, weights: tuple[Any, ...], out: Any) -> None:
        plan = self.plan
        self.weights = weights
        choices = self.load_choices(shares)
        units = self.load_units(h, plan.down_units)
        # Steps of the shared expert wait for no choice.
        known = lax.div(plan.shared_blocks // plan.step - self.wg + self.groups - 1, jnp.int32(self.groups))
        known = jnp.minimum(jnp.maximum(known, 0), self.stages)
        loop(0, known, functools.partial(self.fetch, shared=True))
        experts = self.list_experts(choices)
        blocks = plan.shared_blocks + experts * plan.width_blocks
        steps = lax.div(blocks, jnp.int32(plan.step))
        self.steps = lax.div(steps - self.wg + self.groups - 1, jnp.int32(self.groups))
        loop(known, jnp.minimum(self.steps, self.stages), self.fetch)
        for unit, tile in units:
            # Behind the last valid choice nothing was written.
            inside = plgpu.broadcasted_iota(jnp.int32, (UNIT, BLOCK), 0, layout=GROUPS) < blocks - UNIT * unit
            tile = jnp.where(inside, tile.astype(jnp.float32), 0.0)
            pl.when(unit < plan.down_units)(functools.partial(self.quantize, unit, tile))
        self.share_x()
        first = self.cta * plan.down_rows
        rows = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=ACC.reduce(1))
        # Rows of the tile that lie in the first of its one or two blocks of scales.
        self.upper = rows < BLOCK - lax.rem(first, BLOCK)
        self.partial.at[self.wg, 0][...] = jnp.sum(lax.fori_loop(0, self.steps, self.step, zero()), axis=1)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.done)
        plgpu.barrier_wait(self.done)

        @pl.when(self.wg == 0)
        def _() -> None:
            total = added([self.sums(g, 0, 0, plan.down_rows) for g in range(self.groups)])
            out.at[pl.ds(first, plan.down_rows)][...] = total.astype(out.dtype)

    def locate(self, block: Any) -> tuple[Any, Any]:
        """(routed item or a negative number, k-block within the expert) of a k-block of down."""
        plan = self.plan
        routed = block - plan.shared_blocks
        item = jnp.where(routed < 0, -1, lax.div(routed, jnp.int32(plan.width_blocks)))
        return item, jnp.where(routed < 0, block, lax.rem(routed, jnp.int32(plan.width_blocks)))

    def scale_start(self, matrix: Any, block: Any, across: Any, second: int) -> Any:
        """Of the scales of a step, where they lie in the flattened stack."""
        plan, first = self.plan, self.cta * self.plan.down_rows
        row = lax.div(first + second * (plan.down_rows - 1), BLOCK)
        return (matrix * (plan.hidden // BLOCK) + row) * across + block

    def fetch(self, i: Any, shared: bool = False) -> None:
        """Starts the copies of this warpgroup's i-th step. shared: it is known to be the shared expert's."""
        plan, slot = self.plan, lax.rem(i, jnp.int32(self.stages))
        item, block = self.locate((self.wg + i * self.groups) * plan.step)

        def copy(data: Any, scale: Any, matrix: Any, across: int) -> None:
            barrier = self.full.at[self.wg * self.stages + slot]
            rows, k = pl.ds(self.cta * plan.down_rows, plan.down_rows), pl.ds(block * BLOCK, plan.step * BLOCK)
            target = self.ring.at[self.wg, slot, pl.ds(0, plan.down_rows), :]
            plgpu.copy_gmem_to_smem(data.at[matrix, rows, k], target, barrier)
            for m in range(2):
                start = self.scale_start(matrix, block, across, m)
                start = start - lax.rem(start, 4)  # copies start at 16 bytes
                plgpu.copy_gmem_to_smem(scale.at[pl.ds(start, LINE)], self.scales.at[self.wg, slot, m], barrier)

        data, scale, shared_data, shared_scale = self.weights

        def of_shared() -> None:
            copy(shared_data, shared_scale, self.layer, plan.shared_blocks)

        def of_routed() -> None:
            copy(data, scale, self.matrix(item), plan.width_blocks)

        if shared:
            of_shared()
        else:
            pl.when(item < 0)(of_shared)
            pl.when(item >= 0)(of_routed)

    def step(self, i: Any, total: jax.Array) -> jax.Array:
        plan, slot = self.plan, lax.rem(i, jnp.int32(self.stages))
        first = (self.wg + i * self.groups) * plan.step
        item, block = self.locate(first)
        routed, known = item >= 0, jnp.maximum(item, 0)
        share = jnp.where(routed, self.shares[self.wg, known], 1.0)
        matrix = jnp.where(routed, self.matrix(known), self.layer)
        across = jnp.where(routed, plan.width_blocks, plan.shared_blocks)
        skips = [lax.rem(self.scale_start(matrix, block, across, m), jnp.int32(4)) for m in range(2)]
        unit, place = lax.div(first, jnp.int32(UNIT)), lax.rem(first, jnp.int32(UNIT))
        columns, column = columns_of(self.x_scales.at[unit]), iota(1) - place
        self.wait(slot)
        scales = [[self.scales[self.wg, slot, m, skips[m] + j] * share for m in range(2)] for j in range(plan.step)]
        blocks = [self.ring.at[self.wg, slot, :, pl.ds(j * BLOCK, BLOCK)] for j in range(plan.step)]
        products = self.multiply(blocks, unit)
        plgpu.commit_smem()
        following = i + self.stages
        pl.when(following < self.steps)(functools.partial(self.fetch, following))
        for j, (product, (above, below)) in enumerate(zip(products, scales, strict=True)):
            rows = rows_of(jnp.where(self.upper, above, below))
            total = total + jnp.where(column == j, self.added_terms(product) * columns, 0.0) * rows
        return total


@functools.lru_cache(maxsize=64)
def build(plan: OneRow, interpret: Any = None) -> Callable[..., list[jax.Array]]:
    """call(layer [1], ids [k], weights [k], h [blocks, 128], down [stack, hidden, width], its scales in one row, the shared two)
    -> [bfloat16 [hidden]]."""
    sizes = (plan.groups_down, plan.stages_down)
    ring = plgpu.SMEM((*sizes, TILE, plan.step * BLOCK), E4M3, transforms=TILED)
    scratch = scratch_of(plan, plan.down_units, *sizes, ring, 3, 1) | {
        "shares": plgpu.SMEM((plan.groups_down, plan.k + 1), jnp.float32),
        "done": plgpu.Barrier(num_arrivals=plan.groups_down),
    }

    def experts_down(layer: Any, ids: Any, shares: Any, h: Any, *refs: Any) -> None:
        weights, out, memory = refs[:4], refs[4], dict(zip(scratch, refs[5:], strict=True))
        _Down(plan, layer[0], ids, memory, *sizes).compute(h, shares, weights, out)

    out = jax.ShapeDtypeStruct((plan.hidden,), jnp.bfloat16)
    return kernel_of(experts_down, [out], plan.hidden // plan.down_rows, plan.groups_down, scratch, interpret)
