"""FP8 block-scaled linear layers for 1 to 8 rows on Hopper whose weights are nearly all on their way at once, in Pallas Mosaic GPU.

For launches that are short of time rather than of bytes. As in ``mosaic_tile_sm90`` weights are the 64-row operand of e4m3 x e4m3
wgmma and tokens its columns, every product of 128 is promoted to float32, and the sums are added in a fixed order. What differs:

  * nothing is a loop: a warpgroup starts its copies, quantizes all of its x while they are under way, and multiplies.
  * ``fold``: the 64 rows of a product can be pieces of k of half the output rows, beside each other, so that twice the SMs read.
  * one row, whose columns are eight k-blocks: the columns that belong to their rows are gathered, and scaled once for all eight.
  * the two terms of W8A16 are added before they are scaled.
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

from pallas_kernels.blocks import BLOCK, E4M3
from pallas_kernels.fp8_linear.mosaic_launch_sm90 import Worker, launched
from pallas_kernels.fp8_linear.mosaic_once_rows_sm90 import Rows
from pallas_kernels.fp8_linear.once_plan import OncePlan
from pallas_kernels.fp8_linear.plan import TILE

_ACC = plgpu.Layout.WGMMA
# 32 elements, one a lane, the same in every warp.
_HALF = plgpu.Layout.TILED(
    plgpu.Tiling(((32,), (1,))), warp_dims=(plgpu.Replicated(4),), lane_dims=(-2,), vector_dim=-1
)


@functools.lru_cache(maxsize=256)
def build(plan: OncePlan, out_dtype: str, interpret: Any = None) -> Callable[..., list[jax.Array]]:
    """The kernel of a plan: called, and returning, as that of ``mosaic_sm90.build``."""
    return launched(plan, Once, _scratch(plan), out_dtype, interpret)


def _scratch(plan: OncePlan) -> dict[str, Any]:
    """Shared memory by name."""
    tiled = (plgpu.TilingTransform((8, 128)), plgpu.SwizzleTransform(128))
    groups, n = plan.warpgroups, 8 * plan.terms
    scratch: dict[str, Any] = {
        "ring": plgpu.SMEM((groups, plan.stages, TILE, plan.step * BLOCK), E4M3, transforms=tiled),
        "scales": plgpu.SMEM((plan.scale_slots,), jnp.float32),
        "x8": plgpu.SMEM((groups, plan.atoms, n, BLOCK), E4M3, transforms=tiled),
        "factors": plgpu.SMEM((groups, plan.atoms, 8), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=plan.fold, num_barriers=groups * plan.stages),
        "scales_full": plgpu.Barrier(),
        "done": plgpu.Barrier(num_arrivals=groups),
        "partial": plgpu.SMEM((groups, TILE) if plan.one_row else (groups, TILE, 8), jnp.float32),
    }
    if plan.one_row:
        scratch["zero"] = plgpu.SMEM((groups, 8), jnp.int16)
    else:
        scratch["xbuf"] = plgpu.SMEM((groups, 8, plan.stretch, BLOCK), jnp.bfloat16)
        scratch["x_full"] = plgpu.Barrier(num_barriers=groups)
    if plan.norm:
        scratch["squares"] = plgpu.SMEM((groups, 8), jnp.float32)
        scratch["summed"] = plgpu.Barrier(num_arrivals=groups)
    if plan.split > 1:
        # As in ``mosaic_sm90.build``.
        swizzled = (plgpu.TilingTransform((8, 8)), plgpu.SwizzleTransform(32))
        scratch["sent"] = plgpu.SMEM((plan.split - 1, groups, TILE, 8), jnp.float32, transforms=swizzled)
        scratch["arrived"] = plgpu.Barrier(num_arrivals=(plan.split - 1) * groups)
    return scratch


class Once(Worker, Rows):
    """The work of one block of threads."""

    def __init__(self, plan: OncePlan, *given: Any) -> None:
        super().__init__(plan, plan.height, *given)
        self.base = self.share * plan.stretch

    def compute(self) -> None:
        plan = self.plan
        tiles = self.load_row() if plan.one_row else []
        if not plan.one_row:
            self.fetch_rows()
        pl.when(self.wg == 0)(self.fetch_scales)
        for i in range(min(plan.stages, plan.steps)):
            self.fetch_w(i)
        self.quantize(tiles)
        plgpu.barrier_wait(self.scales_full)
        total = self.one_row_sums() if plan.one_row else self.sums()
        if plan.split > 1:
            pl.when(self.part > 0)(functools.partial(self.send, total))
            pl.when(self.part == 0)(functools.partial(self.combine, total))
        else:
            self.combine(total)

    def mine(self, action: Callable[[int], None]) -> None:
        """action(j) of the weight j that this block of threads works for."""
        if len(self.plan.ns) == 1:
            return action(0)
        for j, n in enumerate(self.plan.ns):
            inside = (self.cta >= self.firsts[j]) & (self.cta < self.firsts[j] + n // self.plan.height)
            pl.when(inside)(functools.partial(action, j))

    def fetch_scales(self) -> None:
        plan = self.plan

        def fetch(j: int) -> None:
            row = self.layer * -(-plan.ns[j] // BLOCK) + lax.div((self.cta - self.firsts[j]) * plan.height, BLOCK)
            start = (plan.offsets[j] if plan.offsets else 0) + row * plan.blocks
            source = self.weight_scales[j].at[pl.ds(start, plan.scale_slots)]
            plgpu.copy_gmem_to_smem(source, self.scales, self.scales_full)

        self.mine(fetch)

    def fetch_w(self, i: int) -> None:
        """Starts the copies of this warpgroup's step i."""
        plan = self.plan
        slot = i % plan.stages

        def fetch(j: int) -> None:
            for f in range(plan.fold):
                rows = pl.ds((self.cta - self.firsts[j]) * plan.height, plan.height)
                k = pl.ds((self.base + (i * plan.fold + f) * plan.step) * BLOCK, plan.step * BLOCK)
                target = self.ring.at[self.wg, slot, pl.ds(f * plan.height, plan.height), :]
                barrier = self.full.at[self.wg * plan.stages + slot]
                plgpu.copy_gmem_to_smem(self.weights[j].at[self.layer, rows, k], target, barrier)

        self.mine(fetch)

    def next_products(self, i: int) -> list[jax.Array]:
        """Products of step i, when it is here; its slot is filled anew."""
        plan, slot = self.plan, i % self.plan.stages
        plgpu.barrier_wait(self.full.at[self.wg * plan.stages + slot])
        products = self.multiply(slot, i * plan.fold * plan.step)
        if i + plan.stages < plan.steps:
            plgpu.commit_smem()  # all four warps are through with it
            self.fetch_w(i + plan.stages)
        return products

    def multiply(self, slot: int, first: int) -> list[jax.Array]:
        """One for each block of the step; of several rows one for each piece of each. ``first``: the k-block of the stretch."""
        plan = self.plan
        pieces = 1 if plan.one_row else plan.fold

        def body(*accumulators: Any) -> tuple[jax.Array, ...]:
            for i, acc in enumerate(accumulators):
                g, f, t = i // (pieces * plan.terms), i // plan.terms % pieces, i % plan.terms
                atom = first // 8 if plan.one_row else first + f * plan.step + g
                columns = self.x8.at[self.wg, atom, pl.ds(8 * t, 8), :]
                plgpu.wgmma(acc, self.ring.at[self.wg, slot, :, pl.ds(g * BLOCK, BLOCK)], columns.T)
            return tuple(acc[...] for acc in accumulators)

        kinds = [plgpu.ACC((TILE, 8), jnp.float32)] * (plan.step * pieces * plan.terms)
        products = pl.run_scoped(body, *kinds)
        if plan.terms == 1:
            return list(products)
        return [high + low * (1 / 16) for high, low in zip(products[0::2], products[1::2], strict=True)]

    def piece(self) -> jax.Array:
        """[64, 8]: which piece a row of a product is of."""
        return lax.div(plgpu.broadcasted_iota(jnp.int32, (TILE, 8), 0, layout=_ACC), self.plan.height)

    def one_row_sums(self) -> jax.Array:
        """[64, 8]: column p sums the blocks p, p + 8 ... of the stretch."""
        plan, piece = self.plan, self.piece()
        column = plgpu.broadcasted_iota(jnp.int32, (TILE, 8), 1, layout=_ACC)
        total = gathered = plgpu.layout_cast(jnp.zeros((TILE, 8), jnp.float32), _ACC)
        for i in range(plan.steps):
            first = i * plan.fold * plan.step
            for g, product in enumerate(self.next_products(i)):
                gathered = jnp.where(column == piece * plan.step + (first + g) % 8, product, gathered)
            if (first + plan.fold * plan.step) % 8 == 0:
                at = self.scales.at[pl.ds(self.base + first // 8 * 8, 8)]
                factor = self.factor(first // 8) * plgpu.load(at, layout=_ACC.reduce(0), optimized=False)
                total = total + gathered * _columns(factor)
        return total

    def sums(self) -> jax.Array:
        """[64, 8]: column r is row r of x."""
        plan, piece = self.plan, self.piece()
        total = plgpu.layout_cast(jnp.zeros((TILE, 8), jnp.float32), _ACC)
        for i in range(plan.steps):
            products, first = self.next_products(i), i * plan.fold * plan.step
            for g in range(plan.step):
                value: Any = None
                for f in range(plan.fold):
                    block = first + f * plan.step + g
                    factor = self.factor(block) * self.scales[self.base + block]
                    scaled = products[g * plan.fold + f] * _columns(factor)
                    value = scaled if value is None else jnp.where(piece == f, scaled, value)
                total = total + value
        return total

    def factor(self, atom: int) -> jax.Array:
        """[8]: the scales of an x tile."""
        return plgpu.load(self.factors.at[self.wg, atom], layout=_ACC.reduce(0), optimized=False)

    def send(self, total: jax.Array) -> None:
        """As ``mosaic_ending_sm90.Ending.send``."""
        target = self.sent.at[self.part - 1, self.wg]
        how = {"cluster_idx": jnp.int32(0), "cluster_dim": "part", "optimized": False}
        plgpu.async_store_smem(total, target, self.arrived, **how)

    def combine(self, total: jax.Array) -> None:
        """The leading block of a tile: its sums and those of the others, of all warpgroups, to the outputs."""
        plan = self.plan
        if plan.split > 1:
            plgpu.barrier_wait(self.arrived)
            for part in range(plan.split - 1):
                total = total + plgpu.load(self.sent.at[part, self.wg], layout=_ACC, optimized=False)
        self.partial.at[self.wg][...] = jnp.sum(total, axis=1) if plan.one_row else total
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.done)
        plgpu.barrier_wait(self.done)
        # Rows in turn to the warpgroups; their loads overlap where no branch stands between them.
        whole = plan.rows // plan.warpgroups
        if whole:
            self.finish([i * plan.warpgroups + self.wg for i in range(whole)])
        if plan.rows % plan.warpgroups:
            last = whole * plan.warpgroups + self.wg
            pl.when(last < plan.rows)(functools.partial(self.finish, [last]))

    def finish(self, rows: list[Any]) -> None:
        """Adds the warpgroups' sums, and of each the pieces, in order, and stores the outputs of some rows of x."""
        plan = self.plan
        layout = _ACC.reduce(1) if plan.fold == 1 else _HALF
        results = []
        for row in rows:
            total: Any = None
            for i in range(plan.warpgroups * plan.fold):
                at = (i // plan.fold, pl.ds(i % plan.fold * plan.height, plan.height))
                ref = self.partial.at[*at] if plan.one_row else self.partial.at[*at, row]
                part = plgpu.load(ref, layout=layout, optimized=False)
                total = part if total is None else total + part
            results.append(total)

        def store(j: int) -> None:
            at = pl.ds((self.cta - self.firsts[j]) * plan.height, plan.height)
            for row, y in zip(rows, results, strict=True):
                self.outs[j].at[row, at][...] = y.astype(self.outs[j].dtype)

        self.mine(store)


def _columns(v: Any) -> Any:
    return plgpu.layout_cast(lax.broadcast_in_dim(v, (TILE, 8), (1,)), _ACC)
