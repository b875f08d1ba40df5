"""gate_up with SwiGLU for one row on Hopper, in Pallas Mosaic GPU; ``mosaic_one_sm90`` says how."""

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
    TILED,
    Walk,
    columns_of,
    iota,
    kernel_of,
    loop,
    paired,
    scratch_of,
    zero,
)
from pallas_kernels.experts.mosaic_plan import LINE, TILE, UNIT, OneRow


class _GateUp(Walk):
    """A warpgroup of gate_up."""

    def compute(self, x: Any, weights: tuple[Any, ...], out: Any) -> None:
        plan = self.plan
        self.weights, self.out = weights, out
        self.first_routed = plan.shared_width // UNIT
        # Neighbouring tiles go to different SMs.
        self.first, self.stride = self.wg * plan.workers + self.cta, plan.workers * self.groups
        choices = self.load_choices()
        units = self.load_units(x, plan.up_units)
        # Tiles of the shared expert wait for no choice.
        known = jnp.where(self.first < self.first_routed, min(self.stages, plan.up_units), 0)
        loop(0, known, functools.partial(self.fetch, shared=True))
        tiles = self.first_routed + self.list_experts(choices) * (plan.width // UNIT)
        mine = lax.div(jnp.maximum(tiles - self.first + self.stride - 1, 0), jnp.int32(self.stride))
        self.steps = mine * plan.up_units
        loop(known, jnp.minimum(self.steps, self.stages), self.fetch)
        for unit, tile in units:
            pl.when(unit < plan.up_units)(functools.partial(self.quantize, unit, tile))
        self.share_x()
        loop(0, mine, self.tile)

    def fetch(self, i: Any, shared: bool = False) -> None:
        """Starts the copies of this warpgroup's i-th step, a unit of k of a tile. shared: it is known to be the shared expert's."""
        plan, slot = self.plan, lax.rem(i, jnp.int32(self.stages))
        tile = self.first + lax.div(i, jnp.int32(plan.up_units)) * self.stride
        unit = lax.rem(i, jnp.int32(plan.up_units))

        def copy(data: Any, scale: Any, matrix: Any, tile: Any, width: int) -> None:
            barrier, first = self.full.at[self.wg * self.stages + slot], tile * UNIT
            for m in range(2):
                self.copy_rows(data.at[matrix * 2 + m, pl.ds(first, UNIT), :], unit, self.wg, slot, m, barrier)
                row = (matrix * 2 + m) * (width // BLOCK) + lax.div(first, BLOCK)
                start = row * (plan.hidden // BLOCK) + unit * UNIT
                plgpu.copy_gmem_to_smem(scale.at[pl.ds(start, LINE)], self.scales.at[self.wg, slot, m], barrier)

        data, scale, shared_data, shared_scale = self.weights

        def of_shared() -> None:
            copy(shared_data, shared_scale, self.layer, tile, plan.shared_width)

        def of_routed() -> None:
            routed, per = tile - self.first_routed, jnp.int32(plan.width // UNIT)
            copy(data, scale, self.matrix(lax.div(routed, per)), lax.rem(routed, per), plan.width)

        if shared:
            of_shared()
        else:
            pl.when(tile < self.first_routed)(of_shared)
            pl.when(tile >= self.first_routed)(of_routed)

    def copy_rows(self, rows: Any, unit: Any, *place: Any) -> None:
        """A unit of k of eight rows, to a matrix of a stage."""
        *place, barrier = place
        if self.wide is not None:
            k = pl.ds(unit * (UNIT * BLOCK), UNIT * BLOCK)
            return plgpu.copy_gmem_to_smem(rows.at[:, k], self.wide.at[*place], barrier)
        for j in range(UNIT):
            k = pl.ds((unit * UNIT + j) * BLOCK, BLOCK)
            plgpu.copy_gmem_to_smem(rows.at[:, k], self.ring.at[*place, pl.ds(UNIT * j, UNIT), :], barrier)

    def tile(self, number: Any) -> None:
        plan = self.plan
        # Of a product's row, only the column of its own k-block.
        own = lax.rem(iota(1, plan.columns), UNIT) == lax.div(iota(0, plan.columns), UNIT)

        def unit(u: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            i = number * plan.up_units + u
            slot = lax.rem(i, jnp.int32(self.stages))
            columns = columns_of(self.x_scales.at[u])
            self.wait(slot)
            scales = [columns_of(self.scales.at[self.wg, slot, m, pl.ds(0, UNIT)]) for m in range(2)]
            products = self.multiply([self.ring.at[self.wg, slot, m] for m in range(2)], u)
            # All four warps are through with this slot.
            plgpu.commit_smem()
            following = i + self.stages
            pl.when(following < self.steps)(functools.partial(self.fetch, following))
            kept = [self.added_terms(jnp.where(own, product, 0.0)) for product in products]
            return tuple(t + p * (columns * s) for t, p, s in zip(totals, kept, scales, strict=True))

        totals = lax.fori_loop(0, plan.up_units, unit, (zero(), zero()))
        for m, total in enumerate(totals):
            self.partial.at[self.wg, m][...] = jnp.sum(total, axis=1)
        plgpu.commit_smem()
        gate, up = (paired([self.sums(self.wg, m, UNIT * j, UNIT) for j in range(UNIT)]) for m in range(2))
        product = gate / (1.0 + jnp.exp(-gate)) * up
        first = (self.first + number * self.stride) * UNIT
        self.out.at[pl.ds(first, UNIT)][...] = product.astype(self.out.dtype)


@functools.lru_cache(maxsize=64)
def build(plan: OneRow, interpret: Any = None) -> Callable[..., list[jax.Array]]:
    """call(layer [1], ids [k], x [blocks, 128], gate_up [stack, width, hidden], its scales in one row, the shared two) ->
    [h bfloat16 [units of down * 1024]], of which what no expert made is not written."""
    sizes = (plan.groups_up, plan.stages_up)
    ring = plgpu.SMEM((*sizes, 2, TILE, BLOCK), E4M3, transforms=TILED)
    # Pallas' interpreter has no memory in two shapes.
    wide = plgpu.SMEM((*sizes, 2, UNIT, UNIT * BLOCK), E4M3, transforms=TILED)
    both = ring if interpret else plgpu.RefUnion(ring, wide)
    scratch = scratch_of(plan, plan.up_units, *sizes, both, 2 + 2 * (UNIT if interpret else 1), 2)

    def experts_gate_up(layer: Any, ids: Any, x: Any, *refs: Any) -> None:
        weights, out, memory = refs[:4], refs[4], dict(zip(scratch, refs[5:], strict=True))
        memory["ring"], memory["wide"] = (memory["ring"], None) if interpret else memory["ring"]
        _GateUp(plan, layer[0], ids, memory, *sizes).compute(x, weights, out)

    out = jax.ShapeDtypeStruct((plan.down_units * UNIT * BLOCK,), jnp.bfloat16)
    return kernel_of(experts_gate_up, [out], min(plan.workers, plan.tiles), plan.groups_up, scratch, interpret)
