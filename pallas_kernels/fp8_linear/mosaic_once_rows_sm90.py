"""x of the Hopper kernel with all weights on their way at once: loaded, normed and quantized whole, in Pallas Mosaic GPU.

One row is loaded into registers from global memory before the copies of the weights start, which would hold up its loads. Several
rows come by TMA, which fills those beyond the last with zeros. With a norm, of one row, every block of threads squares all of x;
one of them writes a stretch of total and normed, block s stretch s.
"""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fp8_linear.mosaic_norm_sm90 import added, after, wide
from pallas_kernels.fp8_linear.mosaic_quantize_sm90 import GROUPS, split
from pallas_kernels.fp8_linear.once_plan import OncePlan


class Rows:
    """What ``mosaic_once_sm90.Once`` does with x; its attributes are that kernel's and its shared memory."""

    plan: OncePlan
    wg: Any
    cta: Any
    share: Any
    base: Any
    layer: Any
    x: Any
    more: Any
    row_outs: Any
    x8: Any
    factors: Any
    xbuf: Any
    zero: Any
    squares: Any
    summed: Any
    x_full: Any

    def load_row(self) -> list[list[Any]]:
        """The tiles of the stretch, eight k-blocks each: x, delta and the norm's weight."""
        refs = [(self.x, 0)] + ([(self.more[1], 0)] if self.plan.delta else [])
        refs += [(self.more[0], self.layer)] if self.plan.norm else []
        self.zero.at[self.wg][...] = plgpu.layout_cast(jnp.zeros((8,), jnp.int16), GROUPS.reduce(1))
        parts = [pl.ds(self.base + 8 * a, 8) for a in range(self.plan.atoms)]
        return [[plgpu.load(ref.at[i, at, :], layout=GROUPS, optimized=False) for ref, i in refs] for at in parts]

    def fetch_rows(self) -> None:
        """Starts the copy of the stretch of several rows."""
        source = self.x.at[pl.ds(jnp.int32(0), 8), pl.ds(self.base, self.plan.stretch), :]
        plgpu.copy_gmem_to_smem(source, self.xbuf.at[self.wg], self.x_full.at[self.wg])

    def quantize(self, loaded: list[list[Any]]) -> None:
        """All of the stretch to e4m3 terms in ``x8``, its scales in ``factors``. loaded: of ``load_row``."""
        plan, wg = self.plan, self.wg
        if plan.one_row:
            zero = plgpu.load(self.zero.at[wg], layout=GROUPS.reduce(1), optimized=False)
            loaded = [[after(zero, tile) for tile in tiles] for tiles in loaded]
            rows = [added(*tiles[: 1 + plan.delta]) for tiles in loaded]
        else:
            plgpu.barrier_wait(self.x_full.at[wg])
            at = [self.xbuf.at[wg, :, a, :] for a in range(plan.stretch)]
            rows = [plgpu.load(ref, layout=GROUPS, optimized=False) for ref in at]
        results = rows
        if plan.norm:
            inverse = wide(self.inverse(rows), 0)
            results = [
                (row.astype(jnp.float32) * inverse * tiles[-1].astype(jnp.float32)).astype(jnp.bfloat16)
                for row, tiles in zip(rows, loaded, strict=True)
            ]
        # Nothing branches: the chains of the tiles overlap.
        terms, scales = zip(*(split(row.astype(jnp.float32), plan.terms) for row in results), strict=True)
        for a in range(plan.atoms):
            for t, term in enumerate(terms[a]):
                self.x8.at[wg, a, pl.ds(8 * t, 8), :][...] = term
            self.factors.at[wg, a][...] = scales[a]
        plgpu.commit_smem()
        if plan.norm:
            pl.when(self.cta == lax.rem(self.share, plan.tiles))(functools.partial(self.keep, results, rows))

    def inverse(self, rows: list[Any]) -> Any:
        """1 / sqrt(mean of squares + eps) of the one row, eight times; the same bits in all blocks of threads."""
        plan = self.plan
        squares = functools.reduce(lambda a, b: a + b, [jnp.square(row.astype(jnp.float32)) for row in rows])
        self.squares.at[self.wg][...] = jnp.sum(squares, axis=1)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.summed)
        plgpu.barrier_wait(self.summed)
        # In all lanes and rows of the tile at once: a vector operation costs what a scalar one does.
        values = [jnp.full((8,), self.squares[g, i]) for g in range(plan.warpgroups) for i in range(8)]
        parts = [plgpu.layout_cast(value, GROUPS.reduce(1)) for value in values]
        return lax.rsqrt(functools.reduce(lambda a, b: a + b, parts) * (1 / plan.k) + plan.eps)

    def keep(self, results: list[Any], totals: list[Any]) -> None:
        """normed and total to global memory."""
        for a in range(self.plan.atoms):
            for out, value in zip(self.row_outs, (results[a], totals[a]), strict=False):
                out.at[0, pl.ds(self.base + 8 * a, 8), :][...] = value
