"""What one block of threads of the Hopper kernel of fp8_linear does: 64 output rows of one weight, in Pallas Mosaic GPU.

Weights are the 64-row operand of e4m3 x e4m3 wgmma and the tokens its columns. Each warpgroup walks its own share of k through its
own ring of TMA stages, quantizes its own part of x one step ahead, and promotes every 128-wide product to float32 with both scales.
The partial sums of the warpgroups are added in a fixed order: the result is bitwise reproducible (``mosaic_ending_sm90``). Where a
tile has several blocks of threads (``Plan.split``), a cluster, their warpgroups share k as those of one block do.

The columns of one wgmma (8 at least) are used up as follows.
  * one row: the columns are 8 consecutive k-blocks of x. A weight block is multiplied by all of them and a zero in the scale
    vector drops the products that do not belong together; the sum over the columns is the dot product.
  * W8A16: x is split exactly into e4m3 terms, x/s = hi + lo/16, that take a column each. hi carries 4 bits of the significand and
    lo the other 4 of bfloat16's 8: exact for elements above 2^-14 of their group's largest, and to 2^-22 of it below.

With a norm (``mosaic_norm_sm90``) x is normed before it is quantized.
"""

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
from pallas_kernels.fp8_linear.mosaic_ending_sm90 import ACC as _ACC
from pallas_kernels.fp8_linear.mosaic_ending_sm90 import Ending
from pallas_kernels.fp8_linear.mosaic_launch_sm90 import Worker
from pallas_kernels.fp8_linear.mosaic_norm_sm90 import Norm
from pallas_kernels.fp8_linear.mosaic_quantize_sm90 import GROUPS, split
from pallas_kernels.fp8_linear.plan import TILE, Plan


