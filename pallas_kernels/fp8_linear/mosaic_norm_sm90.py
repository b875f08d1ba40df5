"""The norm within the Hopper kernel of fp8_linear, in Pallas Mosaic GPU.

Every block of threads adds up the squares of all of x by itself, while its first weights are on their way. One row is read straight
from global memory for it and once more by TMA, unit by unit, to be normed and quantized. Several rows are copied to shared memory
whole. One block of threads writes a unit of total and normed, block u unit u.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fp8_linear.mosaic_quantize_sm90 import GROUPS
from pallas_kernels.fp8_linear.plan import Plan


class Norm:
    """What ``mosaic_tile_sm90.Tile`` does where x has to be normed first; its attributes are the tile's and its shared memory."""

    plan: Plan
    wg: Any
    cta: Any
    layer: Any
    x: Any
    more: Any
    row_outs: Any
    row_part: Any
    _when: Any
    dbuf: Any
    nbuf: Any
    rows: Any
    zero: Any
    squares: Any
    summed: Any
    inverse: Any
    x_full: Any
    norm_full: Any

    def load_row(self) -> list[tuple[Any, ...]]:
        """A share of x and delta, all of a row by the warpgroups of a block, from global memory: (whether it is one, x, delta)."""
        plan = self.plan
        self.zero.at[self.wg][...] = plgpu.layout_cast(jnp.zeros((plan.unit,), jnp.int16), GROUPS.reduce(1))
        refs = (self.x,) + ((self.more[1],) if plan.delta else ())
        chunks = []
        for iu in range(-(-plan.units // plan.warpgroups)):
            unit = iu * plan.warpgroups + self.wg
            inside = True if plan.units % plan.warpgroups == 0 else unit < plan.units
            unit = jnp.minimum(unit, plan.units - 1)
            tiles = (plgpu.load(self.row_part(ref, unit, 0), layout=GROUPS, optimized=False) for ref in refs)
            chunks.append((inside, *tiles))
        return chunks

    def sum_squares(self, chunks: list[tuple[Any, ...]]) -> None:
        """1 / sqrt(mean of squares + eps) into ``inverse``. The order of the sum is the same in all blocks of threads."""
        plan, wg = self.plan, self.wg
        total = None
        zero = plgpu.load(self.zero.at[wg], layout=GROUPS.reduce(1), optimized=False)
        for inside, *terms in chunks:
            square = jnp.square(added(*(after(zero, term) for term in terms)).astype(jnp.float32))
            square = square if isinstance(inside, bool) else jnp.where(inside, square, 0.0)
            total = square if total is None else total + square
        self.squares.at[wg][...] = jnp.sum(total, axis=1)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.summed)
        plgpu.barrier_wait(self.summed)
        # In all lanes and rows of the tile at once: a vector operation costs what a scalar one does.
        shape = (plan.unit,)
        parts = [
            plgpu.layout_cast(jnp.full(shape, self.squares[g, i]), GROUPS.reduce(1))
            for g in range(plan.warpgroups)
            for i in range(plan.unit)
        ]
        mean = functools.reduce(lambda a, b: a + b, parts) * (1 / plan.k)
        self.inverse.at[wg][...] = lax.rsqrt(mean + plan.eps)
        plgpu.commit_smem()

    def normed(self, unit: Any, slot: Any, tile: Any) -> Any:
        """A tile of x plus delta after the norm, bfloat16; one block of threads writes both to global memory."""
        plan, wg = self.plan, self.wg
        if plan.delta:
            tile = added(tile, plgpu.load(self.dbuf.at[wg, slot, 0], layout=GROUPS, optimized=False))
        weight = plgpu.load(self.nbuf.at[wg, slot], layout=GROUPS, optimized=False).astype(jnp.float32)
        result = (tile.astype(jnp.float32) * self.inverse[wg, 0] * weight).astype(jnp.bfloat16)

        def keep() -> None:
            for out, value in zip(self.row_outs, (result, tile), strict=False):
                self.row_part(out, unit, 0)[...] = value

        pl.when(self.cta == lax.rem(unit, plan.tiles))(keep)
        return result

    def fetch_rows(self) -> None:
        """Starts the copies of all of several rows and of the norm's weight; rows beyond the last are zeros."""
        plan = self.plan

        def fetch(unit: Any) -> None:
            source = self.x.at[pl.ds(jnp.int32(0), plan.columns), pl.ds(unit * plan.unit, plan.unit), :]
            plgpu.copy_gmem_to_smem(source, self.rows.at[unit], self.x_full)

        for iu in range(-(-plan.units // plan.warpgroups)):
            unit = iu * plan.warpgroups + self.wg
            inside = True if plan.units % plan.warpgroups == 0 else unit < plan.units
            self._when(inside, functools.partial(fetch, unit))

        def weight() -> None:
            plgpu.copy_gmem_to_smem(self.more[0].at[self.layer], self.nbuf, self.norm_full)

        pl.when(self.wg == 0)(weight)

    def sum_rows(self) -> None:
        """1 / sqrt(mean of squares + eps) of every row into ``inverse``, the same bits in all blocks of threads."""
        plan, wg = self.plan, self.wg
        plgpu.barrier_wait(self.x_full)
        total = None
        for iu in range(-(-plan.units // plan.warpgroups)):
            unit = iu * plan.warpgroups + wg
            inside = unit < plan.units
            unit = jnp.minimum(unit, plan.units - 1)
            for a in range(plan.unit):
                tile = plgpu.load(self.rows.at[unit, :, a, :], layout=GROUPS, optimized=False)
                square = jnp.square(tile.astype(jnp.float32))
                square = square if plan.units % plan.warpgroups == 0 else jnp.where(inside, square, 0.0)
                total = square if total is None else total + square
        sums = jnp.sum(total, axis=1)
        if plan.warpgroups > 1:
            self.squares.at[wg][...] = sums
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.summed)
            plgpu.barrier_wait(self.summed)
            layout = GROUPS.reduce(1)
            parts = [plgpu.load(self.squares.at[g], layout=layout, optimized=False) for g in range(plan.warpgroups)]
            sums = functools.reduce(lambda a, b: a + b, parts)
        self.inverse.at[wg][...] = lax.rsqrt(sums * (1 / plan.k) + plan.eps)
        plgpu.commit_smem()
        plgpu.barrier_wait(self.norm_full)

    def normed_rows(self, unit: Any) -> list[Any]:
        """The tiles of a unit of x after the norm, bfloat16; one block of threads writes them to global memory."""
        plan = self.plan
        inverse = wide(plgpu.load(self.inverse.at[self.wg], layout=GROUPS.reduce(1), optimized=False), 0)
        results = []
        for a in range(plan.unit):
            tile = plgpu.load(self.rows.at[unit, :, a, :], layout=GROUPS, optimized=False)
            weight = plgpu.load(self.nbuf.at[unit * plan.unit + a], layout=GROUPS.reduce(0), optimized=False)
            result = tile.astype(jnp.float32) * inverse * wide(weight.astype(jnp.float32), 1)
            results.append(result.astype(jnp.bfloat16))

        def keep() -> None:
            # In place: every thread writes what it alone has read. The copy leaves out rows beyond the last.
            for a, result in enumerate(results):
                self.rows.at[unit, :, a, :][...] = result
            plgpu.commit_smem()
            target = self.row_outs[0].at[pl.ds(jnp.int32(0), plan.columns), pl.ds(unit * plan.unit, plan.unit), :]
            plgpu.copy_smem_to_gmem(self.rows.at[unit], target)

        pl.when(self.cta == lax.rem(unit, plan.tiles))(keep)
        return results


def wide(v: Any, axis: int) -> Any:
    """v along one axis of a tile [8, 128]."""
    return plgpu.layout_cast(lax.broadcast_in_dim(v, (8, 128), (axis,)), GROUPS)


def after(zero: Any, tile: Any) -> Any:
    """tile [8, 128], bfloat16, for use after zero has been read from shared memory, and so after earlier copies have started.

    The compiler puts what only needs registers before the copies of the weights, which would then wait for the row.
    """
    bits = lax.bitcast_convert_type(tile, jnp.int16) | wide(zero, 0)
    return lax.bitcast_convert_type(bits, jnp.bfloat16)


def added(x: Any, delta: Any = None) -> Any:
    """x + delta, rounded to bfloat16."""
    return x if delta is None else (x.astype(jnp.float32) + delta.astype(jnp.float32)).astype(jnp.bfloat16)
