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

from pallas_kernels.blocks import BLOCK
from pallas_kernels.experts.mosaic_one_sm90 import Walk, added, columns_of, iota, kernel_of, scratch_of, zero
from pallas_kernels.experts.mosaic_plan import LINE, UNIT, OneRow


class _GateUp(Walk):
    """A warpgroup of gate_up."""

    def compute(self, x: Any, weights: tuple[Any, ...], out: Any) -> None:
        plan = self.plan
        self.weights, self.out = weights, out
        units = self.load_units(x, plan.up_units)
        experts = self.list_experts()
        self.first_routed = plan.shared_width // plan.half
        tiles = self.first_routed + experts * (plan.width // plan.half)
        # Neighbouring tiles go to different SMs.
        self.first, self.stride = self.wg * plan.workers + self.cta, plan.workers * self.groups
        mine = lax.div(jnp.maximum(tiles - self.first + self.stride - 1, 0), jnp.int32(self.stride))
        self.steps = mine * plan.up_units
        for i in range(self.stages):
            pl.when(i < self.steps)(functools.partial(self.fetch, jnp.int32(i)))
        for unit, tile in units:
            pl.when(unit < plan.up_units)(functools.partial(self.quantize, unit, tile))
        self.share_x()
        lax.fori_loop(0, mine, self.tile, None)

    def fetch(self, i: Any) -> None:
        """Starts the copies of this warpgroup's i-th step: a unit of k of a tile."""
        plan, slot = self.plan, lax.rem(i, self.stages)
        tile = self.first + lax.div(i, plan.up_units) * self.stride
        unit = lax.rem(i, plan.up_units)

        def copy(data: Any, scale: Any, matrix: Any, tile: Any, width: int) -> None:
            barrier, first = self.full.at[self.wg * self.stages + slot], tile * plan.half
            for m in range(2):
                for p in range(plan.parts):
                    k = pl.ds((unit * UNIT + p * plan.up_step) * BLOCK, plan.up_step * BLOCK)
                    rows = pl.ds((2 * p + m) * plan.half, plan.half)
                    source = data.at[matrix * 2 + m, pl.ds(first, plan.half), k]
                    plgpu.copy_gmem_to_smem(source, self.ring.at[self.wg, slot, rows, :], barrier)
                row = (matrix * 2 + m) * (width // BLOCK) + lax.div(first, BLOCK)
                start = row * (plan.hidden // BLOCK) + unit * UNIT
                plgpu.copy_gmem_to_smem(scale.at[pl.ds(start, LINE)], self.scales.at[self.wg, slot, m], barrier)

        data, scale, shared, shared_scale = self.weights

        @pl.when(tile < self.first_routed)
        def _() -> None:
            copy(shared, shared_scale, self.layer, tile, plan.shared_width)

        @pl.when(tile >= self.first_routed)
        def _() -> None:
            routed, per = tile - self.first_routed, plan.width // plan.half
            copy(data, scale, self.matrix(lax.div(routed, per)), lax.rem(routed, per), plan.width)

    def tile(self, number: Any, _: None) -> None:
        plan = self.plan
        # Of an element of a product: the block of its step that its row and column belong to.
        place = lax.rem(iota(1, plan.columns), UNIT) - lax.div(iota(0, plan.columns), 2 * plan.half) * plan.up_step
        is_up = lax.rem(lax.div(iota(0), plan.half), 2) == 1

        def unit(u: Any, total: jax.Array) -> jax.Array:
            i = number * plan.up_units + u
            slot = lax.rem(i, self.stages)
            columns = columns_of(self.x_scales.at[u])
            self.wait(slot)
            gate, up = (columns_of(self.scales.at[self.wg, slot, m, pl.ds(0, UNIT)]) for m in range(2))
            products = self.multiply(slot, u, plan.up_step)
            # All four warps are through with this slot.
            plgpu.commit_smem()
            following = i + self.stages
            pl.when(following < self.steps)(functools.partial(self.fetch, following))
            chosen = zero(plan.columns)
            for j, product in enumerate(products):
                chosen = jnp.where(place == j, product, chosen)
            return total + self.added_terms(chosen) * (columns * jnp.where(is_up, up, gate))

        total = lax.fori_loop(0, plan.up_units, unit, zero())
        self.store_sum(total)
        firsts = [[(2 * p + m) * plan.half for p in range(plan.parts)] for m in range(2)]
        gate, up = (added([self.partial_at(self.wg, first, plan.half) for first in several]) for several in firsts)
        product = gate / (1.0 + jnp.exp(-gate)) * up
        first = (self.first + number * self.stride) * plan.half
        self.out.at[pl.ds(first, plan.half)][...] = product.astype(self.out.dtype)


@functools.lru_cache(maxsize=64)
def build(plan: OneRow, interpret: Any = None) -> Callable[..., list[jax.Array]]:
    """call(layer [1], ids [k], x [blocks, 128], gate_up [stack, width, hidden], its scales in one row, the shared two) ->
    [h bfloat16 [units of down * 1024]], of which what no expert made is not written."""
    sizes = (plan.groups_up, plan.stages_up)
    scratch = scratch_of(plan, plan.up_units, *sizes, plan.up_step, 2 * plan.parts + 2)

    def experts_gate_up(layer: Any, ids: Any, x: Any, *refs: Any) -> None:
        weights, out, memory = refs[:4], refs[4], dict(zip(scratch, refs[5:], strict=True))
        _GateUp(plan, layer[0], ids, memory, *sizes).compute(x, weights, out)

    out = jax.ShapeDtypeStruct((plan.down_units * UNIT * BLOCK,), jnp.bfloat16)
    return kernel_of(experts_gate_up, [out], min(plan.workers, plan.tiles), plan.groups_up, scratch, interpret)