class Tile(Worker, Ending, Norm):
    """The work of one block of threads."""

    def __init__(self, plan: Plan, *given: Any) -> None:
        super().__init__(plan, TILE, *given)
        spread = plan.units // plan.shares
        # Units of k that this warpgroup walks: share, share + shares, ...
        self.units = spread if plan.even else (plan.units - self.share + plan.shares - 1) // plan.shares
        self.most_units = plan.most_units

    def compute(self) -> None:
        plan = self.plan
        if plan.whole:
            self.fetch_rows()
        else:
            for j in range(min(plan.x_slots, self.most_units)):
                self._when(j < self.units, functools.partial(self.fetch_x, jnp.int32(j)))
        chunks = self.load_row() if plan.norm and plan.one_row else []
        pl.when(self.wg == 0)(self.fetch_scales)
        for i in range(min(plan.stages, self.most_units * plan.steps_per_unit)):
            self._when(i // plan.steps_per_unit < self.units, functools.partial(self.fetch_w, jnp.int32(i)))
        if plan.whole:
            self.sum_rows()
        elif plan.norm:
            self.sum_squares(chunks)
        if not plan.ready:
            self._when(self.units > 0, functools.partial(self.quantize, jnp.int32(0)))
            plgpu.commit_smem()
            if not plan.whole and plan.x_slots < self.most_units:
                self._when(plan.x_slots < self.units, functools.partial(self.fetch_x, jnp.int32(plan.x_slots)))
        plgpu.barrier_wait(self.scales_full)
        zero = plgpu.layout_cast(jnp.zeros((TILE, plan.width), jnp.float32), _ACC)
        totals = lax.fori_loop(0, self.units, self.unit, (zero,) * plan.mats)
        if plan.split > 1:
            pl.when(self.part > 0)(functools.partial(self.send, totals))
        self._when(True if plan.split == 1 else self.part == 0, functools.partial(self.combine, totals))
        if plan.whole:
            plgpu.wait_smem_to_gmem(0)

    @staticmethod
    def _when(condition: Any, action: Callable[[], None]) -> None:
        if isinstance(condition, bool):
            if condition:
                action()
        else:
            pl.when(condition)(action)

    def mine(self, action: Callable[[int], None]) -> None:
        """action(j) of the weight j that this block of threads works for."""
        for j, n in enumerate(self.plan.ns):
            inside = (self.cta >= self.firsts[j]) & (self.cta < self.firsts[j] + n // TILE)
            self._when(True if len(self.plan.ns) == 1 else inside, functools.partial(action, j))

    def scale_row(self, j: int, m: int) -> Any:
        """Of all rows of blocks of weight j, the one of this tile."""
        rows = -(-self.plan.ns[j] // BLOCK)
        return (self.layer * self.plan.mats + m) * rows + (self.cta - self.firsts[j]) // (BLOCK // TILE)

    def scale_start(self, j: int, m: int) -> Any:
        """The first scale of this tile's row of blocks, among those of weight j."""
        return (self.plan.offsets[j] if self.plan.offsets else 0) + self.scale_row(j, m) * self.plan.blocks

    def scale_skip(self, m: int) -> Any:
        """Scales that were copied before those of this row of blocks: copies start at 16 bytes."""
        skip: Any = 0
        if self.plan.blocks % 4:
            for j, first in enumerate(self.firsts):
                skip = jnp.where(self.cta >= first, lax.rem(self.scale_start(j, m), 4), skip)
        return skip

    def fetch_w(self, i: Any) -> None:
        """Starts the copies of this warpgroup's i-th step: ``plan.step`` neighbouring 64 x 128 blocks of every matrix."""
        plan = self.plan
        unit = lax.div(i, plan.steps_per_unit) * plan.shares + self.share
        block = unit * plan.unit + lax.rem(i, plan.steps_per_unit) * plan.step
        slot = lax.rem(i, plan.stages)

        def fetch(j: int) -> None:
            for m in range(plan.mats):
                rows = pl.ds((self.cta - self.firsts[j]) * TILE, TILE)
                source = self.weights[j].at[self.layer * plan.mats + m, rows, pl.ds(block * BLOCK, plan.step * BLOCK)]
                barrier = self.full.at[self.wg * plan.stages + slot]
                plgpu.copy_gmem_to_smem(source, self.ring.at[self.wg, slot, m], barrier)

        self.mine(fetch)

    def fetch_scales(self) -> None:
        plan = self.plan

        def fetch(j: int) -> None:
            for m in range(plan.mats):
                start = self.scale_start(j, m)
                if plan.blocks % 4:
                    start = start - lax.rem(start, 4)
                source = self.weight_scales[j].at[pl.ds(start, plan.scale_slots)]
                plgpu.copy_gmem_to_smem(source, self.scales.at[m], self.scales_full)

        self.mine(fetch)

    def fetch_x(self, iu: Any) -> None:
        """Starts the copies of one unit of x; rows beyond the last are zeros. With a norm, also of delta and the norm's weight."""
        plan, wg = self.plan, self.wg
        unit, slot = iu * plan.shares + self.share, lax.rem(iu, plan.x_slots)
        barrier = self.x_full.at[wg * plan.x_slots + slot]
        if plan.ready:
            for t in range(plan.terms):
                part = pl.ds(t * plan.width, plan.width)
                k = pl.ds(unit * (plan.unit * BLOCK), plan.unit * BLOCK)
                values = self.x.at[t, pl.ds(jnp.int32(0), plan.width), k]
                plgpu.copy_gmem_to_smem(values, self.x8.at[wg, slot, part, :], barrier)
            scales = self.more[0].at[pl.ds(unit * plan.unit, plan.unit), pl.ds(jnp.int32(0), plan.factor_slots)]
            plgpu.copy_gmem_to_smem(scales, self.factors.at[wg, slot], barrier)
            return
        pairs = [(self.x, self.xbuf)] + ([(self.more[1], self.dbuf)] if plan.delta else [])
        for source, buffer in pairs:
            for a in range(plan.atoms):
                plgpu.copy_gmem_to_smem(self.row_part(source, unit, a), buffer.at[wg, slot, a], barrier)
        if plan.norm:
            weight = self.more[0].at[self.layer, pl.ds(unit * plan.unit, plan.unit), :]
            plgpu.copy_gmem_to_smem(weight, self.nbuf.at[wg, slot], barrier)

    def row_part(self, ref: Any, unit: Any, a: int) -> Any:
        """[columns, 128] of an array [rows, blocks, 128]: eight blocks of the one row, or block a of the unit of all rows."""
        plan = self.plan
        if plan.one_row:
            return ref.at[0, pl.ds(unit * plan.unit, plan.unit), :]
        return ref.at[pl.ds(jnp.int32(0), plan.columns), unit * plan.unit + a, :]

    def quantize(self, iu: Any) -> None:
        """x of one unit of k to e4m3 terms in ``x8``, its scales in ``factors``."""
        plan, wg = self.plan, self.wg
        slot, buffer = lax.rem(iu, plan.x_slots), lax.rem(iu, plan.buffers)
        columns, unit = plan.columns, iu * plan.shares + self.share
        if not plan.whole:
            plgpu.barrier_wait(self.x_full.at[wg * plan.x_slots + slot])
        column = plgpu.broadcasted_iota(jnp.int32, (columns,), 0, layout=GROUPS.reduce(1))
        # All loads come before all stores, and nothing branches: the chains of the tiles overlap.
        if plan.whole:
            tiles = self.normed_rows(unit)
        else:
            tiles = [plgpu.load(self.xbuf.at[wg, slot, a], layout=GROUPS, optimized=False) for a in range(plan.atoms)]
        if plan.norm and plan.one_row:
            tiles = [self.normed(unit, slot, tiles[0])]
        terms, scales = zip(*(split(tile.astype(jnp.float32), plan.terms) for tile in tiles), strict=True)
        for a in range(plan.atoms):
            for t, term in enumerate(terms[a]):
                self.x8.at[wg, buffer, a, pl.ds(columns * t, columns), :][...] = term
                term_scale = scales[a] * 16.0**-t
                for p in range(plan.unit) if plan.one_row else (a,):
                    value = jnp.where(column == p, term_scale, 0.0) if plan.one_row else term_scale
                    self.factors.at[wg, buffer, p, pl.ds(columns * t, columns)][...] = value

    def unit(self, iu: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """All steps of one unit of k; x of the next unit is quantized in the first."""
        plan, wg, buffer = self.plan, self.wg, lax.rem(iu, self.plan.buffers)
        skips = [self.scale_skip(m) for m in range(plan.mats)]
        if plan.ready:
            plgpu.barrier_wait(self.x_full.at[wg * plan.x_slots + buffer])
        sums = list(totals)
        for s in range(plan.steps_per_unit):
            i = iu * plan.steps_per_unit + s
            slot = lax.rem(i, plan.stages)
            # Read before the barrier below: the next but one unit overwrites them.
            block = (iu * plan.shares + self.share) * plan.unit + s * plan.step
            factors = []
            for g in range(plan.step):
                at = self.factors.at[wg, buffer, s * plan.step + g, pl.ds(0, plan.width)]
                factor = plgpu.load(at, layout=_ACC.reduce(0), optimized=False)
                factors += [factor * self.scales[m, skips[m] + block + g] for m in range(plan.mats)]
            if s == 0 and not plan.ready and self.most_units > 1:
                pl.when(iu + 1 < self.units)(functools.partial(self.quantize, iu + 1))
            plgpu.barrier_wait(self.full.at[wg * plan.stages + slot])
            products = self.multiply(slot, buffer, s)
            # Orders x8 for wgmma, and says that all four warps are through with this slot.
            plgpu.commit_smem()
            following = i + plan.stages
            if plan.stages < self.most_units * plan.steps_per_unit:
                pl.when(following < self.units * plan.steps_per_unit)(functools.partial(self.fetch_w, following))
            ahead = plan.x_slots + (0 if plan.ready else 1)
            if s == (plan.steps_per_unit - 1 if plan.ready else 0) and ahead < self.most_units and not plan.whole:
                pl.when(iu + ahead < self.units)(functools.partial(self.fetch_x, iu + ahead))
            for j, (product, factor) in enumerate(zip(products, factors, strict=True)):
                wide = plgpu.layout_cast(lax.broadcast_in_dim(factor, (TILE, plan.width), (1,)), _ACC)
                sums[j % plan.mats] = sums[j % plan.mats] + product * wide
        return tuple(sums)

    def multiply(self, slot: Any, buffer: Any, s: int) -> tuple[jax.Array, ...]:
        """Products of a stage, one fresh accumulator per block: Hopper's FP8 wgmma accumulates in some 14 bits."""
        plan = self.plan
        terms = plan.terms if plan.ready else 1

        def body(*accumulators: Any) -> tuple[jax.Array, ...]:
            for j, acc in enumerate(accumulators):
                g, m, t = j // (plan.mats * terms), j // terms % plan.mats, j % terms
                atom = 0 if plan.one_row else s * plan.step + g
                block = self.ring.at[self.wg, slot, m, :, pl.ds(g * BLOCK, BLOCK)]
                part = pl.ds(t * plan.width, plan.width)
                if plan.ready:
                    columns = self.x8.at[self.wg, buffer, part, pl.ds(atom * BLOCK, BLOCK)]
                else:
                    columns = self.x8.at[self.wg, buffer, atom, part, :]
                plgpu.wgmma(acc, block, columns.T)
            products = [acc[...] for acc in accumulators]
            if terms == 1:
                return tuple(products)
            return tuple(high + low * (1 / 16) for high, low in zip(products[0::2], products[1::2], strict=True))

        kinds = [plgpu.ACC((TILE, plan.width), jnp.float32)] * (plan.step * plan.mats * terms)
        return pl.run_scoped(body, *kinds)
