"""How a tile of the Hopper kernel of fp8_linear ends: the sums of all warpgroups of its blocks, in a fixed order, to the outputs.

The blocks of threads of a tile are one cluster. Each warpgroup of the others stores its float32 sums straight into the leading
block's shared memory (st.async, counted by a barrier there), where the same warpgroup adds them to its own in the order of the
blocks; the warpgroups of the leading block then add up as they do where a tile has one block. That block ends last, and the
cluster starts together: what is stored to is always there.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.fp8_linear.plan import TILE, Plan

ACC = plgpu.Layout.WGMMA
_AT_ONCE = 8  # rows


class Ending:
    """What ``mosaic_tile_sm90.Tile`` does last; its attributes are the tile's and its shared memory."""

    plan: Plan
    wg: Any
    part: Any
    cta: Any
    firsts: list[int]
    outs: Any
    partial: Any
    done: Any
    sent: Any
    arrived: Any
    mine: Any

    def combine(self, totals: tuple[jax.Array, ...]) -> None:
        """The leading block of a tile: its sums and those of the others, of all warpgroups, to the outputs."""
        plan = self.plan
        if plan.split > 1:
            totals = self.receive(totals)
        if plan.one_row and plan.warpgroups == 1:
            self.store([0], [self.activated([jnp.sum(total, axis=1) for total in totals])])
            return
        self.store_partial(totals)
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.done)
        plgpu.barrier_wait(self.done)
        # Rows in turn to the warpgroups, some at once: their loads overlap where no branch stands between them.
        whole = plan.rows // plan.warpgroups
        for first in range(0, whole, _AT_ONCE):
            self.finish([i * plan.warpgroups + self.wg for i in range(first, min(first + _AT_ONCE, whole))])
        if plan.rows % plan.warpgroups:
            last = whole * plan.warpgroups + self.wg
            pl.when(last < plan.rows)(functools.partial(self.finish, [last]))

    def send(self, totals: tuple[jax.Array, ...]) -> None:
        """The sums of this warpgroup into the leading block's shared memory. That block waits for them: it outlives the copies."""
        for m in range(self.plan.mats):
            target = self.sent.at[self.part - 1, self.wg, m]
            # One barrier for all: JAX 0.11.2 arrives at twice the index of a barrier of another block.
            plgpu.async_store_smem(
                totals[m], target, self.arrived, cluster_idx=jnp.int32(0), cluster_dim="part", optimized=False
            )

    def receive(self, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """totals and, in the order of the blocks, what the same warpgroup of the others sent."""
        plan = self.plan
        plgpu.barrier_wait(self.arrived)
        sums = list(totals)
        for part in range(plan.split - 1):
            for m in range(plan.mats):
                sums[m] = sums[m] + plgpu.load(self.sent.at[part, self.wg, m], layout=ACC, optimized=False)
        return tuple(sums)

    def store_partial(self, totals: tuple[jax.Array, ...]) -> None:
        plan = self.plan
        for m in range(plan.mats):
            if plan.one_row:
                self.partial.at[self.wg, m, :, 0][...] = jnp.sum(totals[m], axis=1)
            else:
                self.partial.at[self.wg, m][...] = totals[m]

    def finish(self, rows: list[Any]) -> None:
        """Adds the warpgroups' sums in order and stores 64 outputs of some rows of x."""
        self.store(rows, [self.result(row) for row in rows])

    def store(self, rows: list[Any], results: list[jax.Array]) -> None:
        def store(j: int) -> None:
            at = pl.ds((self.cta - self.firsts[j]) * TILE, TILE)
            for row, y in zip(rows, results, strict=True):
                self.outs[j].at[row, at][...] = y.astype(self.outs[j].dtype)

        self.mine(store)

    def result(self, row: Any) -> jax.Array:
        """64 outputs of a row of x."""
        plan = self.plan
        values = []
        for m in range(plan.mats):
            parts = [
                plgpu.load(self.partial.at[g, m, :, row + t * plan.columns], layout=ACC.reduce(1), optimized=False)
                for g in range(plan.warpgroups)
                for t in range(plan.partial // plan.columns or 1)
            ]
            values.append(functools.reduce(lambda a, b: a + b, parts))
        return self.activated(values)

    def activated(self, values: list[jax.Array]) -> jax.Array:
        y = values[0]
        return y if self.plan.mats == 1 else y / (1.0 + jnp.exp(-y)) * values[1]
